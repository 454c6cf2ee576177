"""Where each parameter of an mlx-lm model lies in a GGUF file, and its exact values from there."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import ModelLoadError
from engine.models.gguf_architectures import COMMON, Architecture
from engine.models.gguf_config import architecture_of
from engine.models.gguf_file import GGUFFile, TensorInfo, dequantized
from engine.models.gguf_parts import Change, Floats, Indices, Part, in_halves
from engine.models.gguf_rope import ROPE_TENSORS

_NAME = re.compile(r"(?:blk\.(\d+)\.)?([\w.]+?)(?:\.(weight|bias|scale|input_scale))?")
_PAIRED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
"""Tensors whose rows a converter puts in pairs, with the entry that counts their heads."""
_SHARED = ("attn_k", "attn_v", "attn_k_norm")
"""Tensors that layers which share keys and values do not need."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where one parameter lies: its name in the model, and what makes it of the file's tensors.

    Of the tensors' rows, one after another, it has ``rows``; of its columns, ``columns``. ``scale`` is a tensor by
    which it is multiplied (one number, or one for each expert).
    """

    path: str
    leaf: str
    tensors: tuple[TensorInfo, ...]
    rows: Indices | None = None
    columns: Indices | None = None
    change: Change | None = None
    scale: TensorInfo | None = None

    @property
    def name(self) -> str:
        """The parameter's name in the model."""
        return f"{self.path}.{self.leaf}" if self.leaf else self.path

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values: rows chosen, before any ``change``."""
        shape = list(self.tensors[0].shape)
        shape[self.axis] = self.stored_rows if self.rows is None else len(self.rows)
        return tuple(shape)

    @property
    def axis(self) -> int:
        """The axis of rows: the last but one of matrices, the last of biases."""
        ndim = len(self.tensors[0].shape)
        return ndim - 1 if ndim == 1 or self.leaf == "bias" else ndim - 2

    @property
    def stored_rows(self) -> int:
        """Rows of its tensors together."""
        return sum(info.shape[self.axis] for info in self.tensors)

    @property
    def one_type(self) -> bool:
        """Whether all its tensors are of one type."""
        return len({info.type for info in self.tensors}) == 1

    @property
    def file_bytes(self) -> float:
        """Bytes in the file, of which a tensor that becomes several parameters gives each its share."""
        return sum(info.num_bytes for info in self.tensors) * (self.shape[self.axis] / self.stored_rows)


def sources(file: GGUFFile, config: Mapping[str, Any]) -> list[Source]:
    """All parameters of the model in the order of the file. A tensor with no place in it is refused by name."""
    architecture = architecture_of(file)
    names = {**COMMON, **architecture.names}
    joined = {name for part in _parts(names) for name in part.beside}
    found: list[Source] = []
    for info in sorted(file.tensors.values(), key=lambda info: (info.file, info.offset)):
        match = _NAME.fullmatch(info.name)
        layer, name, leaf = match.groups() if match else (None, info.name, None)
        if info.name in ROPE_TENSORS or leaf == "input_scale" or name in joined or _is_spare(layer, name, config):
            continue
        place = names.get(f"{name}.{leaf}") or names.get(name)
        if leaf == "scale" and f"{name}.scale" not in names and place is not None:
            continue
        if place is None or (leaf is None and not isinstance(place, Part)):
            raise ModelLoadError(
                f"{file.path.name}: tensor {info.name} is not known for architecture {file.architecture}; "
                "load the model's safetensors folder instead"
            )
        bare = f"{name}.{leaf}" in names or leaf is None
        for part in place if isinstance(place, tuple) else (place,):
            one = Part(part) if isinstance(part, str) else part
            found.append(_source(file, config, architecture, info, one, (layer, name, "" if bare else str(leaf))))
    return found


def values_of(file: GGUFFile, source: Source) -> Floats:
    """A parameter's exact values as float32, as the model has them."""
    if source.axis == len(source.shape) - 2 and source.one_type:
        where = f"{file.path.name}: {source.tensors[0].name}"
        values = dequantized(blocks_of(file, source), source.tensors[0].type, where)
    else:
        values = np.concatenate([file.values(info.name) for info in source.tensors], axis=source.axis)
        values = values if source.rows is None else np.take(values, source.rows, axis=source.axis)
    if source.columns is not None:
        values = values[..., source.columns]
    if source.scale is not None:
        scale = file.values(source.scale.name)
        values = values * scale.reshape(-1, *[1] * (values.ndim - 1)) if scale.size > 1 else values * scale.reshape(())
    return values if source.change is None else source.change(values)


