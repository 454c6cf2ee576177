"""Prompts shared between the same model on two devices, beside one: what ``LLM.map(replicas=…)`` gains."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import mlx.core as mx

from engine.batch.choices import AnswerForm
from engine.batch.map import Answer, Earlier, MapClient, MapRun, ProgressBar
from engine.batch.prompt_table import Task
from engine.batch.replicas import FormClient, Member, Replicas, replicated
from engine.runner.device.placement import device_names
from tests.benchmarks.gpu.engines import Engines
from tests.benchmarks.gpu.servers import text_prompts
from tests.benchmarks.harness import Case, Result, take_turns

ONE, TWO = "LLM", "LLM and a replica"
_WANTED = 1.9


def replica_results(engines: Engines) -> Iterator[Result]:
    """Output tokens a second once both have loaded the model; nothing where there is one GPU."""
    names = two_devices()
    if names is None:
        print("  one GPU here: left out", flush=True)
        return
    sizes = engines.sizes
    llm = engines.ours()
    params = {"temperature": 0, "max_tokens": sizes.client_tokens, "ignore_eos": True}
    form = AnswerForm(raw=True)
    own = form.of(llm, params)[0]

    def rate(client: MapClient, rows: int) -> list[float]:
        texts = text_prompts(engines.prompts(rows, sizes.replica_context))
        return [tokens_per_second(client, texts, params)]

    with replicated(names, own, llm, FormClient(form, params)) as both:
        assert isinstance(both, Replicas), "two devices"
        both.wait()
        for client in (own, both):  # each one's first prompts compile: a full batch and one that takes its place
            rate(client, min(client.look_ahead, sizes.replica_rows))
        shares = Shares(both)

        def shared() -> list[float]:
            with shares.counted():
                return rate(both, sizes.replica_rows)

        samples = take_turns({TWO: shared, ONE: lambda: rate(own, sizes.replica_rows)}, sizes.long_repeats)
    facts = {"kind": "replicas", "devices": names, "rows": sizes.replica_rows, "context": sizes.replica_context,
             "num_tokens": sizes.client_tokens, "shares": shares.last()}  # fmt: skip
    yield Result(Case("replicas, two devices", "tokens/s", "higher", {}, facts, _WANTED), samples)


def two_devices() -> list[str] | None:
    """This process's GPU and another; where MLX computes on the CPU, that twice."""
    if not mx.cuda.is_available():
        return ["cpu", "cpu"]
    gpus = [name for name in device_names() if name.startswith("cuda:")]
    return gpus[:2] if len(gpus) > 1 else None


def tokens_per_second(client: MapClient, prompts: Sequence[str], params: dict[str, Any]) -> float:
    """Of all ``prompts`` together, handed over as a map does it. Raises RuntimeError where one has no answer."""
    tasks = [Task(label, prompt, params) for label, prompt in enumerate(prompts)]
    run = MapRun(client, ProgressBar(None, shown=False))
    begin = time.perf_counter()
    run.run(tasks, Earlier(None, ()))
    seconds = time.perf_counter() - begin
    num_tokens = 0
    for outcome in run.rows.outcomes:
        if not isinstance(outcome, Answer):
            raise RuntimeError(f"a prompt has no answer: {outcome}")
        num_tokens += outcome.tokens
    return num_tokens / seconds


class Shares:
    """How many prompts each of several models did in a turn, and at which second its last one ended.

    With equal numbers, but one ending late, that one is slow; with unequal ones, they were not fed alike.
    """

    def __init__(self, several: Replicas) -> None:
        self._several = several
        self._done: dict[Member, int] = {}
        self._seconds: dict[Member, float] = {}

    @contextmanager
    def counted(self) -> Iterator[None]:
        """A turn, which forgets the one before."""
        count, begin = self._several.count, time.perf_counter()
        self._done = dict.fromkeys(self._several.members, 0)
        self._seconds = dict.fromkeys(self._several.members, 0.0)

        def noted(member: Member, more: int) -> None:
            count(member, more)
            if more < 0:  # told by the thread on which a prompt ended, always the same for a member
                self._done[member] -= more
                self._seconds[member] = time.perf_counter() - begin

        with patch.object(self._several, "count", noted):
            yield

    def last(self) -> list[tuple[str, int, float]]:
        """Of the last turn: device, prompts, seconds. A list, as two of them may have one name."""
        return [(member.name, done, round(self._seconds[member], 2)) for member, done in self._done.items()]
