"""What is measured of this engine, all through ``LLM`` as a user calls it: text is decoded and handed out too."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.core.request import TRACELESS
from engine.llm import LLM
from engine.params.sampling_params import SamplingParams
from engine.runtime.stream import RequestStream
from tests.benchmarks.gpu.steps import gaps, shared_gaps

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


def decode_steps(
    llm: LLM, prompts: Sequence[Sequence[int]], num_steps: int, params: Params = greedy, salt: str = TRACELESS
) -> list[float]:
    """Milliseconds of ``num_steps`` steps in which all prompts' rows decode: the gaps between one row's tokens.

    That row is submitted last, and the others make tokens until it is done. Raises RuntimeError where a row was
    preempted or ended early: then no figure would say what it claims to.
    """
    tokens_ahead = 64 + sum(map(len, prompts)) // 64
    others = [
        llm.submit_prompt(prompt, params(row, num_steps + tokens_ahead), cache_salt=salt)
        for row, prompt in enumerate(prompts[:-1])
    ]
    watched = llm.submit_prompt(prompts[-1], params(len(others), num_steps + 4), cache_salt=salt)
    try:
        times = [time.monotonic() for delta in watched if delta.token_ids]
        if any(stream.finished for stream in others):
            raise RuntimeError("a row ended before the measurement did")
    finally:
        _end(others)
    if any(stream.metrics.num_preemptions for stream in [*others, watched]):
        raise RuntimeError("rows were preempted: the KV pages do not hold them all")
    return shared_gaps(times, [_span(stream) for stream in others])


def first_token(llm: LLM, prompt: Sequence[int]) -> float:
    """Milliseconds from submission to the first token of a prompt that no cache holds."""
    begin = time.monotonic()
    stream = llm.submit_prompt(prompt, greedy(0, 2), cache_salt=TRACELESS)
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
    streams = [llm.submit_prompt(prompt, greedy(0, 40 * num_chunks), cache_salt=TRACELESS) for prompt in running]
    recorder = _Recorder(streams[-1])
    sent: list[RequestStream] = []
    try:
        recorder.wait(4)
        begin = time.monotonic()
        sent.append(llm.submit_prompt(long, greedy(0, 2), cache_salt=TRACELESS))
        waited = None
        if short is not None:
            recorder.wait(len(recorder.times) + max(1, num_chunks // 2))
            asked = time.monotonic()
            sent.append(llm.submit_prompt(short, greedy(0, 2), cache_salt=TRACELESS))
            next(sent[-1])
            waited = 1000 * (time.monotonic() - asked)
        next(sent[0])
        end = time.monotonic()
        recorder.wait(len(recorder.times) + 1)
    finally:
        _end([*streams, *sent])
        recorder.join()
    times = recorder.times
    # From the last token before the long prompt on, the step that it ends in included.
    first = max(0, sum(moment < begin for moment in times) - 1)
    last = sum(moment <= end for moment in times) + 1
    return BesideLong(gaps(times[first:last]), waited)


class _Recorder:
    """Takes a stream's tokens on a thread of its own and keeps when each came."""

    def __init__(self, stream: RequestStream) -> None:
        self.times: list[float] = []
        self._stream = stream
        self._thread = threading.Thread(target=self._take, daemon=True)
        self._thread.start()

    def _take(self) -> None:
        for delta in self._stream:
            if delta.token_ids:
                self.times.append(time.monotonic())

    def wait(self, num_tokens: int) -> None:
        """Until so many tokens came. Raises RuntimeError where the stream ends before."""
        while len(self.times) < num_tokens:
            if not self._thread.is_alive() and len(self.times) < num_tokens:
                raise RuntimeError("a running request ended before the measurement did")
            time.sleep(_POLL)

    def join(self) -> None:
        """Until the stream is over."""
        self._thread.join()


def _span(stream: RequestStream) -> tuple[float, float]:
    first, last = stream.metrics.first_token_time, stream.metrics.last_token_time
    if first is None or last is None:
        raise RuntimeError("a row made no token")
    return first, last


def _end(streams: Sequence[RequestStream]) -> None:
    for stream in streams:
        stream.abort()
    for stream in streams:
        stream.result()
