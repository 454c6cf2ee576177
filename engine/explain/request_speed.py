"""Why one request was slow: its own waiting, its prompt, what it asked of sampling; and what its steps met."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.explain.request_log import RequestRecord
from engine.explain.speed import (
    Reason,
    Speed,
    SpeedFacts,
    costliest_first,
    decode_line,
    device_reasons,
    estimates,
    ms,
    prompt_line,
    step_reasons,
)
from engine.memory.roofline import DeviceSpeed, decode_reached, prompt_reached
from engine.outputs import RequestMetrics, StepTotals
from engine.params.sampling_params import SamplingParams
from engine.params.structured_outputs import Constraints

_WORTH = 0.1
"""Share of a request's time from which on a part of it is worth a line."""


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """What ``explain`` knows of a request beside its record.

    ``num_known``: leading prompt tokens that an earlier request, number ``nearest``, had too. ``thought_share``:
    of the output's characters, 0 to 1.
    """

    num_cached: int = 0
    num_known: int = 0
    nearest: int | None = None
    caches_nothing: str = ""
    thought_share: float = 0.0


def request_speed(
    record: RequestRecord, request: RequestFacts, facts: SpeedFacts | None, device: DeviceSpeed | None, missing: str
) -> Speed:
    """What steps of ``record`` reached on ``device`` and why not more. Without a device the shares are ``missing``."""
    metrics = record.outcome.metrics
    decoding, prompts = _spans(metrics)
    rate = metrics.decode_rate(sum(len(one.token_ids) for one in record.outcome.completions[:1]))
    decode = prompt = None
    lines: list[str] = []
    if facts is not None and device is not None:
        decode = decode_reached(decoding, facts.work, facts.plan.groups, device)
        prompt = prompt_reached(prompts, facts.work, facts.plan.groups, device)
        lines += [] if decode is None else [decode_line(decode, device, rate)]
        lines += [] if prompt is None else [prompt_line(prompt, device, prompts.prompt_tokens)]
    reasons = list(_own_reasons(record, request, facts))
    reasons += step_reasons(decoding, decode, _seconds(metrics.first_token_time, metrics.last_token_time))
    if facts is not None:
        reasons += device_reasons(facts, decode, device)
    told = () if facts is None or decode is None else tuple(estimates(facts))
    return Speed(decode, prompt, tuple(lines), tuple(costliest_first(reasons)), told, "" if lines else missing)


def _spans(metrics: RequestMetrics) -> tuple[StepTotals, StepTotals]:
    """The steps after the first token, and those up to it, of all requests that were in them."""
    before, first, last = metrics.steps_before, metrics.steps_first, metrics.steps_last
    decoding = last.since(first) if first is not None and last is not None else StepTotals()
    until = first or last
    return decoding, until.since(before) if until is not None and before is not None else StepTotals()


def _own_reasons(record: RequestRecord, request: RequestFacts, facts: SpeedFacts | None) -> Iterator[Reason]:
    """What the request itself met and asked for."""
    metrics = record.outcome.metrics
    whole = _seconds(metrics.arrival_time, metrics.last_token_time) or 0.0
    queue = metrics.queue_time or 0.0
    if whole and queue >= _WORTH * whole:
        most = "" if facts is None else f" (max_num_seqs {facts.plan.max_num_seqs:,})"
        what = f"it waited {ms(queue)} behind other requests{most}"
        yield Reason(what, "set max_num_seqs=N, or more memory, lets more run at once", queue)
    if metrics.num_preemptions:
        times = "once" if metrics.num_preemptions == 1 else f"{metrics.num_preemptions} times"
        what = f"it lost its KV blocks to other requests {times} and was computed again"
        yield Reason(what, "set memory_fraction=N or max_num_seqs=N")
    prefill = _seconds(metrics.scheduled_time, metrics.first_token_time) or 0.0
    if whole and prefill >= _WORTH * whole:
        yield from _prompt_reasons(record, request, prefill)
    on_gpu = facts is not None and not facts.on_cpu
    yield from sampling_reasons(record.params, record.constraints, kernels=on_gpu)
    if request.thought_share >= _WORTH:
        decode = _seconds(metrics.first_token_time, metrics.last_token_time)
        what = f"about {request.thought_share:.0%} of the output was thought"
        seconds = None if decode is None else request.thought_share * decode
        yield Reason(what, "--no-think or --thinking-token-budget N, where the model can", seconds)


def _prompt_reasons(record: RequestRecord, request: RequestFacts, prefill: float) -> Iterator[Reason]:
    """Tokens that were computed though they could have been found."""
    computed = len(record.prompt_token_ids) - request.num_cached
    again = request.num_known - request.num_cached
    if request.caches_nothing and request.num_known:
        yield Reason(
            f"{request.num_known:,} prompt tokens of request {request.nearest} were computed again "
            f"({request.caches_nothing})",
            "" if "contiguous" in request.caches_nothing else "leave out --no-enable-prefix-caching",
            prefill * min(1.0, request.num_known / max(1, computed)),
        )
    elif again >= max(64, 0.2 * computed):
        yield Reason(
            f"{again:,} prompt tokens were known from request {request.nearest} and not in the cache any more",
            "more memory for the KV cache (set memory_fraction=N)",
            prefill * again / max(1, computed),
        )
    elif request.nearest is not None and computed >= 256 and request.num_known < 0.5 * len(record.prompt_token_ids):
        what = f"{computed:,} prompt tokens were new"
        if request.num_known:
            what += f": the prompt differs from all before after {request.num_known:,} tokens"
        yield Reason(what, "what stays the same goes first, what changes last", prefill)


def sampling_reasons(params: SamplingParams, constraints: Constraints | None, *, kernels: bool) -> Iterator[Reason]:
    """What a request asked of sampling that costs each step more. ``kernels``: others are sampled in one launch."""
    if constraints is not None and constraints.structured is not None:
        yield Reason("each token waits for the grammar's choice after the one before", "a format only where it matters")
    if params.logprobs is not None:
        yield Reason("log-probabilities of the whole vocabulary were computed each step", "without logprobs")
    if params.prompt_logprobs is not None:
        yield Reason("log-probabilities of the whole prompt were asked for, which nothing in the cache serves")
    if not kernels:
        return
    asked = [name for name, value in (("repetition_penalty", params.repetition_penalty),) if value != 1.0]
    asked += [name for name in ("logit_bias", "allowed_token_ids", "bad_words", "min_tokens") if getattr(params, name)]
    if asked:
        need = "need" if len(asked) > 1 else "needs"
        yield Reason(
            f"{', '.join(asked)} {need} operations of MLX's beside the sampling kernel",
            f"drop {' and '.join(asked)}" + (", or take presence_penalty" if "repetition_penalty" in asked else ""),
        )


def _seconds(begin: float | None, end: float | None) -> float | None:
    return None if begin is None or end is None else max(0.0, end - begin)


def thought_share(texts: Sequence[tuple[str | None, str]]) -> float:
    """Of (reasoning, content) of each completion: the share of characters that were thought."""
    thought = sum(len(reasoning or "") for reasoning, _ in texts)
    whole = thought + sum(len(content) for _, content in texts)
    return thought / whole if whole else 0.0
