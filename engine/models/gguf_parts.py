"""What a tensor of a GGUF file is in mlx-lm's model: its name there, and what llama.cpp's converter did to it.

A converter reorders rows, joins matrices and stores other numbers than the model's; a :class:`Part` says how that is
undone. Orders are indices: row ``i`` of the model's matrix is row ``order[i]`` of the file's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.intp]
Floats = npt.NDArray[np.float32]
Config = Mapping[str, Any]
Order = Callable[[Config], Indices]
Change = Callable[[Floats], Floats]


@dataclass(frozen=True, slots=True)
class Part:
    """One parameter of a layer (or of the whole model), and how the file's tensor becomes it.

    ``path`` ends in the parameter's own name only where that is neither ``weight`` nor ``bias``. ``beside``: other
    tensors of the layer whose rows follow this one's before ``rows`` are chosen. ``change`` is of exact values, so
    such a tensor never stays packed.
    """

    path: str
    rows: Order | None = None
    columns: Order | None = None
    change: Change | None = None
    beside: tuple[str, ...] = ()


Names = Mapping[str, str | Part | tuple[Part, ...]]
"""GGUF's name of a tensor, without layer number and ``.weight``, to its place; several: their rows are divided."""


def one_less(values: Floats) -> Floats:
    """A norm that the file holds as 1 + w, and the model as w."""
    return values - np.float32(1.0)


def log_of_negative(values: Floats) -> Floats:
    """A state's decay that the file holds as -exp(w), and the model as w."""
    return np.log(-values).reshape(-1)


def as_kernel(values: Floats) -> Floats:
    """A convolution along time ``[channels, width]`` as MLX has it: ``[channels, width, 1]``."""
    return values[..., None]


def as_row(values: Floats) -> Floats:
    """A matrix of one row, which the file may hold as a vector."""
    return values.reshape(1, -1)


def flat(values: Floats) -> Floats:
    """A vector, which the file has as a matrix."""
    return values.reshape(-1)


def in_halves(num_heads: int, num_rows: int) -> Indices:
    """Rows for RoPE that rotates half against half, of a file that has its pairs side by side."""
    return np.arange(num_rows).reshape(num_heads, -1, 2).swapaxes(1, 2).reshape(-1)


def query_rows(config: Config) -> Indices:
    """The queries' rows where queries, keys and values are one matrix."""
    return np.arange(config["num_attention_heads"] * config["head_dim"])


def key_rows(config: Config) -> Indices:
    """The keys' rows there."""
    start: int = config["num_attention_heads"] * config["head_dim"]
    return np.arange(start, start + config["num_key_value_heads"] * config["head_dim"])


def value_rows(config: Config) -> Indices:
    """The values' rows there."""
    count: int = config["num_key_value_heads"] * config["head_dim"]
    return key_rows(config) + count


def gate_rows(config: Config) -> Indices:
    """The gate's rows where an expert's gate and up projection are one matrix."""
    return np.arange(config["moe_intermediate_size"])


def up_rows(config: Config) -> Indices:
    """The up projection's rows there."""
    count: int = config["moe_intermediate_size"]
    return gate_rows(config) + count


def value_heads(config: Config, width: int = 1, start: int = 0) -> Indices:
    """Value heads of ``width`` rows beside those of their key head, of a file that has the first of every key first."""
    keys: int = config["linear_num_key_heads"]
    values: int = config["linear_num_value_heads"]
    file = start + np.arange(values * width).reshape(values // keys, keys, width)
    return file.swapaxes(0, 1).reshape(-1)


def wide_value_heads(config: Config) -> Indices:
    """Value heads with all their channels."""
    return value_heads(config, config["linear_value_head_dim"])


def key_and_value_heads(config: Config) -> Indices:
    """Queries and keys as they are, then value heads with all their channels."""
    start = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
    return np.concatenate([np.arange(start), value_heads(config, config["linear_value_head_dim"], start)])


def heads_with_gates(config: Config) -> Indices:
    """Query, key, values and gates of a key head together, of a file that has all queries first, then keys …"""
    keys, ratio = config["linear_num_key_heads"], config["linear_num_value_heads"] // config["linear_num_key_heads"]
    key, value = config["linear_key_head_dim"], config["linear_value_head_dim"] * ratio
    starts = np.cumsum([0, keys * key, keys * key, keys * value])
    blocks = [
        start + np.arange(keys * width).reshape(keys, width)
        for start, width in zip(starts, (key, key, value, value), strict=True)
    ]
    return np.concatenate(blocks, axis=1).reshape(-1)
