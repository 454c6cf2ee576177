"""Why a request went as it did: values with their sources, the cache hit and where it ended, raw and parsed output."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from engine.chat.reply import read_whole
from engine.errors import RequestError
from engine.explain.gauge import NOT_MEASURED, SpeedGauge
from engine.explain.request_log import RequestLog, RequestRecord, common_prefix
from engine.explain.request_speed import RequestFacts, request_speed, thought_share
from engine.explain.speed import Speed, SpeedFacts
from engine.memory.plan import MemoryPlan
from engine.memory.roofline import DeviceSpeed
from engine.params.sampling_params import COMMON, CONSTRAINTS, SamplingParams
from engine.params.structured_outputs import Constraints, ToolCalls
from engine.runner.kv.attention_path import AttentionPath, describe
from engine.text.guide.structured_output_manager import grammar_notes
from engine.text.tokens.token_texts import token_texts
from engine.text.tokens.tokenizer import Tokenizer

_CONTEXT = 6
"""Tokens of context before a divergence."""
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class SamplingValue:
    """One sampling value and where it came from."""

    name: str
    value: Any
    source: str


@dataclass(frozen=True)
class CacheHit:
    """What of the prompt was found in the prefix cache, and why not more.

    ``num_shared_tokens`` is the longest beginning in common with an earlier request that is still
    remembered, ``nearest`` that request's number. Where the two part, ``here`` and ``there`` are
    the texts that end in the first token that differs.
    """

    num_prompt_tokens: int
    num_cached_tokens: int
    num_shared_tokens: int
    reason: str
    nearest: int | None = None
    here: str | None = None
    there: str | None = None


@dataclass(frozen=True)
class Output:
    """One completion: the text as generated (special tokens visible) beside what the parsers made of it.

    ``thinking_cut`` as in :class:`engine.outputs.CompletionOutput`.
    """

    raw: str
    content: str
    reasoning: str | None
    tool_calls: tuple[Mapping[str, Any], ...]
    num_tokens: int
    finish_reason: str | None
    stop: str
    thinking_cut: str | None = None


@dataclass(frozen=True)
class Explanation:
    """One request, explained. Times are seconds, None where the request did not get so far."""

    number: int
    request_id: str
    prompt: str
    prompt_token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    sampling: tuple[SamplingValue, ...]
    thinking: tuple[SamplingValue, ...]
    """What the chat template was given, such as ``enable_thinking``, and the thinking budget."""
    constraints: tuple[str, ...]
    cache: CacheHit
    attention: str
    """What read the KV cache, layers by layers."""
    outputs: tuple[Output, ...]
    queue_time: float | None
    prefill_time: float | None
    decode_time: float | None
    num_preemptions: int
    finished: bool
    error: str | None
    notes: tuple[str, ...] = ()
    """What was left out of the request, or read otherwise than it says."""
    speed: Speed = dataclasses.field(default_factory=Speed)
    """How near its steps came to the device's best, and why not nearer."""