def blocks_of(file: GGUFFile, source: Source) -> npt.NDArray[Any]:
    """A matrix's blocks ``[..., rows, bytes]`` (of plain numbers their values) in the model's order of rows."""
    assert source.one_type, f"{source.name} is of tensors of several types"
    blocks = file.blocks(source.tensors[0].name)
    if len(source.tensors) > 1:
        blocks = np.concatenate([file.blocks(info.name) for info in source.tensors], axis=-2)
    return blocks if source.rows is None else np.take(blocks, source.rows, axis=-2)


def _source(
    file: GGUFFile,
    config: Mapping[str, Any],
    architecture: Architecture,
    info: TensorInfo,
    part: Part,
    at: tuple[str | None, str, str],
) -> Source:
    """The parameter that ``part`` makes of a tensor ``at`` a layer, with a name and a leaf."""
    layer, name, leaf = at
    prefix = "" if layer is None else f"blk.{layer}."
    suffix = info.name.removeprefix(prefix + name)
    tensors = (info, *(_tensor(file, f"{prefix}{other}{suffix}") for other in part.beside))
    rows = None if part.rows is None else part.rows(config)
    heads = _PAIRED.get(_gguf_name(part, name))
    if architecture.pairs and heads is not None:
        count = config[heads]
        halves = in_halves(count, count * config["head_dim"])
        rows = halves if rows is None else rows[halves]
    change = part.change
    if architecture.norms is not None and name.endswith("norm"):
        change = architecture.norms
    path = part.path if layer is None else f"model.layers.{layer}.{part.path}"
    columns = None if part.columns is None else part.columns(config)
    scale = file.tensors.get(f"{prefix}{name}.scale") if leaf == "weight" else None
    scale = None if f"{name}.scale" in architecture.names else scale
    source = Source(architecture.root + path, leaf, tensors, rows, columns, change, scale)
    if rows is not None and rows.max(initial=-1) >= source.stored_rows:
        raise ModelLoadError(
            f"{file.path.name}: tensor {info.name} has {source.stored_rows} rows and the model {rows.max() + 1}; "
            "load the model's safetensors folder instead"
        )
    return source


def _gguf_name(part: Part, name: str) -> str:
    """The tensor's name, of a divided one that of its part."""
    return {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k"}.get(part.path, name)


def _tensor(file: GGUFFile, name: str) -> TensorInfo:
    info = file.tensors.get(name)
    if info is None:
        raise ModelLoadError(f"{file.path.name}: tensor {name} is missing; fetch the file again")
    return info


def _parts(names: Mapping[str, str | Part | tuple[Part, ...]]) -> Iterator[Part]:
    for place in names.values():
        for one in place if isinstance(place, tuple) else (place,):
            if isinstance(one, Part):
                yield one


def _is_spare(layer: str | None, name: str, config: Mapping[str, Any]) -> bool:
    """Whether a layer only guesses further tokens, or a tensor is one that a layer with shared keys does not need."""
    if layer is None:
        return False
    count, shared = config["num_hidden_layers"], config.get("num_kv_shared_layers", 0)
    return int(layer) >= count or (int(layer) >= count - shared and name in _SHARED)
