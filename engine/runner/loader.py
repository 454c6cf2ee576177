"""Load a model's weights onto the device, in the element type that runs best there.

Everything happens on the calling thread, which must be the one that runs the model: MLX's streams
belong to their thread.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from engine.config import EngineArgs, ModelConfig
from engine.errors import ModelLoadError
from engine.gguf_file import GGUFFile, open_gguf
from engine.hub import ResolvedModel
from engine.memory import KVGroupSpec, plan_memory
from engine.model_files import read_model_config
from engine.runner.devices import Device, describe_device, prepare_backend
from engine.runner.gguf import PACKED_BITS, load_gguf

Progress = Callable[[str, int, int], None]
"""``progress(stage, done_bytes, total_bytes)``; raising in it cancels the load and leaves nothing behind."""

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_EASY_SHARE = 0.5
"""Packed weights are unpacked on a CPU where the result takes at most this share of its memory."""
_CACHE_BYTES = 1 << 28
"""Buffers freed by conversions are given back when they reach this size."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run. ``num_bytes`` are its weights', ``dtype`` that of its activations.

    ``notes`` are lines for the user: what was chosen for this device.
    """

    model: nn.Module
    config: ModelConfig
    num_bytes: int
    dtype: mx.Dtype
    notes: list[str] = field(default_factory=list)


def load_model(resolved: ResolvedModel, args: EngineArgs, progress: Progress | None = None) -> LoadedModel:
    """Load ``resolved`` on this thread. Raises :class:`ModelLoadError` in one line.

    On CPUs weights become float32 (packed ones too, where memory allows); elsewhere they stay as the
    checkpoint has them. ``--dtype`` is honoured everywhere.
    """
    backend = prepare_backend()
    device = describe_device()
    config = read_model_config(resolved, args)
    report = progress or _ignore
    if resolved.kind == "gguf":
        model, choice = _load_file(open_gguf(resolved.path), config, args, device, report)
    else:
        model, choice = _load_folder(resolved, config, args, device, report)
    mx.clear_cache()
    parameters = [value for _, value in tree_flatten(model.parameters())]
    line = ", ".join(part for part in (backend or device.name, choice) if part)
    return LoadedModel(model, config, sum(value.nbytes for value in parameters), _main_dtype(parameters), [line])


def _load_file(
    file: GGUFFile, config: ModelConfig, args: EngineArgs, device: Device, report: Progress
) -> tuple[nn.Module, str]:
    dtype = _file_dtype(file, args, device)
    packed = [info for info in file.tensors.values() if info.type in PACKED_BITS]
    unpacked_bytes = sum(math.prod(info.shape) for info in file.tensors.values()) * dtype.size
    keep = bool(packed) and (device.runs_packed_weights_fast or unpacked_bytes > _EASY_SHARE * device.memory_limit)
    total = sum(info.num_bytes for info in file.tensors.values())
    check_architecture(config)
    _check_room(total if keep else unpacked_bytes, config, args, device)
    model = load_gguf(
        file, dict(config.hf_config), dtype=dtype, keep_packed=keep, report=lambda done: report("load", done, total)
    )
    kinds = {info.type.name for info in file.tensors.values()} - {"F32"}
    return model, _describe(dtype, sorted(kinds), keep)


def _file_dtype(file: GGUFFile, args: EngineArgs, device: Device) -> mx.Dtype:
    """float32 on CPUs; elsewhere the type in which the file's scales or values are exact."""
    if args.dtype != "auto":
        return DTYPES[args.dtype]
    if device.kind == "cpu":
        return mx.float32
    return mx.bfloat16 if any(info.type.name == "BF16" for info in file.tensors.values()) else mx.float16


