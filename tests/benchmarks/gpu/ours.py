"""What is measured of this engine, all through ``LLM`` as a user calls it: text is decoded and handed out too."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from engine.llm import LLM
from engine.params.sampling_params import SamplingParams
from engine.runtime.stream import RequestStream
from tests.benchmarks.gpu.steps import RAMP, Step, full_steps

Params = Callable[[int, int], SamplingParams]
"""Sampling values of a row, given its number and how many tokens it makes."""
_POLL = 0.0005


def greedy(row: int, num_tokens: int) -> SamplingParams:
    """Every row the same."""
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


def sampled(row: int, num_tokens: int) -> SamplingParams:
    """What Qwen3's makers recommend, with a presence penalty and a seed for each row."""
    return SamplingParams(
        temperature=0.7,
        top_p=0.8,
        top_k=20,
        presence_penalty=1.5,
        seed=row,
        max_tokens=num_tokens,
        ignore_eos=True,
    )


@contextmanager
def recorded(llm: LLM) -> Iterator[list[Step]]:
    """The engine's steps meanwhile, by its own measure of the time between tokens.

    A reader of streams would measure itself as well: where it waits for the interpreter, two tokens come at once.
    """
    steps: list[Step] = []
    metrics = llm.metrics
    observe = metrics.observe_inter_token

    def record(seconds: float, count: int = 1) -> None:
        steps.append(Step(time.monotonic(), seconds, count))
        observe(seconds, count)

    metrics.observe_inter_token = record  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        metrics.observe_inter_token = observe  # type: ignore[method-assign]


def decode_steps(
    llm: LLM, prompts: Sequence[Sequence[int]], num_steps: int, params: Params = greedy, salt: str | None = None
) -> list[float]:
    """Milliseconds of about ``num_steps`` steps in which the rows of all prompts decode and nothing else runs.

    The last prompt's row decides how long; the others make tokens until it is done. Raises RuntimeError where one
    was preempted or ended early: then no figure would say what it claims to.
    """
    trace: dict[str, Any] = {"cache_salt": salt, "traceless": salt is None}
    tokens_ahead = 64 + sum(map(len, prompts)) // 64
    with recorded(llm) as steps:
        others = [
            llm.submit_prompt(prompt, params(row, num_steps + tokens_ahead), **trace)
            for row, prompt in enumerate(prompts[:-1])
        ]
        last = llm.submit_prompt(prompts[-1], params(len(others), num_steps + RAMP + 1), **trace)
        try:
            last.result()
            if any(stream.finished for stream in others):
                raise RuntimeError("a row ended before the measurement did")
        finally:
            _end(others)
    if any(stream.metrics.num_preemptions for stream in [*others, last]):
        raise RuntimeError("rows were preempted: the KV pages do not hold them all")
    return full_steps(steps, len(prompts))


def first_token(llm: LLM, prompt: Sequence[int]) -> float:
    """Milliseconds from submission to the first token of a prompt that no cache holds."""
    begin = time.monotonic()
    stream = llm.submit_prompt(prompt, greedy(0, 2), traceless=True)
    next(stream)
    milliseconds = 1000 * (time.monotonic() - begin)
    stream.result()
    return milliseconds


def first_tokens(llm: LLM, prompts: Sequence[Sequence[int]], salt: str) -> float:
    """Milliseconds until the last of ``prompts``, submitted together, has its first token."""
    begin = time.monotonic()
    streams = [llm.submit_prompt(prompt, greedy(0, 2), cache_salt=salt) for prompt in prompts]
    for stream in streams:
        next(stream)
    milliseconds = 1000 * (time.monotonic() - begin)
    for stream in streams:
        stream.result()
    return milliseconds


@dataclass(frozen=True)
class BesideLong:
    """What happened while a long prompt was worked on, in milliseconds: gaps of a running stream, a short's wait."""

    gaps: list[float]
    short: float | None


def beside_long(
    llm: LLM, running: Sequence[Sequence[int]], long: Sequence[int], num_chunks: int, short: Sequence[int] | None
) -> BesideLong:
    """Let ``running`` decode, send ``long``, and halfway through it ``short``, if there is one."""
    waited, num_rows = None, len(running)
    with recorded(llm) as steps:
        streams = [llm.submit_prompt(prompt, greedy(0, 40 * num_chunks), traceless=True) for prompt in running]
        try:
            _wait(streams[0], steps, num_rows, 4)
            before = len(steps)
            streams.append(llm.submit_prompt(long, greedy(0, 2), traceless=True))
            if short is not None:
                _wait(streams[0], steps, num_rows, max(1, num_chunks // 2), before)
                asked = time.monotonic()
                streams.append(llm.submit_prompt(short, greedy(0, 2), traceless=True))
                next(streams[-1])
                waited = 1000 * (time.monotonic() - asked)
            next(streams[num_rows])
            end = time.monotonic()
            _wait(streams[0], steps, num_rows, 1, len(steps))
        finally:
            _end(streams)
    meanwhile = [step for step in steps[before:] if step.num_rows >= num_rows and step.end - step.seconds <= end]
    return BesideLong([1000 * step.seconds for step in meanwhile], waited)


def _wait(stream: RequestStream, steps: list[Step], num_rows: int, num_steps: int, since: int = 0) -> None:
    """Until there were so many steps of ``num_rows`` rows after the first ``since`` ones.

    Raises RuntimeError where ``stream``, one of the rows, ends before.
    """
    while sum(step.num_rows >= num_rows for step in steps[since:]) < num_steps:
        if stream.finished:
            raise RuntimeError("a running request ended before the measurement did")
        time.sleep(_POLL)


def _end(streams: Sequence[RequestStream]) -> None:
    for stream in streams:
        stream.abort()
    for stream in streams:
        stream.result()
