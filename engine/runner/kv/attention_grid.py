"""Attention of a chunk in few shapes, where MLX plans every shape anew.

On CUDA MLX hands the attention of several rows to cuDNN and keeps a plan for each pair of lengths: 40 ms to make one on
an H200 (MLX 0.32.4), as much as a chunk of 2048 tokens takes to compute, and hardly two prompts have the same length.
Rows and keys padded to multiples of 512 meet the plans of chunks before them. The scheduler ends chunks there where it
may, so that mostly the last one of a prompt is padded.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from engine.runner.device.devices import DeviceKind

GRID = 512
"""Lengths are padded to its multiples: at most so many rows and keys more, which take 8 ms of a 4B model's pass behind
8192 tokens."""
_LARGEST_HEAD = 128
_PLANNED_TYPES = (mx.bfloat16, mx.float16)

Attention = Callable[..., mx.array]


def chunk_grid(device: DeviceKind) -> int:
    """Positions at whose multiples chunks should end, so that their attention meets plans that are there."""
    return GRID if device == "cuda" else 1


def is_planned(queries: mx.array, values: mx.array) -> bool:
    """Whether MLX makes a plan for this attention's lengths: cuDNN's on CUDA, for what it covers there."""
    narrow = max(queries.shape[-1], values.shape[-1]) <= _LARGEST_HEAD
    return narrow and queries.dtype in _PLANNED_TYPES and queries.shape[2] > 1 and bool(mx.cuda.is_available())


def on_grid(attention: Attention, queries: mx.array, keys: mx.array, values: mx.array, **how: Any) -> mx.array:
    """``attention(queries, keys, values, **how)`` [1, heads, T, D] of lengths padded to multiples of :data:`GRID`.

    Queries [1, heads, T, D] are the last T of the positions that ``keys`` and ``values`` [1, kv_heads, L, D] hold;
    ``how["mask"]`` is "causal" or an array [..., T, L]. What is added lies where no row may look: keys behind all rows,
    as many rows behind, and rows before them until their number is right.
    """
    num_rows, length, mask = queries.shape[2], keys.shape[2], how["mask"]
    behind = -length % GRID
    before = -(num_rows + behind) % GRID
    if not behind and not before:
        return attention(queries, keys, values, **how)
    if not isinstance(mask, str):
        how["mask"] = _padded(mask, (before, behind), (0, behind), _hidden(mask.dtype))
    if behind:
        keys, values = _padded(keys, (0, behind), (0, 0)), _padded(values, (0, behind), (0, 0))
    rows = _padded(queries, (before, behind), (0, 0))
    return attention(rows, keys, values, **how)[:, :, before : before + num_rows]


def fits_grid(queries: mx.array, keys: mx.array, mask: mx.array | str | None) -> bool:
    """Whether :func:`on_grid` can pad this: the rows are the last of the keys' positions, as a mask tells."""
    if queries.shape[0] != 1 or queries.shape[2] > keys.shape[2] or mask is None:
        return False
    return mask == "causal" if isinstance(mask, str) else mask.shape[-2:] == (queries.shape[2], keys.shape[2])


def _padded(array: mx.array, rows: tuple[int, int], columns: tuple[int, int], value: mx.array | float = 0) -> mx.array:
    """``array`` [..., rows, columns] with so many more before and behind."""
    return mx.pad(array, [*[(0, 0)] * (array.ndim - 2), rows, columns], constant_values=value)


def _hidden(dtype: mx.Dtype) -> mx.array:
    """What a mask says of keys that a row may not see."""
    return mx.array(False) if dtype == mx.bool_ else mx.array(-mx.inf, dtype)
