"""``engine.plan``: the memory plan from a config alone, without weights and without running anything."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Self

from engine.errors import ConfigError
from engine.memory.cache_spec import KVGroupSpec
from engine.memory.plan import MemoryPlan
from engine.memory.plan_table import PlanTable, tabulate
from engine.memory.planner import plan_memory
from engine.memory.step_cost import Overhead
from engine.models.model_config import ModelConfig, read_model_config
from engine.models.resolve import resolve
from engine.params.engine_args import EngineArgs
from engine.runner.device.devices import Device, describe_device, prepare_backend

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def bytes_of(size: str | float, name: str = "device_memory") -> int:
    """A size in bytes: a number, or text such as ``51.54GB``, ``48GiB``, ``800MB``."""
    if isinstance(size, int | float):
        return int(size)
    match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([kmgt]?i?b?)\s*", size, re.IGNORECASE)
    unit = match.group(2).upper() if match else ""
    unit = unit if unit.endswith("B") or not unit else unit + "B"
    if not match or unit not in _UNITS:
        flag = name.replace("_", "-")
        raise ConfigError(f"--{flag} {size}: must be a size such as 51.54GB or 48GiB", flag=name, value=size)
    return int(float(match.group(1)) * _UNITS[unit])


def plan(
    model: str,
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
    model: str,
    *,
    model_memory: str | float | None = None,
    overhead: str | float | None = None,
    **settings: Any,
) -> PlanTable:
    """:func:`plan` for every combination of ``settings``, of which lists are tried one by one; also what does not fit.

    >>> engine.plan_table("org/model", max_model_len=["32K", "128K"], fraction=[0.6, 0.75, 0.9])
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
    """Bytes that the user gave instead of what is found out."""

    device_memory: int | None
    model_memory: int | None
    overhead: int | None

    @classmethod
    def of(cls, given: Mapping[str, str | float | None]) -> Self:
        return cls(**{name: None if size is None else bytes_of(size, name) for name, size in given.items()})

    def device(self) -> Device:
        """This device, or one of that much memory: taken for a GPU, where checkpoints stay as they are."""
        if self.device_memory is None:
            return describe_device()
        return Device("metal", "another device", self.device_memory)


class _Planner:
    """One model's shapes, asked for once, for any number of plans."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._shapes: dict[tuple[str, Device], _Shapes] = {}

    def plan(self, sizes: _Sizes, fraction: Any, options: Mapping[str, Any]) -> MemoryPlan:
        args = EngineArgs.from_options(self._model, options).with_memory(fraction, flag="fraction")
        prepare_backend()
        device = sizes.device()
        key = (args.dtype, device)
        shapes = self._shapes.get(key) or _Shapes.of(args, device)
        self._shapes[key] = shapes
        context = shapes.config.context_length
        batched_tokens = args.batched_tokens(device.chunk_size)
        fused = device.kind != "cpu"
        overhead = estimated_overhead(shapes.config, fused) if sizes.overhead is None else sizes.overhead
        return plan_memory(
            groups=shapes.groups(args, min(batched_tokens, context)),
            device_limit=device.memory_limit,
            fraction=args.memory_fraction,
            model_memory=shapes.model_memory if sizes.model_memory is None else sizes.model_memory,
            overhead=overhead,
            block_size=args.block_size,
            context_length=context,
            max_model_len=args.max_model_len,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=batched_tokens,
            kv_cache_dtype=args.kv_cache_dtype,
            memory_flag=args.memory_flag,
            shared_layers=shapes.shared_layers,
            prefix_caching=args.enable_prefix_caching,
        )


@dataclass(frozen=True)
class _Shapes:
    """What a plan must know of a model: its config, its caches, its weights' bytes."""

    config: ModelConfig
    model: Any
    model_memory: int

    @classmethod
    def of(cls, args: EngineArgs, device: Device) -> Self:
        from engine.runner.load.abstract_model import skeleton_as_loaded

        resolved = resolve(args.model, args.revision, part="config")
        config = read_model_config(resolved, args)
        skeleton = skeleton_as_loaded(resolved, config, args, device)
        return cls(config, skeleton.model, skeleton.num_bytes)

    def groups(self, args: EngineArgs, chunk: int) -> list[KVGroupSpec]:
        """The cache groups, ``chunk`` tokens of which run ahead of a window."""
        from engine.runner.kv import kv_spec

        try:
            leaves = self._leaves if args.use_paged_attention else None
        except kv_spec.UnsupportedCacheError:
            leaves = None
        if leaves is None:
            return kv_spec.contiguous_groups(self.model, args.block_size, chunk)
        return [
            kv_spec.group_spec(group, args.block_size, chunk, args.kv_cache_dtype)
            for group in kv_spec.group_leaves(leaves)
        ]

    @cached_property
    def shared_layers(self) -> tuple[int, ...]:
        """Layers that need nothing."""
        from engine.runner.kv.kv_spec import shared_layers

        return shared_layers(self.model)

    @cached_property
    def _leaves(self) -> Any:
        from engine.runner.kv import kv_spec

        return kv_spec.flatten(kv_spec.probe_caches(self.model))


def estimated_overhead(config: ModelConfig, fused: bool) -> Overhead:
    """A guess at a step's activations, before they can be measured: rows of everything that a layer makes.

    Where attention is not ``fused`` (CPUs), the scores of every row over its whole context are held at once.
    """
    text = {**config.hf_config, **(config.hf_config.get("text_config") or {})}
    hidden = int(text.get("hidden_size") or 4096)
    widest = int(text.get("intermediate_size") or 4 * hidden)
    heads = int(text.get("num_attention_heads") or 32)
    logits = int(text.get("vocab_size") or config.vocab_size) * 64
    return Overhead(4 * logits, per_row=4 * (8 * hidden + 3 * widest), per_pair=0 if fused else 4 * heads)
