"""Prompts shared between the same model on two devices, beside one: what ``LLM.map(replicas=…)`` gains."""

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx

from engine.batch.choices import AnswerForm
from engine.batch.map import MapClient
from engine.batch.replicas import FormClient, Replicas, replicated
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

    def rate(client: MapClient) -> list[float]:
        texts = text_prompts(engines.prompts(sizes.replica_rows, sizes.replica_context))
        return [tokens_per_second(client, texts, params)]

    with replicated(names, own, llm, FormClient(form, params)) as both:
        assert isinstance(both, Replicas), "two devices"
        both.wait()
        for client in (own, both):  # each one's first prompts compile
            rate(client)
        samples = take_turns({TWO: lambda: rate(both), ONE: lambda: rate(own)}, sizes.long_repeats)
    facts = {"kind": "replicas", "devices": names, "rows": sizes.replica_rows, "context": sizes.replica_context,
             "num_tokens": sizes.client_tokens}  # fmt: skip
    yield Result(Case("replicas, two devices", "tokens/s", "higher", {}, facts, _WANTED), samples)


def two_devices() -> list[str] | None:
    """This process's GPU and another; where MLX computes on the CPU, that twice."""
    if not mx.cuda.is_available():
        return ["cpu", "cpu"]
    gpus = [name for name in device_names() if name.startswith("cuda:")]
    return gpus[:2] if len(gpus) > 1 else None


def tokens_per_second(client: MapClient, prompts: Sequence[str], params: dict[str, Any]) -> float:
    """Of all ``prompts`` together, from the first handed over to the last answer. Raises what ended one."""
    begin = time.perf_counter()
    jobs = [client.submit(prompt, params) for prompt in prompts]
    left = threading.Semaphore(0)
    for job in jobs:
        job.stream.add_done_callback(left.release)
    for _ in jobs:
        left.acquire()
    seconds = time.perf_counter() - begin
    return sum(job.answer().tokens for job in jobs) / seconds
