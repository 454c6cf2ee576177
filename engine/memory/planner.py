"""The memory plan: bytes in, blocks out. Pure arithmetic, so it can be made before a weight is loaded.

    usable     = device_limit x fraction
    kv_budget  = usable - model_memory - overhead - state_memory
    num_blocks = kv_budget // per_block_bytes

A cache group either grows with the sequence (``full``, ``latent``: they share the blocks counted
here), or needs the same however long the sequence gets (``sliding``: the pages of its window;
``state``: one slot), or needs nothing (``shared``: it reads another group's pages). The overhead
of a step follows ``max_model_len``, so a shorter length leaves more for the cache.
"""

import bisect
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from engine.errors import ConfigError, MemoryPlanError
from engine.memory.cache_spec import KVCacheSpec, ceil_div
from engine.memory.plan import MemoryPlan, PlanInputs, breakdown
from engine.params.engine_args import DEFAULT_MEMORY_FRACTION, MAX_NUM_SEQS_LIMIT, option_value
from engine.params.flag_values import Auto
from engine.params.kv_dtype import kv_cache_dtype as known_kv_cache_dtype
from engine.params.kv_dtype import unquantized_note
from engine.params.sizes import gib

MIN_BLOCKS = 16
"""Fewer blocks than this are refused (vllm-metal's PAGED_ATTENTION_MIN_BLOCKS)."""
TYPICAL_SEQUENCE_LENGTH = 2048
"""Assumed sequence length, in tokens, when ``max_num_seqs`` is chosen automatically."""
_SEQUENCES_PER_CHECKPOINT = 8
"""Checkpoints are reserved at this rate, for when all sequences run; idle slots hold checkpoints too."""
MIN_POOL_BLOCKS = 64
"""Blocks of the smallest pool."""
_VLLM_HELP = "https://docs.vllm.ai/en/latest/configuration/conserving_memory/"


def plan_memory(inputs: PlanInputs) -> MemoryPlan:
    """Divide the device's memory. Raises :class:`MemoryPlanError` if nothing useful fits.

    ``max_model_len`` None is the model's context length; "auto" the longest that fits, and where states are
    kept one checkpoint with it. ``max_num_seqs`` "auto" is the largest number, up to 256, that the budget
    carries at 2048 tokens each and a step of ``max_num_batched_tokens`` takes, and never an error while one
    sequence fits.
    """
    inputs.check()
    need = _Need(tuple(_billed_in(inputs.groups, inputs.kv_cache_dtype)), inputs)
    plan = _divide(need)
    _refuse_what_does_not_fit(plan, _Shortage(plan, need, plan.usable - plan.model_memory - plan.overhead))
    return plan


def _divide(need: "_Need") -> MemoryPlan:
    """The plan, whether or not it is usable."""
    asked = need.asked
    usable = int(asked.device_limit * asked.fraction)
    room = usable - asked.model_memory
    fits = need.longest(room)
    if asked.max_model_len == "auto":
        length = max(need.longest_with_checkpoint(room), 1)
    else:
        length = asked.max_model_len or asked.context_length
    overhead = asked.step_cost(length)
    available = room - overhead
    num_seqs = asked.fewest_seqs
    if asked.max_num_seqs == "auto":
        most = need.most_sequences(available, length, TYPICAL_SEQUENCE_LENGTH)
        num_seqs = max(1, min(most, asked.max_num_batched_tokens or MAX_NUM_SEQS_LIMIT))
    num_checkpoints = need.num_checkpoints(available, length, num_seqs) if asked.prefix_caching else 0
    kv_budget = available - need.fixed(length, num_seqs) - num_checkpoints * need.state
    num_blocks = need.num_blocks(kv_budget, length, num_seqs)
    return MemoryPlan(
        device_limit=asked.device_limit,
        fraction=asked.fraction,
        usable=usable,
        model_memory=asked.model_memory,
        overhead=overhead,
        kv_budget=kv_budget,
        per_block_bytes=need.per_block_bytes,
        block_size=asked.block_size,
        num_blocks=num_blocks,
        max_tokens_cached=num_blocks * asked.block_size,
        state_bytes_per_seq=need.each(length),
        max_num_seqs=num_seqs,
        max_model_len=length,
        kv_bytes_at_max_len=need.growing(length) + need.each(length),
        max_model_len_that_fits=fits,
        groups=need.groups,
        inputs=asked,
        num_checkpoints=num_checkpoints,
    )


