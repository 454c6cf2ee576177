"""``engine.plan``: the memory plan from a config alone, without weights and without running anything."""

import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from engine.memory.plan import MemoryPlan, PlanInputs
from engine.memory.plan_table import PlanTable, tabulate
from engine.memory.planner import plan_memory
from engine.memory.step_cost import StepCost
from engine.models.model_config import ModelConfig, read_model_config, text_config
from engine.models.reading import reading
from engine.models.resolve import resolve
from engine.models.weight_format import Wanted
from engine.params.engine_args import EngineArgs, model_name
from engine.params.sizes import parse_size
from engine.runner.device.devices import Device, describe_device, prepare_backend
from engine.runner.device.placement import place

if TYPE_CHECKING:
    from engine.runner.kv.kv_spec import ModelCaches


def plan(
    model: str | os.PathLike[str],
    *,
    fraction: float | str | None = None,
    device_memory: str | float | None = None,
    model_memory: str | float | None = None,
    overhead: str | float | None = None,
    **options: Any,
) -> MemoryPlan:
    """How ``model`` would divide this device's memory, or ``device_memory`` bytes of another.

    ``options`` are the engine's flags. ``model_memory`` and ``overhead`` (bytes, or text such as
    21.64GB) replace what the headers of the weights say and what is estimated. Raises
    MemoryPlanError if it would not fit.
    """
    given = {"device_memory": device_memory, "model_memory": model_memory, "overhead": overhead}
    return _Planner(model).plan(_Sizes.of(given), fraction, options)


def plan_table(
    model: str | os.PathLike[str],
    *,
    model_memory: str | float | None = None,
    overhead: str | float | None = None,
    **settings: Any,
) -> PlanTable:
    """:func:`plan` for every combination of ``settings``, of which lists are tried one by one; also what does not fit.

    >>> sizes = {"device_memory": "2GB", "model_memory": "0.54GB", "overhead": "0.1GB"}
    >>> print(plan_table("smollm2", max_model_len=["2K", "8K"], fraction=[0.3, 0.9], **sizes))
    max_model_len  fraction                fits  longest  max_num_seqs  full length      each  KV tokens
               2K       0.3   no, 87.19MB short     none             1            –   47.19MB          –
               2K       0.9                 yes    8,192            24      × 24.00   47.19MB     50,336
               8K       0.3  no, 228.74MB short     none             1            –  188.74MB          –
               8K       0.9                 yes    8,192            24       × 6.14  188.74MB     50,336
    """
    planner = _Planner(model)

    def make(fraction: Any = None, device_memory: Any = None, **options: Any) -> MemoryPlan:
        given = {"device_memory": device_memory, "model_memory": model_memory, "overhead": overhead}
        return planner.plan(_Sizes.of(given), fraction, options)

    tried = {name: value for name, value in settings.items() if isinstance(value, list | tuple)}
    fixed = {name: value for name, value in settings.items() if name not in tried}
    return tabulate(partial(make, **fixed), tried)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Sizes in bytes that the user gave; None where they are to be determined."""

    device_memory: int | None
    model_memory: int | None
    overhead: int | None

    @classmethod
    def of(cls, given: Mapping[str, str | float | None]) -> Self:
        return cls(**{name: None if size is None else parse_size(size, name) for name, size in given.items()})

    def device(self) -> Device:
        """This device, or one of that much memory: taken for a GPU, where checkpoints stay as they are."""
        if self.device_memory is None:
            return describe_device()
        return Device("metal", "another device", self.device_memory)


class _Planner:
    """One model's shapes, asked for once, for any number of plans."""

    def __init__(self, model: str | os.PathLike[str]) -> None:
        self._model = model_name(model)
        self._shapes: dict[Hashable, _Shapes] = {}

    def plan(self, sizes: _Sizes, fraction: Any, options: Mapping[str, Any]) -> MemoryPlan:
        args = EngineArgs.from_options(self._model, options).with_memory(fraction, flag="fraction")
        place(args.device)
        prepare_backend()
        device = sizes.device()
        key = (args.dtype, args.revision, args.hf_config_path, device)
        shapes = self._shapes.get(key) or _Shapes.of(args, device)
        self._shapes[key] = shapes
        with reading(self._model):  # kinds of caches are asked for their sizes
            inputs = shapes.inputs(args, device, sizes)
        return plan_memory(inputs)


@dataclass(frozen=True)
class _Shapes:
    """What a plan must know of a model: its config, its caches, its weights' bytes."""

    config: ModelConfig
    caches: "ModelCaches"
    model_memory: int
    missing_files: tuple[str, ...]

    @classmethod
    def of(cls, args: EngineArgs, device: Device) -> Self:
        from engine.runner.kv.kv_spec import ModelCaches
        from engine.runner.load.loader import WEIGHT_READERS

        resolved = resolve(args.model, args.revision, part="config")
        with reading(args.model):
            config = read_model_config(resolved, replace(args, max_model_len=None))  # one for all lengths asked for
            abstract = WEIGHT_READERS[resolved.kind].abstract(resolved, config, args, device)
            wanted = Wanted(args.model, "", "weights")
            missing = resolved.format.missing(resolved.path, wanted) if resolved.path.is_dir() else ()
            return cls(config, ModelCaches(abstract.model), abstract.num_bytes, tuple(missing))

    def inputs(self, args: EngineArgs, device: Device, given: _Sizes) -> PlanInputs:
        """What the plan follows from, with the sizes that the user gave in place of those determined."""
        from engine.runner.load.loader import plan_inputs

        estimated = estimated_step_cost(self.config, fused=device.kind != "cpu")
        found = plan_inputs(
            self.caches,
            self.config,
            args,
            device,
            paged=args.use_paged_attention,
            model_memory=self.model_memory if given.model_memory is None else given.model_memory,
            overhead=estimated if given.overhead is None else StepCost(given.overhead),
        )
        return replace(found, missing_files=self.missing_files)


def estimated_step_cost(config: ModelConfig, fused: bool) -> StepCost:
    """A guess at a step's activations, before they can be measured: rows of everything that a layer makes.

    Where attention is not ``fused`` (CPUs), the scores of every row over its whole context are held at once.
    """
    text = text_config(config.hf_config)
    hidden = int(text.get("hidden_size") or 4096)
    own = text.get("intermediate_size") or 4 * hidden
    widest = int(max(own) if isinstance(own, list) else own)  # a list: of each layer
    heads = int(text.get("num_attention_heads") or 32)
    logits = int(text.get("vocab_size") or config.vocab_size) * 64
    return StepCost(4 * logits, per_row=4 * (8 * hidden + 3 * widest), per_pair=0 if fused else 4 * heads)