def _load_folder(
    resolved: ResolvedModel, config: ModelConfig, args: EngineArgs, device: Device, report: Progress
) -> tuple[nn.Module, str]:
    check_architecture(config)
    model = _lazy_model(resolved, config, args)
    dtype = DTYPES[args.dtype] if args.dtype != "auto" else (mx.float32 if device.kind == "cpu" else None)
    packed = _packed_modules(model)
    keep = bool(packed) and (device.runs_packed_weights_fast or not _unpacks_easily(model, packed, dtype, device))
    if dtype is not None:
        _cast(model, dtype)
    if packed and not keep:
        from mlx_lm.utils import dequantize_model

        model = dequantize_model(model)
        _cast(model, dtype or mx.float32)
    _check_room(sum(value.nbytes for _, value in tree_flatten(model.parameters())), config, args, device)
    _materialise(model, report)
    bits = sorted({f"{module.bits}-bit" for module in packed})
    return model, _describe(dtype or _main_dtype([v for _, v in tree_flatten(model.parameters())]), bits, keep)


def _check_room(num_bytes: int, config: ModelConfig, args: EngineArgs, device: Device) -> None:
    """Refuse weights of ``num_bytes`` that leave nothing for a KV cache, before reading them ends the process."""
    if num_bytes < int(device.memory_limit * args.memory_fraction):
        return
    from engine.runner.kv_spec import contiguous_bytes_per_token
    from engine.runner.skeleton import build_skeleton

    skeleton = build_skeleton(config, args.dtype)
    layers = tuple(range(len(skeleton.layers)))
    plan_memory(
        groups=[KVGroupSpec("full", layers, contiguous_bytes_per_token(skeleton), block_size=args.block_size)],
        device_limit=device.memory_limit,
        fraction=args.memory_fraction,
        model_memory=num_bytes,
        overhead=0,
        block_size=args.block_size,
        context_length=config.context_length,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        knob=args.memory_knob,
    )


def _lazy_model(resolved: ResolvedModel, config: ModelConfig, args: EngineArgs) -> nn.Module:
    """mlx-lm's model with weights that are read when evaluated."""
    from mlx_lm.utils import load_model as load

    try:
        model: nn.Module = load(
            resolved.path,
            lazy=True,
            model_config=dict(config.hf_config),
            trust_remote_code=args.trust_remote_code,
        )[0]
    except (ValueError, KeyError, TypeError, FileNotFoundError, RuntimeError) as error:
        if config.hf_config.get("model_file") and not args.trust_remote_code:
            raise ModelLoadError(
                f"{resolved.name} runs its own Python file {config.hf_config['model_file']!r}; "
                "read it, then load with --trust-remote-code"
            ) from None
        reason = " ".join(str(error).split())[:200]
        raise ModelLoadError(f"{resolved.name}: {type(error).__name__}: {reason}; fetch the model again") from error
    return model


def check_architecture(config: ModelConfig) -> None:
    """Refuse a model type that mlx-lm does not have."""
    utils = importlib.import_module("mlx_lm.utils")
    if config.hf_config.get("model_file"):
        return
    try:
        utils._get_classes(dict(config.hf_config))
    except ValueError:
        raise ModelLoadError(
            f"{config.name}: model_type {config.model_type!r} is not supported by mlx-lm "
            f"{metadata.version('mlx-lm')}; a newer mlx-lm may have it"
        ) from None


def _packed_modules(model: nn.Module) -> list[Any]:
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


def _materialise(model: nn.Module, report: Progress) -> None:
    """Read the weights parameter by parameter, so that progress shows and an interrupt is heard."""
    parameters = tree_flatten(model.parameters())
    total = sum(value.nbytes for _, value in parameters)
    done = 0
    for _, value in parameters:
        mx.eval(value)
        done += value.nbytes
        if mx.get_cache_memory() > _CACHE_BYTES:
            mx.clear_cache()
        report("load", done, total)


def _main_dtype(parameters: list[mx.array]) -> mx.Dtype:
    """The floating type that holds most of the weights (of packed ones, the scales')."""
    sizes: dict[mx.Dtype, int] = {}
    for value in parameters:
        if mx.issubdtype(value.dtype, mx.floating):
            sizes[value.dtype] = sizes.get(value.dtype, 0) + value.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _describe(dtype: mx.Dtype, kinds: list[str], keep_packed: bool) -> str:
    name = str(dtype).rpartition(".")[2]
    if not kinds:
        return name
    return f"{name} ({', '.join(kinds)} weights {'kept packed' if keep_packed else 'unpacked exactly'})"


def _ignore(stage: str, done: int, total: int) -> None:
    """No progress wanted."""
