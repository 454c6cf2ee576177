"""Load a model's weights onto the device, in the element type that runs best there.

Everything happens on the calling thread, which must be the one that runs the model: MLX's streams
belong to their thread.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn

from engine.memory.plan import PlanInputs
from engine.memory.planner import plan_memory
from engine.memory.step_cost import StepCost
from engine.models.local import ResolvedModel
from engine.models.model_config import ModelConfig, read_model_config
from engine.models.pypi import PACKAGE_MODELS, Progress
from engine.params.engine_args import EngineArgs
from engine.runner.device.devices import Device, describe_device, prepare_backend
from engine.runner.kv.kv_spec import ModelCaches
from engine.runner.load.abstract_model import check_architecture
from engine.runner.load.folder import FolderWeights
from engine.runner.load.gguf import GGUFWeights
from engine.runner.load.weight_reader import PreparedWeights, WeightReader
from engine.runner.load.weight_types import main_dtype, parameter_bytes

WEIGHT_READERS: dict[str, WeightReader] = {"folder": FolderWeights(), "gguf": GGUFWeights()}
"""The readers of weights, by the ``kind`` of the format (``engine/models/formats.py``)."""


Beside = Callable[[ModelConfig, int], AbstractContextManager[None]]
"""What is done while a model's weights, so many bytes, are read."""


def _nothing(_config: ModelConfig, _num_bytes: int) -> AbstractContextManager[None]:
    return nullcontext()


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


def load_model(
    resolved: ResolvedModel, args: EngineArgs, progress: Progress | None = None, beside: Beside = _nothing
) -> LoadedModel:
    """Load ``resolved`` on this thread. Raises :class:`ModelLoadError` in one line.

    On CPUs weights become float32 (packed ones too, where memory allows); elsewhere they stay as the
    checkpoint has them. ``--dtype`` is honoured everywhere. Weights are read inside ``beside(config, bytes)``.
    """
    backend = prepare_backend()
    device = describe_device()
    config = read_model_config(resolved, args)
    check_architecture(config)
    progress = progress or _ignore
    weights = WEIGHT_READERS[resolved.kind].prepare(resolved, config, args, device)
    _check_room(weights, config, args, device)
    progress("load", 0, weights.num_bytes)  # where a load that was given up meanwhile ends
    with beside(config, weights.num_bytes):
        model = weights.read(progress)
    mx.clear_cache()
    more = (_text_only_line(config), *config.notes, _terms(resolved))
    notes = [f"{backend or device.name}, {weights.describe(model)}", *filter(None, more)]
    return LoadedModel(model, config, parameter_bytes(model), main_dtype(model), notes)


def plan_inputs(
    caches: ModelCaches,
    config: ModelConfig,
    args: EngineArgs,
    device: Device,
    *,
    paged: bool,
    model_memory: int,
    overhead: StepCost,
) -> PlanInputs:
    """The inputs of a memory plan, before, during and after a load.

    ``model_memory`` is the weights' bytes; ``paged``: keys and values lie in pages.
    """
    context = config.context_length
    chunk = min(args.batched_tokens(device.chunk_size), context)
    return PlanInputs.from_args(
        args,
        device_limit=device.memory_limit,
        limited_by=device.limited_by,
        chunk_size=device.chunk_size,
        model_memory=model_memory,
        overhead=overhead,
        groups=caches.groups(args.block_size, chunk, paged=paged),
        shared_layers=caches.shared_layers,
        context_length=context,
    )


def _text_only_line(config: ModelConfig) -> str | None:
    """A line about vision and audio weights, which mlx-lm's models leave out."""
    parts = [name for name in ("vision", "audio") if config.hf_config.get(f"{name}_config")]
    return f"only the text part is loaded, not {' and '.join(parts)}: this engine serves text" if parts else None


def _terms(resolved: ResolvedModel) -> str | None:
    """The notice that the licence of a built-in model requires."""
    packaged = PACKAGE_MODELS.get(resolved.name)
    return packaged.terms or None if packaged else None


def _check_room(weights: PreparedWeights, config: ModelConfig, args: EngineArgs, device: Device) -> None:
    """Refuse weights that leave nothing for a KV cache, before reading them ends the process.

    The refusal is that of the plan after the load, but for the overhead of a step, which cannot be measured yet.
    """
    num_bytes = weights.num_bytes
    if num_bytes < int(device.memory_limit * args.memory_fraction):
        return
    caches, paged = ModelCaches(weights.abstract()), args.use_paged_attention
    plan_memory(plan_inputs(caches, config, args, device, paged=paged, model_memory=num_bytes, overhead=StepCost(0.0)))


def _ignore(stage: str, done: int, total: int) -> None:
    """No progress wanted."""