def what_if(
    plan: MemoryPlan,
    *,
    fraction: float | Auto | None = None,
    max_model_len: int | Auto | None = None,
    max_num_seqs: int | Auto | None = None,
    kv_cache_dtype: str | None = None,
) -> MemoryPlan:
    """``plan`` as it would be with other settings; what is not given stays as it was asked for.

    Arithmetic only: weights, the overhead of a step and the device stay those of ``plan``. Raises
    :class:`MemoryPlanError`, with the longest sequence that would fit, if the result does not fit, and
    :class:`ConfigError` for values out of range.
    """
    given = {
        "fraction": option_value("gpu_memory_utilization", fraction),
        "max_model_len": option_value("max_model_len", max_model_len),
        "max_num_seqs": option_value("max_num_seqs", max_num_seqs),
        "kv_cache_dtype": None if kv_cache_dtype is None else known_kv_cache_dtype(kv_cache_dtype),
    }
    changes = {name: value for name, value in given.items() if value is not None}
    if "fraction" in changes:
        changes["memory_flag"] = "memory_fraction"
        changes["fraction"] = DEFAULT_MEMORY_FRACTION if changes["fraction"] == "auto" else float(changes["fraction"])
    inputs = replace(plan.inputs, **changes)
    _check_settings(inputs)
    return plan_memory(inputs)


def _billed_in(groups: Sequence[KVCacheSpec], kv_cache_dtype: str) -> Sequence[KVCacheSpec]:
    if kv_cache_dtype == "auto":
        return groups
    pages_note(groups, kv_cache_dtype)
    return [group.with_kv_cache_dtype(kv_cache_dtype) for group in groups]


def pages_note(groups: Sequence[KVCacheSpec], kv_cache_dtype: str) -> str | None:
    """A line for the user where pages of ``kv_cache_dtype`` leave something unquantized. Raises ConfigError for all."""
    return unquantized_note(kv_cache_dtype, (vectors.length for group in groups for vectors in group.vectors))


def next_pool_size(current: int, needed: int, limit: int) -> int:
    """Blocks to grow a pool of ``current`` blocks to, so that ``needed`` fit; never above ``limit``.

    At least doubles, so that a pool is copied O(log n) times. Grow one layer after the other: then old
    and new arrays of one layer only are alive together, and the budget holds.
    """
    assert needed <= limit, f"{needed} blocks of a pool limited to {limit}"
    if needed <= current:
        return current
    return min(limit, max(needed, 2 * current, MIN_POOL_BLOCKS))


