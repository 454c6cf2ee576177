"""Attention of a chunk in few shapes, where MLX plans every shape anew.

On CUDA MLX hands the attention of several rows to cuDNN and keeps a plan for each pair of lengths (and of strides):
40 ms to make one on an H200 (MLX 0.32.4), as much as a chunk of 2048 tokens takes to compute, and hardly two prompts
have the same length. Rows and keys padded to multiples of 512 meet the plans of chunks before them. The scheduler ends
chunks there where it may, so that mostly the last one of a prompt is padded.
"""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx

from engine.runner.device.devices import DeviceKind

GRID = 512
"""Lengths are padded to its multiples: at most 511 keys and, under a causal mask, 1022 rows more. By reckoning 512 rows
behind 8192 tokens take 9 ms of a 4B model's pass."""
_FIRST_PLANNED = 80
"""Architectures before sm_80 have no such attention."""
_LARGEST_HEAD = 128
_PLANNED_TYPES = (mx.bfloat16, mx.float16)

Attention = Callable[..., mx.array]


def chunk_grid(device: DeviceKind) -> int:
    """Positions at whose multiples chunks should end, so that their attention meets plans that are there."""
    return GRID if device == "cuda" and _has_plans() else 1


def is_planned(queries: mx.array, values: mx.array) -> bool:
    """Whether MLX makes a plan for this attention's lengths: cuDNN's on CUDA, for what it covers there."""
    covered = all(dim <= _LARGEST_HEAD and dim % 8 == 0 for dim in (queries.shape[-1], values.shape[-1]))
    return covered and queries.dtype in _PLANNED_TYPES and queries.shape[2] > 1 and _has_plans()


@cache
def _has_plans() -> bool:
    """Whether this machine's GPU is one for which MLX asks cuDNN."""
    if not mx.cuda.is_available():
        return False
    number = re.search(r"\d+", str(mx.device_info().get("architecture", "")))
    return number is not None and int(number.group()) >= _FIRST_PLANNED


def on_grid(attention: Attention, queries: mx.array, keys: mx.array, values: mx.array, **how: Any) -> mx.array:
    """``attention(queries, keys, values, **how)`` [1, heads, T, D] of lengths padded to multiples of :data:`GRID`.

    Queries [1, heads, T, D] are the last T of the positions that ``keys`` and ``values`` [1, kv_heads, L, D] hold;
    ``how["mask"]`` is "causal" or an array [..., T, L]. What is added lies where no row may look: keys behind all
    others, and rows of which nobody asks for the result. Under "causal" the last row sees the last key, so that as many
    rows follow as keys, and the rest comes before.
    """
    num_rows, length, mask = queries.shape[2], keys.shape[2], how["mask"]
    more_keys = -length % GRID
    if isinstance(mask, str):
        before, behind = -(num_rows + more_keys) % GRID, more_keys
    else:
        before, behind = 0, -num_rows % GRID
        how["mask"] = _padded(mask, (before, behind), (0, more_keys), _hidden(mask.dtype))
    keys, values = (_padded(some, (0, more_keys), (0, 0)) for some in (keys, values))
    rows = _padded(queries, (before, behind), (0, 0))
    return attention(rows, keys, values, **how)[:, :, before : before + num_rows]


def fits_grid(queries: mx.array, keys: mx.array, mask: mx.array | str | None) -> bool:
    """Whether :func:`on_grid` can pad this: the rows are the last of the keys' positions, as a mask tells."""
    if queries.shape[0] != 1 or queries.shape[2] > keys.shape[2] or mask is None:
        return False
    return mask == "causal" if isinstance(mask, str) else mask.shape[-2:] == (queries.shape[2], keys.shape[2])


def _padded(array: mx.array, rows: tuple[int, int], columns: tuple[int, int], value: mx.array | float = 0) -> mx.array:
    """``array`` [..., rows, columns] with so many more before and behind; itself where that is none."""
    if not any((*rows, *columns)):
        return array
    return mx.pad(array, [*[(0, 0)] * (array.ndim - 2), rows, columns], constant_values=value)


def _hidden(dtype: mx.Dtype) -> mx.array:
    """What a mask says of keys that a row may not see."""
    return mx.array(False) if dtype == mx.bool_ else mx.array(-mx.inf, dtype)