@dataclass(frozen=True)
class Explainer:
    """What is needed of an engine to explain its requests.

    ``decode`` keeps special tokens. ``no_caching`` says why nothing is ever cached, or is empty. ``recurrent``: some
    layers have a state, which is reused only where a checkpoint of it was kept. ``attention``: what reads their caches.
    ``device`` is None where it was not measured, for the reason in ``not_measured``.
    """

    log: RequestLog
    decode: Decode
    token_text: Callable[[int], str]
    eos_token_ids: frozenset[int]
    block_size: int
    no_caching: str = ""
    recurrent: bool = False
    attention: str = ""
    speed_facts: SpeedFacts | None = None
    device: DeviceSpeed | None = None
    not_measured: str = NOT_MEASURED

    @classmethod
    def of_model(
        cls,
        log: RequestLog,
        tokenizer: Tokenizer,
        plan: MemoryPlan,
        *,
        attention_paths: Sequence[AttentionPath],
        eos_token_ids: frozenset[int],
        caching_wanted: bool,
        reuses_prefixes: bool,
        gauge: SpeedGauge,
    ) -> Self:
        """``caching_wanted`` is what the flag says, ``reuses_prefixes`` whether the engine does."""
        why = "prefix caching is off (--no-enable-prefix-caching)"
        if caching_wanted and not reuses_prefixes:
            why = "this model runs on mlx-lm's contiguous caches, which keep nothing between requests"
        return cls(
            log=log,
            decode=lambda token_ids: tokenizer.decode(token_ids, skip_special_tokens=False),
            token_text=tokenizer.token_text,
            eos_token_ids=eos_token_ids,
            block_size=plan.block_size,
            no_caching="" if reuses_prefixes else why,
            recurrent=any(group.recurrent for group in plan.groups),
            attention=describe(attention_paths),
            speed_facts=gauge.facts(plan),
            device=gauge.device,
            not_measured=gauge.missing,
        )

    def explain_latest(self, count: int = 1) -> Explanation:
        """The ``count``-th request from the end. Raises RequestError if no such request is remembered."""
        if not isinstance(count, int) or isinstance(count, bool):
            raise RequestError(f"count must be a whole number, got {count!r:.60}", param="count")
        record = self.log.latest(count)
        if record is None:
            known = len(self.log)
            raise RequestError(
                f"there is no request {count} from the end: the latest {known} are remembered"
                if known
                else "there was no request yet: ask something first (%%chat, or a client)",
                param="count",
            )
        return self.explain(record)

    def explain(self, record: RequestRecord) -> Explanation:
        """Everything known of ``record`` now."""
        outcome = record.outcome
        metrics = outcome.metrics
        scheduled, first, last = metrics.scheduled_time, metrics.first_token_time, metrics.last_token_time
        hit = self._cache_hit(record)
        outputs = tuple(self._output(record, i) for i in range(len(outcome.completions)))
        return Explanation(
            number=record.number,
            request_id=record.request_id,
            prompt=record.prompt if record.prompt is not None else self.decode(record.prompt_token_ids),
            prompt_token_ids=tuple(record.prompt_token_ids),
            tokens=tuple(token_texts(record.prompt_token_ids, self.decode)),
            sampling=tuple(sampling_values(record.params, record.max_tokens)),
            thinking=tuple(thinking_values(record)),
            constraints=tuple(constraint_lines(record.constraints)),
            cache=hit,
            attention=self.attention,
            outputs=outputs,
            queue_time=metrics.queue_time,
            prefill_time=None if first is None or scheduled is None else first - scheduled,
            decode_time=None if first is None or last is None else last - first,
            num_preemptions=metrics.num_preemptions,
            finished=outcome.finished,
            error=outcome.error,
            notes=(*record.account.notes, *grammar_notes(record.constraints)),
            speed=self._speed(record, hit, outputs),
        )

    def _speed(self, record: RequestRecord, hit: CacheHit, outputs: Sequence[Output]) -> Speed:
        facts = RequestFacts(
            hit.num_cached_tokens,
            hit.num_shared_tokens,
            hit.nearest,
            self.no_caching,
            thought_share([(output.reasoning, output.content) for output in outputs]),
        )
        return request_speed(record, facts, self.speed_facts, self.device, self.not_measured)

    def _output(self, record: RequestRecord, index: int) -> Output:
        completion = record.outcome.completions[index]
        raw = self.decode(completion.token_ids)
        parsed = read_whole(record.account.new_parser(), completion.text)
        return Output(
            raw,
            parsed.text,
            parsed.reasoning,
            tuple(call["function"] for call in parsed.tool_calls),
            len(completion.token_ids),
            completion.finish_reason,
            self._why_it_stopped(record, index),
            completion.thinking_cut,
        )

    def _why_it_stopped(self, record: RequestRecord, index: int) -> str:
        outcome = record.outcome
        completion = outcome.completions[index]
        reason, stop = completion.finish_reason, completion.stop_reason
        last = completion.token_ids[-1] if completion.token_ids else None
        if outcome.error is not None:
            return f"failed: {outcome.error}"
        if reason is None:
            return "still running"
        if reason == "length":
            return f"max_tokens={record.max_tokens} tokens were generated"
        if reason == "abort":
            return "it was stopped: ■, a client that left, or abort()"
        if reason == "repetition":
            return "it repeated itself (repetition_detection)"
        if isinstance(stop, int):
            return f"the stop token {self.token_text(stop)!r} ({stop}) of stop_token_ids"
        if stop is not None:
            return f"the stop string {stop!r}" if stop in record.params.stop else str(stop)
        if last is not None and last in self.eos_token_ids:
            return f"the model ended its turn with {self.token_text(last)!r} ({last})"
        return reason

    def _cache_hit(self, record: RequestRecord) -> CacheHit:
        prompt, cached = record.prompt_token_ids, record.outcome.num_cached_tokens
        shared, nearest, other = self._nearest(record)
        hit = CacheHit(len(prompt), cached, shared, "", None if nearest is None else nearest.number)
        why = self._why_no_more(record, hit)
        parted = shared < len(prompt) and other is not None and shared < len(other)
        if not parted or other is None:
            return dataclasses.replace(hit, reason=why)
        start = max(0, shared - _CONTEXT)
        here, there = self.decode(prompt[start : shared + 1]), self.decode(other[start : shared + 1])
        return dataclasses.replace(hit, reason=why, here=here, there=there)

    def _nearest(self, record: RequestRecord) -> tuple[int, RequestRecord | None, Sequence[int] | None]:
        """The earlier request that shares most of the prompt: how many tokens, which, and its tokens."""
        best: tuple[int, RequestRecord | None, Sequence[int] | None] = (0, None, None)
        for earlier in self.log.before(record):
            if earlier.cache_salt != record.cache_salt:
                continue
            for tokens in earlier.sequences():
                shared = common_prefix(record.prompt_token_ids, tokens)
                if best[1] is None or shared > best[0]:
                    best = (shared, earlier, tokens)
        return best

    def _why_no_more(self, record: RequestRecord, hit: CacheHit) -> str:
        size = self.block_size
        reusable = (hit.num_prompt_tokens - 1) // size * size
        known = min(hit.num_shared_tokens // size * size, reusable)
        blocks = f"whole blocks of {size} tokens are reused"
        if self.no_caching:
            return self.no_caching
        if record.params.prompt_logprobs is not None:
            return "prompt_logprobs need every prompt token computed"
        if hit.num_cached_tokens >= reusable:
            rest = hit.num_prompt_tokens - hit.num_cached_tokens
            last = f"last {rest:,} tokens are" if rest != 1 else "last token is"
            return f"all there is to reuse: {blocks}, and the {last} computed"
        if hit.nearest is None:
            return "no earlier request is remembered"
        if hit.num_cached_tokens > known:
            return "the hit comes from a request that is no longer remembered"
        if hit.num_cached_tokens < known and self.recurrent:
            cached = hit.num_cached_tokens
            where = f"the last one within them is after {cached}" if cached else "none is within them"
            return (
                f"the first {hit.num_shared_tokens} tokens are those of request {hit.nearest}, but recurrent layers "
                f"can go on only from a checkpoint, and {where}: checkpoints are kept near the ends of prompts and "
                "replies, and where two prompts were seen to part, until their slots are needed"
            )
        if hit.num_cached_tokens < known:
            return (
                f"the first {hit.num_shared_tokens} tokens are those of request {hit.nearest}, but {blocks} only "
                "when they are computed and not yet evicted"
            )
        return f"the first {hit.num_shared_tokens} tokens are those of request {hit.nearest}; {blocks}"


def sampling_values(params: SamplingParams, max_tokens: int) -> list[SamplingValue]:
    """The values that applied: the common ones always, others where they are not the default; constraints apart."""
    result = []
    for field in dataclasses.fields(params):
        if field.name in ("sources", *CONSTRAINTS):
            continue
        value = getattr(params, field.name)
        plain = _is_default(field, value)
        if field.name not in COMMON and plain:
            continue
        source = params.sources.get(field.name, "default" if plain else "SamplingParams")
        if field.name == "max_tokens" and value is None:
            value, source = max_tokens, "default: the rest of the context"
        result.append(SamplingValue(field.name, value, source))
    return sorted(result, key=lambda one: _place(one.name))


def thinking_values(record: RequestRecord) -> list[SamplingValue]:
    """What the chat template was given, where one was rendered, and the thinking budget."""
    found: dict[str, SamplingValue] = {}
    for source, values in record.account.template or ():
        found |= {name: SamplingValue(name, value, source) for name, value in values.items()}
    return [*found.values(), *_budget(record)]


def _budget(record: RequestRecord) -> list[SamplingValue]:
    name = "thinking_token_budget"
    asked = None if record.constraints is None else record.constraints.thinking
    if asked is not None:
        own = record.params.thinking_token_budget is not None
        source = record.params.sources.get(name, "SamplingParams") if own else record.account.source
        return [SamplingValue(name, asked.max_tokens, source)]
    default = record.default_thinking_budget
    return [] if default is None else [SamplingValue(name, default, "set")]


def constraint_lines(constraints: Constraints | None) -> list[str]:
    """What is set of a request's constraints, each in one line."""
    if constraints is None:
        return []
    return [f"{name}: {_set_fields(part)}" for name, part in _fields(constraints) if part is not None]


def _set_fields(part: Any) -> str:
    if isinstance(part, ToolCalls):
        return "instead of it, any of " + ", ".join(str(function["name"]) for function in part.functions)
    return ", ".join(f"{name}={value!r}" for name, value in _fields(part) if value not in (None, False))


def _fields(instance: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(instance, field.name)) for field in dataclasses.fields(instance)]


def _place(name: str) -> int:
    return COMMON.index(name) if name in COMMON else len(COMMON)


def _is_default(field: "dataclasses.Field[Any]", value: object) -> bool:
    factory = field.default_factory
    return bool(value == (field.default if factory is dataclasses.MISSING else factory()))
