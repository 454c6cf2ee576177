"""``engine.plan``: the memory plan from a config alone, without weights and without running anything."""

import re
from typing import Any

from engine.config import EngineArgs, ModelConfig
from engine.errors import ConfigError
from engine.hub import resolve
from engine.memory import KVGroupSpec, MemoryPlan, plan_memory
from engine.model_files import read_model_config
from engine.runner.devices import describe_device, prepare_backend

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
_CHUNK = 2048


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
    if fraction is not None:
        options["memory_fraction"] = fraction
    args = EngineArgs.from_options(model, options)
    prepare_backend()
    from engine.runner.skeleton import build_skeleton, weight_bytes

    resolved = resolve(args.model, args.revision, part="config")
    config = read_model_config(resolved, args)
    device = describe_device()
    # Only this CPU computes in float32; another device takes the checkpoint's own element type.
    on_this_cpu = device.kind == "cpu" and device_memory is None
    dtype = "float32" if on_this_cpu and args.dtype == "auto" else args.dtype
    skeleton = build_skeleton(config, dtype)
    weights = weight_bytes(resolved, skeleton, converted=dtype != "auto" and "quantization" not in config.hf_config)
    return plan_memory(
        groups=_groups(skeleton, args, min(args.max_num_batched_tokens or _CHUNK, config.context_length)),
        device_limit=device.memory_limit if device_memory is None else bytes_of(device_memory),
        fraction=args.memory_fraction,
        model_memory=weights if model_memory is None else bytes_of(model_memory, "model_memory"),
        overhead=estimated_overhead(config, args) if overhead is None else bytes_of(overhead, "overhead"),
        block_size=args.block_size,
        context_length=config.context_length,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        kv_cache_dtype=args.kv_cache_dtype,
        knob=args.memory_knob,
    )


def _groups(skeleton: Any, args: EngineArgs, chunk: int) -> list[KVGroupSpec]:
    """The cache groups of a model without weights, ``chunk`` tokens of which run ahead of a window."""
    from engine.runner import kv_spec

    try:
        leaves = kv_spec.flatten(kv_spec.probe_caches(skeleton))
    except kv_spec.UnsupportedCacheError:
        return [kv_spec.contiguous_group(skeleton, args.block_size)]
    return [
        kv_spec.group_spec(group, args.block_size, chunk, args.kv_cache_dtype) for group in kv_spec.group_leaves(leaves)
    ]


def estimated_overhead(config: ModelConfig, args: EngineArgs) -> int:
    """A guess at a step's activations, before it can be measured: a few rows of everything a layer makes."""
    text = {**config.hf_config, **(config.hf_config.get("text_config") or {})}
    hidden = int(text.get("hidden_size") or 4096)
    widest = int(text.get("intermediate_size") or 4 * hidden)
    rows = args.max_num_batched_tokens or _CHUNK
    return rows * (8 * hidden + 3 * widest) * 4 + int(text.get("vocab_size") or config.vocab_size) * 4 * 64
