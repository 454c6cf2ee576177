"""How fast the loaded model is: prompts, first tokens, and decoding at several batch sizes, in bounded time."""

import itertools
import os
import platform
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from engine.errors import ConfigError
from engine.memory.roofline import decode_reached, prompt_reached
from engine.outputs import RequestOutput, StepTotals
from engine.params.sampling_params import SamplingParams
from engine.runner.kv.attention_path import AttentionPath
from engine.runner.kv.attention_path import describe as describe_attention
from engine.runtime.stream import RequestStream

DEFAULT_SECONDS = 20.0
DEFAULT_BATCHES = (1, 2, 4, 8, 16)
PROMPT_LENGTHS = (128, 512, 2048, 8192)
DECODE_PROMPT = 32
"""Prompt tokens of the requests that measure decoding."""
MAX_DECODE_TOKENS = 256
PREFILL_SHARE = 0.4
"""Share of the time that prompts may take."""
_REPEATS = 3
_PACKAGES = ("vm-magic", "mlx", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13", "mlx-metal", "mlx-lm")
_POLL = 0.05


class Benched(Protocol):
    """What of :class:`engine.llm.LLM` is measured."""

    plan: Any
    args: Any
    attention_paths: tuple[AttentionPath, ...]
    gauge: Any

    def submit_prompt(self, prompt: str | Sequence[int], params: SamplingParams, *, traceless: bool) -> RequestStream:
        """Queue a request."""

    def stats(self) -> Any:
        """Requests and blocks now."""


@dataclass(frozen=True)
class BenchRow:
    """One measurement. Rates are in tokens per second; ``tokens_per_second`` is that of the whole batch.

    ``seconds_to_first_token`` is the median over repeats or over the batch. ``share``: of the device's best, as
    measured before, by bytes of memory (decodes) or by what bounds a prompt; None where that is not known.
    """

    case: str
    prompt_tokens: int
    batch: int
    seconds_to_first_token: float
    tokens_per_second: float
    tokens: int
    share: float | None = None

    @property
    def per_request(self) -> float:
        """Tokens per second that one request sees."""
        return self.tokens_per_second / self.batch


@dataclass
class BenchResult:
    """Rows as they were measured, and what they depend on. ``complete`` is False until all is measured."""

    facts: Mapping[str, str]
    rows: list[BenchRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    complete: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for a file."""
        rows = [{name: getattr(row, name) for name in BenchRow.__dataclass_fields__} for row in self.rows]
        return {"facts": dict(self.facts), "rows": rows, "notes": list(self.notes), "complete": self.complete}


class Bench:
    """Measures ``llm`` for about ``seconds``. Its requests fill no prefix cache and are not remembered.

    Raises ConfigError for values out of range. Iterating :meth:`run` gives rows as they come, all in ``result``.
    """

    def __init__(
        self,
        llm: Benched,
        device: str,
        vocab_size: int,
        *,
        seconds: float = DEFAULT_SECONDS,
        batch_sizes: Sequence[int] = DEFAULT_BATCHES,
    ) -> None:
        if not 1 <= seconds <= 3600:
            raise ConfigError(f"--seconds {seconds:g}: must be from 1 to 3600", flag="seconds")
        most = llm.plan.max_num_seqs
        self._batches = sorted(size for size in set(batch_sizes) if size <= most)
        if not self._batches or self._batches[0] < 1:
            raise ConfigError(f"--batch: sizes must be from 1 to max_num_seqs ({most})", flag="batch")
        self._llm, self._vocab_size, self._seconds = llm, vocab_size, seconds
        self._random = random.Random(0)
        self._deadline = 0.0
        stats = llm.stats()
        self._room = (stats.num_free_blocks or stats.num_blocks) * llm.plan.block_size
        self.result = BenchResult(describe(llm, device))
        if stats.num_running or stats.num_waiting:
            self.result.notes.append("other requests were running: the figures include their load")
        if len(self._batches) < len(set(batch_sizes)):
            self.result.notes.append(f"batches above max_num_seqs ({most}) are left out")

    def run(self) -> Iterator[BenchRow]:
        """Measure; however it is left, its requests are ended."""
        self._deadline = time.monotonic() + self._seconds
        self._first_tokens([self._prompt(DECODE_PROMPT)])
        if self._llm.gauge.measure() is None:
            self.result.notes.append(f"shares of the device's best are left out: {self._llm.gauge.missing}")
        for row in itertools.chain(self._prefill(), self._decode()):
            self.result.rows.append(row)
            yield row
        self.result.complete = True

    def _prefill(self) -> Iterator[BenchRow]:
        end = time.monotonic() + self._seconds * PREFILL_SHARE
        limit = min(self._llm.plan.max_model_len - 2, self._room)
        lengths = [length for length in PROMPT_LENGTHS if length <= limit] or [max(1, limit)]
        rate = 0.0
        for length in lengths:
            if rate and time.monotonic() + length / rate > end:
                self.result.notes.append(f"prompts from {length} tokens on are left out: more --seconds measure them")
                return
            measured = [self._first_tokens([self._prompt(length)])[0]]
            while len(measured) < _REPEATS and time.monotonic() + measured[0][0] < end:
                measured += self._first_tokens([self._prompt(length)])
            typical, output = sorted(measured, key=lambda one: one[0])[len(measured) // 2]
            rate = length / typical
            yield BenchRow("prefill", length, 1, typical, rate, length * len(measured), self._share([output]))

    def _decode(self) -> Iterator[BenchRow]:
        begin, left = time.monotonic(), self._deadline - time.monotonic()
        for number, batch in enumerate(self._batches, 1):
            tokens = min(
                MAX_DECODE_TOKENS, self._room // batch - DECODE_PROMPT, self._llm.plan.max_model_len - DECODE_PROMPT
            )
            until = begin + left * number / len(self._batches)
            if number == 1:  # one reader's speed is worth running over
                until = max(until, begin + 0.25 * self._seconds)
            if tokens < 8:
                self.result.notes.append(f"batches from {batch} on are left out: no free blocks for them")
                return
            row = self._decode_batch(batch, tokens, until)
            if row is None:
                self.result.notes.append(f"batches from {batch} on are left out: more --seconds measure them")
                return
            yield row

    def _decode_batch(self, batch: int, tokens: int, until: float) -> BenchRow | None:
        """Decode until all are done or it is ``until``; None if too few tokens came to say anything."""
        streams = self._submit([self._prompt(DECODE_PROMPT) for _ in range(batch)], tokens)
        self._wait(streams, until)
        outputs = [stream.snapshot() for stream in streams]
        counts = [len(output.outputs[0].token_ids) for output in outputs]
        rates = [out.metrics.decode_rate(n) if out.metrics else None for out, n in zip(outputs, counts, strict=True)]
        known = [rate for rate in rates if rate is not None]
        if len(known) < batch:
            return None
        firsts = [out.metrics.time_to_first_token or 0.0 for out in outputs if out.metrics]
        first = statistics.median(firsts)
        return BenchRow("decode", DECODE_PROMPT, batch, first, sum(known), sum(counts), self._share(outputs))

    def _share(self, outputs: Sequence[RequestOutput]) -> float | None:
        """Of the device's best: what the steps reached between the last first token and the first last one, or, of a
        prompt alone, up to its token."""
        device, facts = self._llm.gauge.device, self._llm.gauge.facts(self._llm.plan)
        marks = [output.metrics for output in outputs if output.metrics is not None]
        if device is None or facts is None or not marks:
            return None
        first = max((one.steps_first or StepTotals() for one in marks), key=lambda totals: totals.prompts)
        last = min((one.steps_last or StepTotals() for one in marks), key=lambda totals: totals.decodes)
        groups = self._llm.plan.groups
        reached = decode_reached(last.since(first), facts.work, groups, device)
        if reached is None and len(marks) == 1 and marks[0].steps_before is not None:
            reached = prompt_reached(first.since(marks[0].steps_before), facts.work, groups, device)
        return None if reached is None else reached.share

    def _first_tokens(self, prompts: list[list[int]]) -> list[tuple[float, RequestOutput]]:
        """Seconds to each prompt's first token, and what came of it."""
        streams = self._submit(prompts, 1)
        self._wait(streams, None)
        return [(stream.metrics.time_to_first_token or 0.0, stream.snapshot()) for stream in streams]

    def _submit(self, prompts: list[list[int]], max_tokens: int) -> list[RequestStream]:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        return [self._llm.submit_prompt(prompt, params, traceless=True) for prompt in prompts]

    @staticmethod
    def _wait(streams: list[RequestStream], until: float | None) -> None:
        """Until all are over, or it is ``until``; then, or when interrupted, end what runs."""
        try:
            while any(not stream.finished for stream in streams):
                if until is not None and time.monotonic() >= until:
                    break
                next(stream for stream in streams if not stream.finished).drain(_POLL)
        finally:
            for stream in streams:
                stream.abort()
        for stream in streams:
            stream.result()

    def _prompt(self, length: int) -> list[int]:
        """Random tokens, which no cache holds."""
        return self._random.choices(range(self._vocab_size), k=length)


def describe(llm: Benched, device: str) -> dict[str, str]:
    """What speed depends on: the machine, versions and settings."""
    plan, args = llm.plan, llm.args
    settings = {
        "dtype": args.dtype,
        "kv_cache_dtype": args.kv_cache_dtype,
        "max_model_len": plan.max_model_len,
        "max_num_seqs": plan.max_num_seqs,
        "block_size": plan.block_size,
        "paged": args.use_paged_attention,
    }
    return {
        "model": args.names[0],
        "device": device,
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "versions": installed_versions(),
        "settings": ", ".join(f"{name}={value}" for name, value in settings.items()),
        "attention": describe_attention(llm.attention_paths),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def processor() -> str:
    """The processor's name, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def installed_versions() -> str:
    """Python's version and those of the packages that speed depends on."""
    return ", ".join([f"Python {platform.python_version()}", *_versions()])


def _versions() -> Iterator[str]:
    for name in _PACKAGES:
        try:
            yield f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
