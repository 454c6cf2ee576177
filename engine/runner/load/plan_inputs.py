"""The inputs of a memory plan, put together in one way: before, during and after a load."""

from engine.memory.plan import PlanInputs
from engine.memory.step_cost import StepCost
from engine.models.model_config import ModelConfig
from engine.params.engine_args import EngineArgs
from engine.runner.device.devices import Device
from engine.runner.kv.kv_spec import ModelCaches


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
    """The inputs of a plan for a model with ``model_memory`` bytes of weights on ``device``; in pages if ``paged``."""
    context = config.context_length
    chunk = min(args.batched_tokens(device.chunk_size), context)
    return PlanInputs.from_args(
        args,
        device_limit=device.memory_limit,
        chunk_size=device.chunk_size,
        model_memory=model_memory,
        overhead=overhead,
        groups=caches.groups(args.block_size, chunk, paged=paged),
        shared_layers=caches.shared_layers,
        context_length=context,
    )
