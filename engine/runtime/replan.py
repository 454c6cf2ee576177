"""Another memory plan for an engine that runs: the weights stay, and so does every request."""

import logging
from collections.abc import Sequence

from engine.core.request import Request
from engine.core.scheduler import must_end
from engine.errors import HeldMemory, MemoryInUseError
from engine.memory.plan import MemoryPlan
from engine.memory.planner import what_if
from engine.params.flag_values import Auto
from engine.runtime.failures import failure_of
from engine.runtime.llm_engine import LLMEngine

logger = logging.getLogger("engine")


def replan(
    engine: LLMEngine,
    plan: MemoryPlan,
    *,
    fraction: float | Auto | None = None,
    max_model_len: int | Auto | None = None,
    max_num_seqs: int | Auto | None = None,
) -> MemoryPlan:
    """Run on ``plan`` with other settings from now on; gives the new plan. On the engine's thread, between two steps.

    Pools grow up to the new numbers of blocks as they fill. Smaller ones give memory back: cached blocks
    are forgotten, blocks in use move. Raises ConfigError, MemoryPlanError or MemoryInUseError, changing nothing.
    """
    new = what_if(plan, fraction=fraction, max_model_len=max_model_len, max_num_seqs=max_num_seqs)
    _drain(engine)
    _refuse_if_in_use(engine, new)
    _resize(engine, new)
    logger.info("Paged attention memory breakdown: %s", new.log_line())
    return new


def _drain(engine: LLMEngine) -> None:
    try:
        engine.drain()
    except BaseException as error:  # noqa: BLE001  (the step's requests are told; the plan can change all the same)
        engine.fail_step(failure_of("the model failed", error))


def _refuse_if_in_use(engine: LLMEngine, plan: MemoryPlan) -> None:
    scheduler = engine.scheduler
    long = [r for r in (*scheduler.running, *scheduler.waiting) if _promised_tokens(r) > plan.max_model_len]
    if long:
        raise _in_use(engine, long, f"max_model_len={plan.max_model_len} is less than requests under way need")
    for request in scheduler.running:
        scheduler.kv.free_out_of_window(request)
    sizes = [plan.num_blocks_of(spec) for spec in plan.groups]
    ending = must_end(scheduler.running, scheduler.kv.groups, sizes, plan.max_num_seqs)
    if ending and len(scheduler.running) > plan.max_num_seqs:
        raise _in_use(engine, ending, f"max_num_seqs={plan.max_num_seqs} is less than the requests that run")
    if ending:
        room = " and ".join(f"{size} {spec.block_name}" for spec, size in zip(plan.groups, sizes, strict=True))
        raise _in_use(engine, ending, f"memory_fraction={plan.fraction:g} with {room} is less than what is in use")


def _promised_tokens(request: Request) -> int:
    """How long a request may become: what it asked for, or its length now where it asked for nothing."""
    if request.params.max_tokens is None:
        return request.num_tokens + 1
    return request.num_prompt_tokens + request.max_tokens


def _in_use(engine: LLMEngine, requests: Sequence[Request], why: str) -> MemoryInUseError:
    held = tuple(_held(engine, name, requests) for name in dict.fromkeys(request.request_id for request in requests))
    named = ", ".join(f"{one.request_id} ({one.num_tokens} tokens, {one.num_blocks} blocks)" for one in held)
    return MemoryInUseError(f"{why}; must end first: {named}; nothing was changed", requests=held)


def _held(engine: LLMEngine, request_id: str, requests: Sequence[Request]) -> HeldMemory:
    """What the completions of one request hold, each shared block once."""
    mine = [request for request in requests if request.request_id == request_id]
    blocks = sum(len({b for r in mine for b in group.held_blocks(r)}) for group in engine.scheduler.kv.groups)
    return HeldMemory(request_id, num_tokens=sum(request.num_tokens for request in mine), num_blocks=blocks)


def _resize(engine: LLMEngine, plan: MemoryPlan) -> None:
    scheduler, groups = engine.scheduler, engine.scheduler.kv.groups
    sizes = [plan.num_blocks_of(spec) for spec in plan.groups]
    moves = [group.pool.resize(size) for group, size in zip(groups, sizes, strict=True)]
    scheduler.max_num_seqs = min(plan.max_num_seqs, scheduler.max_num_batched_tokens)
    for request in (*scheduler.running, *scheduler.waiting):
        if request.params.max_tokens is None:
            request.max_tokens = plan.max_model_len - request.num_prompt_tokens
    engine.max_model_len = plan.max_model_len
    try:
        engine.runner.resize(sizes, moves)
    except BaseException as error:  # noqa: BLE001  (pages are lost half-way: requests go on from their tokens)
        logger.warning("pages could not be moved (%s): running requests compute them again", error)
        engine.start_over()