@dataclass(frozen=True, slots=True)
class _Need:
    """What sequences need in ``groups``, which are billed as they are kept."""

    groups: tuple[KVCacheSpec, ...]
    asked: PlanInputs

    @property
    def per_block_bytes(self) -> int:
        return self.asked.block_size * sum(group.bytes_per_token for group in self.groups if group.grows)

    def growing(self, length: int) -> int:
        return ceil_div(length, self.asked.block_size) * self.per_block_bytes

    def each(self, length: int) -> int:
        """Bytes of one sequence's windows and states."""
        return sum(group.bytes_per_sequence(length) for group in self.groups if not group.grows)

    def fixed(self, length: int, num_seqs: int) -> int:
        """Bytes of the windows and states of ``num_seqs`` sequences, and of what a step runs ahead of them."""
        return sum(
            group.blocks_of(num_seqs, length) * group.bytes_per_block for group in self.groups if not group.grows
        )

    @property
    def state(self) -> int:
        return sum(group.bytes_per_block for group in self.groups if group.recurrent)

    def num_checkpoints(self, available: int, length: int, num_seqs: int) -> int:
        """States to keep besides those of ``num_seqs`` sequences: a few, and none where they would cost a sequence."""
        if not self.state:
            return 0
        left = available - self.fixed(length, num_seqs) - self.blocks_of_one(length)
        return max(0, min(1 + num_seqs // _SEQUENCES_PER_CHECKPOINT, left // self.state))

    def longest(self, room: int) -> int:
        """Most tokens of one sequence, where all that must have slots have them; 0 for none."""
        lengths, num_seqs = range(1, self.asked.context_length + 1), self.asked.fewest_seqs
        return bisect.bisect_right(
            lengths, room, key=lambda n: self.blocks_of_one(n) + self.fixed(n, num_seqs) + self.asked.step_cost(n)
        )

    def longest_with_checkpoint(self, room: int) -> int:
        """:meth:`longest` with one state kept for the prefix cache, unless nothing fits then."""
        kept = self.state if self.asked.prefix_caching else 0
        return self.longest(room - kept) or self.longest(room)

    def most_sequences(self, available: int, length: int, typical: int) -> int:
        """Most sequences of ``typical`` tokens that fit, one of ``length`` tokens included."""
        each, one = self.growing(min(length, typical)), self.blocks_of_one(length)
        numbers = range(1, max(MAX_NUM_SEQS_LIMIT, self.asked.fewest_seqs) + 1)
        return bisect.bisect_right(numbers, available, key=lambda n: self.fixed(length, n) + max(n * each, one))

    def blocks_of_one(self, length: int) -> int:
        """Bytes of the least blocks with which a sequence of ``length`` tokens can run."""
        return max(self.growing(length), MIN_BLOCKS * self.per_block_bytes)

    def num_blocks(self, kv_budget: int, length: int, num_seqs: int) -> int:
        """Blocks that ``kv_budget`` holds; where no group grows, blocks are bookkeeping and cost nothing."""
        if not self.per_block_bytes:
            return max(MIN_BLOCKS, num_seqs * ceil_div(length, self.asked.block_size))
        return max(0, kv_budget // self.per_block_bytes)


@dataclass(frozen=True, slots=True)
class _Shortage:
    """What an error says of a plan that does not fit; ``available``: bytes left after weights and overhead."""

    plan: MemoryPlan
    need: _Need
    available: int

    @property
    def num_seqs_that_fit(self) -> int:
        """Sequences that have their windows and states while one of them grows to ``max_model_len``."""
        fits = self.need.most_sequences(self.available, self.plan.max_model_len, 0)
        return fits if self.plan.state_bytes_per_seq else min(fits, 1)

    @property
    def fewer_seqs(self) -> str:
        """``max_num_seqs to 12 or less`` where the user asked for too many and fewer would do."""
        asked, fits = self.plan.inputs.max_num_seqs, self.num_seqs_that_fit
        return f"max_num_seqs to {fits} or less" if asked != "auto" and 0 < fits < asked else ""

    def error(self, message: str) -> MemoryPlanError:
        """The error with every number of the plan, what is missing and the sequences that would fit."""
        plan = self.plan
        numbers: dict[str, Any] = asdict(plan) | {"groups": plan.groups, "inputs": plan.inputs}
        needed = plan.state_memory + self.need.blocks_of_one(plan.max_model_len)
        return MemoryPlanError(
            message,
            flag=plan.inputs.memory_flag,
            short_by=needed - self.available,
            max_num_seqs_that_fits=self.num_seqs_that_fit,
            **numbers,
        )


def _check_settings(inputs: PlanInputs) -> None:
    """Refuse what no plan can be made with. Lengths beyond the model's context are :func:`plan_memory`'s."""
    fraction = inputs.fraction
    if not 0 < fraction <= 1:
        raise ConfigError(f"fraction {fraction}: must be (0, 1]", flag="fraction", value=fraction, allowed="(0, 1]")
    for name, value in (("max_model_len", inputs.max_model_len), ("max_num_seqs", inputs.max_num_seqs)):
        if isinstance(value, int) and value < 1:
            raise ConfigError(f"{name} {value}: must be at least 1, or auto", flag=name, value=value, allowed="[1, ∞)")


def _refuse_what_does_not_fit(plan: MemoryPlan, shortage: _Shortage) -> None:
    flag, figures = plan.inputs.memory_flag, breakdown(plan)
    fewer = f"decrease {shortage.fewer_seqs}, " if shortage.fewer_seqs else ""
    if 0 < plan.max_model_len_that_fits < plan.max_model_len:
        fewer = f"decrease max_model_len to {plan.max_model_len_that_fits} or less, {fewer}"
    mitigations = f"Mitigations: increase {flag}, {fewer}use a smaller or more quantized model."
    limited = f" {plan.inputs.limited_by}." if plan.inputs.limited_by else ""
    mitigations += limited
    if plan.kv_budget < 0 or (plan.kv_budget == 0 and plan.per_block_bytes):
        raise shortage.error(f"Paged attention: not enough Metal memory for KV cache. {figures}. {mitigations}")
    if plan.num_blocks < MIN_BLOCKS:
        raise shortage.error(
            f"Paged attention: computed num_blocks too low ({plan.num_blocks} < minimum {MIN_BLOCKS}). "
            f"{figures}, per_block_bytes={plan.per_block_bytes}. {mitigations}"
        )
    available = plan.num_blocks * plan.per_block_bytes + plan.state_bytes_per_seq
    if plan.kv_bytes_at_max_len > available:
        fits = plan.max_model_len_that_fits
        estimate = f"Based on the available memory, the estimated maximum model length is {fits}. " if fits else ""
        fewer = f" or {shortage.fewer_seqs}" if shortage.fewer_seqs else ""
        raise shortage.error(
            f"To serve at least one request with the models's max seq len ({plan.max_model_len}), "
            f"({gib(plan.kv_bytes_at_max_len)} GiB KV cache is needed, which is larger than the available KV cache "
            f"memory ({gib(available)} GiB). {estimate}"
            f"Try increasing `{flag}` or decreasing `max_model_len`{fewer} when initializing the engine. "
            f"See {_VLLM_HELP} for more details.{limited}"
        )
