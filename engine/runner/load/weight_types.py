"""How a device holds a checkpoint's weights: their element type, packed or unpacked, and so their bytes.

The loader does it, and the plan asks it of a model without weights: one decision, so that the two agree.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from engine.params.engine_args import EngineArgs
from engine.runner.device.devices import Device
from engine.runner.load.unpack import packed_kind, round_inputs_here, runs_packed, unpack, unpacked_size

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_EASY_SHARE = 0.5
"""Packed weights are unpacked on a CPU where the result takes at most this share of its memory."""


@dataclass(frozen=True, slots=True)
class Converted:
    """A folder's model as the device holds it. ``dtype`` None: as the checkpoint has it.

    ``kinds`` of packed weights for people: ``4-bit``, ``mxfp4``. ``rounds_inputs``: whether MLX lacks the products of
    layers that quantize their inputs, so that they are rounded by other operations.
    """

    model: nn.Module
    dtype: mx.Dtype | None
    kinds: tuple[str, ...]
    keep_packed: bool
    rounds_inputs: bool

    @property
    def as_stored(self) -> bool:
        """Whether the weights are what the files hold, to the byte."""
        return self.dtype is None and (self.keep_packed or not self.kinds)

    @property
    def num_bytes(self) -> int:
        """Bytes of all parameters."""
        return parameter_bytes(self.model)


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, evaluated or not."""
    return sum(int(value.nbytes) for _, value in tree_flatten(model.parameters()))


def convert(model: nn.Module, args: EngineArgs, device: Device) -> Converted:
    """``model`` in the element type that runs best on ``device``, or in ``--dtype``. Evaluates nothing."""
    dtype = DTYPES[args.dtype] if args.dtype != "auto" else (mx.float32 if device.kind == "cpu" else None)
    packed = packed_modules(model)
    keep = bool(packed) and (device.runs_packed_weights_fast or not _model_unpacks_easily(model, packed, dtype, device))
    kinds = tuple(sorted({_kind_of(module) for module in packed.values()}))
    rounds = device.kind == "cpu" and any(isinstance(module, nn.QQLinear) for module in packed.values())
    if dtype is not None:
        _cast(model, dtype)
    if keep:
        if rounds:
            round_inputs_here(model, packed)
        packed = {path: one for path, one in packed_modules(model).items() if not runs_packed(one, device.kind)}
    unpack(model, packed, dtype or (main_dtype(model) if keep else mx.float32))
    return Converted(model, dtype, kinds, bool(packed_modules(model)), rounds)


def unpacks_easily(num_bytes: int, device: Device) -> bool:
    """Whether weights that take ``num_bytes`` unpacked take a modest part of the device's memory."""
    return num_bytes <= _EASY_SHARE * device.memory_limit


def main_dtype(model: nn.Module) -> mx.Dtype:
    """The floating type that holds most of the weights (of packed ones, the scales')."""
    sizes: dict[mx.Dtype, int] = {}
    for _, value in tree_flatten(model.parameters()):
        if mx.issubdtype(value.dtype, mx.floating):
            sizes[value.dtype] = sizes.get(value.dtype, 0) + value.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def describe_weights(dtype: mx.Dtype, kinds: list[str], keep_packed: bool) -> str:
    """``float16 (Q4_1 weights kept packed)``; ``kinds`` of packed weights."""
    name = str(dtype).rpartition(".")[2]
    if not kinds:
        return name
    return f"{name} ({', '.join(kinds)} weights {'kept packed' if keep_packed else 'unpacked exactly'})"


def packed_modules(model: nn.Module) -> dict[str, Any]:
    """Modules with packed weights, by their paths."""
    return {path: module for path, module in model.named_modules() if packed_kind(module)}


def _kind_of(module: Any) -> str:
    """The packing of a module for people."""
    kind = packed_kind(module)
    return f"{module.bits}-bit" if kind == "affine" else str(kind)


def _model_unpacks_easily(model: nn.Module, packed: dict[str, Any], dtype: mx.Dtype | None, device: Device) -> bool:
    """Whether the model, unpacked, takes a modest part of memory."""
    width = (dtype or mx.float32).size
    inside = {f"{path}.{key}" for path, module in packed.items() for key in module if key != "bias"}
    size = sum(value.size for name, value in tree_flatten(model.parameters()) if name not in inside)
    size += sum(unpacked_size(module) for module in packed.values())
    return unpacks_easily(int(size) * int(width), device)


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Make all floating parameters ``dtype``; scales of packed weights included."""
    model.update(tree_map(lambda v: v.astype(dtype) if mx.issubdtype(v.dtype, mx.floating) else v, model.parameters()))
