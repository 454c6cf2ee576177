"""How a device holds a checkpoint's weights: their element type, packed or unpacked, and so their bytes.

The loader does it, and the plan asks it of a model without weights: one decision, so that the two agree.
"""

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from engine.models.gguf_file import GGUFFile
from engine.params.engine_args import EngineArgs
from engine.runner.device.devices import Device
from engine.runner.load.gguf import GROUP_SIZE, PACKED_BITS

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_EASY_SHARE = 0.5
"""Packed weights are unpacked on a CPU where the result takes at most this share of its memory."""


@dataclass(frozen=True, slots=True)
class FileChoice:
    """How a GGUF file is loaded: ``num_bytes`` in memory, packed matrices left so where ``keep_packed``."""

    dtype: mx.Dtype
    keep_packed: bool
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Converted:
    """A folder's model as the device holds it. ``dtype`` None: as the checkpoint has it; ``bits`` of packed weights."""

    model: nn.Module
    dtype: mx.Dtype | None
    bits: tuple[int, ...]
    keep_packed: bool

    @property
    def as_stored(self) -> bool:
        """Whether the weights are what the files hold, to the byte."""
        return self.dtype is None and (self.keep_packed or not self.bits)

    @property
    def num_bytes(self) -> int:
        """Bytes of all parameters."""
        return parameter_bytes(self.model)


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, evaluated or not."""
    return sum(int(value.nbytes) for _, value in tree_flatten(model.parameters()))


def choose_for_file(file: GGUFFile, args: EngineArgs, device: Device) -> FileChoice:
    """float32 on CPUs; elsewhere the type in which the file's scales or values are exact."""
    if args.dtype != "auto":
        dtype = DTYPES[args.dtype]
    elif device.kind == "cpu":
        dtype = mx.float32
    else:
        dtype = mx.bfloat16 if any(info.type.name == "BF16" for info in file.tensors.values()) else mx.float16
    unpacked = sum(math.prod(info.shape) for info in file.tensors.values()) * dtype.size
    saved = sum(
        math.prod(info.shape) * dtype.size - _packed_bytes(math.prod(info.shape), PACKED_BITS[info.type], dtype)
        for info in file.tensors.values()
        if info.type in PACKED_BITS
    )
    keep = bool(saved) and (device.runs_packed_weights_fast or unpacked > _EASY_SHARE * device.memory_limit)
    return FileChoice(dtype, keep, unpacked - saved if keep else unpacked)


def convert(model: nn.Module, args: EngineArgs, device: Device) -> Converted:
    """``model`` in the element type that runs best on ``device``, or in ``--dtype``. Evaluates nothing."""
    dtype = DTYPES[args.dtype] if args.dtype != "auto" else (mx.float32 if device.kind == "cpu" else None)
    packed = packed_modules(model)
    keep = bool(packed) and (device.runs_packed_weights_fast or not _unpacks_easily(model, packed, dtype, device))
    if dtype is not None:
        _cast(model, dtype)
    if packed and not keep:
        from mlx_lm.utils import dequantize_model

        model = dequantize_model(model)
        _cast(model, dtype or mx.float32)
    return Converted(model, dtype, tuple(sorted({int(module.bits) for module in packed})), keep)


def _packed_bytes(num_values: int, bits: int, dtype: mx.Dtype) -> int:
    """Bytes of MLX's affine packing: the integers, a scale and a bias for each group."""
    return num_values * bits // 8 + 2 * (num_values // GROUP_SIZE) * dtype.size


def packed_modules(model: nn.Module) -> list[Any]:
    """Modules with quantized weights."""
    return [module for _, module in model.named_modules() if hasattr(module, "bits") and "scales" in module]


def _unpacks_easily(model: nn.Module, packed: list[Any], dtype: mx.Dtype | None, device: Device) -> bool:
    """Whether the model, unpacked, takes a modest part of memory (and mlx-lm can unpack it)."""
    if any("global_scale" in module for module in packed):
        return False
    width = (dtype or mx.float32).size
    size = sum(value.size for _, value in tree_flatten(model.parameters()) if value.dtype != mx.uint32)
    size += sum(module.weight.size * 32 // module.bits for module in packed)
    return int(size) * int(width) <= _EASY_SHARE * device.memory_limit


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Make all floating parameters ``dtype``; scales of packed weights included."""
    model.update(tree_map(lambda v: v.astype(dtype) if mx.issubdtype(v.dtype, mx.floating) else v, model.parameters()))
