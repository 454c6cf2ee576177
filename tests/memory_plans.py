"""Memory plans for tests: of a device with 1 GB unless told otherwise, with nothing set by the user."""

from typing import Any

from engine.memory.plan import MemoryPlan, PlanInputs
from engine.memory.planner import plan_memory
from engine.memory.step_cost import StepCost

NOTHING_SET: dict[str, Any] = {
    "device_limit": 10**9,
    "model_memory": 0,
    "overhead": 0,
    "shared_layers": (),
    "context_length": 4096,
    "block_size": 16,
    "fraction": 0.9,
    "memory_flag": "gpu_memory_utilization",
    "max_model_len": None,
    "max_num_seqs": "auto",
    "max_num_batched_tokens": None,
    "kv_cache_dtype": "auto",
    "prefix_caching": True,
}


def make_plan(**given: Any) -> MemoryPlan:
    """The plan of ``given`` inputs, of which ``groups`` is needed; ``overhead`` may be bytes."""
    values = {**NOTHING_SET, **given}
    overhead = values["overhead"]
    values["overhead"] = overhead if isinstance(overhead, StepCost) else StepCost(float(overhead))
    for name in ("device_limit", "model_memory"):
        values[name] = int(values[name])
    return plan_memory(PlanInputs(**{**values, "groups": tuple(values["groups"])}))
