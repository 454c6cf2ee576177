"""Load a model's weights onto the device, in the element type that runs best there.

Everything happens on the calling thread, which must be the one that runs the model: MLX's streams
belong to their thread.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from engine.errors import ModelLoadError
from engine.memory.planner import plan_memory
from engine.memory.step_cost import StepCost
from engine.models.gguf_file import GGUFFile, open_gguf
from engine.models.local import ResolvedModel
from engine.models.model_config import ModelConfig, read_model_config
from engine.models.pypi import PACKAGE_MODELS
from engine.params.engine_args import EngineArgs
from engine.runner.device.devices import Device, describe_device, prepare_backend
from engine.runner.kv.kv_spec import ModelCaches
from engine.runner.load.abstract_model import build_abstract_model
from engine.runner.load.architecture import check_architecture
from engine.runner.load.gguf import load_gguf
from engine.runner.load.plan_inputs import plan_inputs
from engine.runner.load.weight_types import choose_for_file, convert

Progress = Callable[[str, int, int], None]
"""``progress(stage, done_bytes, total_bytes)``; raising in it cancels the load and leaves nothing behind."""

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
    notes = [line, *filter(None, [_text_only_line(config), _terms(resolved)])]
    return LoadedModel(model, config, sum(value.nbytes for value in parameters), _main_dtype(parameters), notes)


def _text_only_line(config: ModelConfig) -> str | None:
    """A line for checkpoints that see or hear: mlx-lm's models drop those weights."""
    parts = [name for name in ("vision", "audio") if config.hf_config.get(f"{name}_config")]
    return f"only the text part is loaded, not {' and '.join(parts)}: this engine serves text" if parts else None


def _terms(resolved: ResolvedModel) -> str | None:
    """What the licence of a built-in model asks to be said."""
    packaged = PACKAGE_MODELS.get(resolved.name)
    return packaged.terms or None if packaged else None


def _load_file(
    file: GGUFFile, config: ModelConfig, args: EngineArgs, device: Device, report: Progress
) -> tuple[nn.Module, str]:
    choice = choose_for_file(file, args, device)
    total = sum(info.num_bytes for info in file.tensors.values())
    check_architecture(config)
    _check_room(choice.num_bytes, lambda: build_abstract_model(config, choice.dtype), config, args, device)
    model = load_gguf(
        file,
        dict(config.hf_config),
        dtype=choice.dtype,
        keep_packed=choice.keep_packed,
        report=lambda done: report("load", done, total),
    )
    kinds = {info.type.name for info in file.tensors.values()} - {"F32"}
    return model, _describe(choice.dtype, sorted(kinds), choice.keep_packed)


def _load_folder(
    resolved: ResolvedModel, config: ModelConfig, args: EngineArgs, device: Device, report: Progress
) -> tuple[nn.Module, str]:
    check_architecture(config)
    converted = convert(_lazy_model(resolved, config, args), args, device)
    model = converted.model
    _check_room(converted.num_bytes, lambda: model, config, args, device)
    _materialise(model, report)
    bits = [f"{bits}-bit" for bits in converted.bits]
    dtype = converted.dtype or _main_dtype([value for _, value in tree_flatten(model.parameters())])
    return model, _describe(dtype, bits, converted.keep_packed)


def _check_room(
    num_bytes: int, make_model: Callable[[], nn.Module], config: ModelConfig, args: EngineArgs, device: Device
) -> None:
    """Refuse weights of ``num_bytes`` that leave nothing for a KV cache, before reading them ends the process.

    The refusal is that of the plan after the load, but for the overhead of a step, which cannot be measured yet.
    ``make_model`` gives the model, its weights unread, in the element types that it will have.
    """
    if num_bytes < int(device.memory_limit * args.memory_fraction):
        return
    caches, paged = ModelCaches(make_model()), args.use_paged_attention
    plan_memory(plan_inputs(caches, config, args, device, paged=paged, model_memory=num_bytes, overhead=StepCost(0.0)))


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
