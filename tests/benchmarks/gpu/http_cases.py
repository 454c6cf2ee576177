"""Streams over HTTP: this engine's port beside the same load in its process, mlx-lm's server, and transformers."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx

from tests.benchmarks.gpu.engines import Engines
from tests.benchmarks.gpu.servers import Served, running, text_prompts
from tests.benchmarks.harness import Case, Result, take_turns
from tests.benchmarks.machine import ROOT

PORT, IN_PROCESS, THEIRS, TORCH = "LLM.serve", "LLM in its process", "mlx_lm.server", "transformers generate_batch"
_TIMES_THEIRS, _SHARE_OF_OURS, _TIMES_TORCH = 3.0, 0.95, 1.0
Rates = Callable[[], Sequence[float]]


def http_results(engines: Engines) -> Iterator[Result]:
    """Output tokens a second of completions that stream at once; each engine in a process of its own, one by one.

    transformers is left out where torch is not installed.
    """
    sizes = engines.sizes
    engines.release()
    folder = engines.folder()
    found: dict[str, list[float]] = {}

    def measure(turns: dict[str, Rates]) -> None:
        take_turns(turns, 1)  # what compiles at first
        found.update(take_turns(turns, sizes.long_repeats))

    def over(served: Served) -> Rates:
        return lambda: [served.over_http(_texts(engines), sizes.client_tokens)]

    with running("ours", folder, engines.options()) as served:
        inside: Rates = lambda: [served.in_process(_texts(engines), sizes.client_tokens)]  # noqa: E731
        measure({PORT: over(served), IN_PROCESS: inside})
    with running("theirs", folder, {}) as served:
        measure({THEIRS: over(served)})
    others = [(THEIRS, _TIMES_THEIRS), (IN_PROCESS, _SHARE_OF_OURS)]
    if find_spec("torch") is not None:
        with _torch(folder) as rate:
            measure({TORCH: lambda: [rate(engines.prompts(sizes.clients, sizes.context), sizes.client_tokens)]})
        others.append((TORCH, _TIMES_TORCH))
    facts = {"clients": sizes.clients, "context": sizes.context, "num_tokens": sizes.client_tokens}
    for other, target in others:
        name = f"http, {sizes.clients} clients, beside {other}"
        case = Case(name, "tokens/s", "higher", {}, facts | {"kind": "http", "beside": other}, target)
        yield Result(case, {PORT: found[PORT], other: found[other]})


def _texts(engines: Engines) -> list[str]:
    return text_prompts(engines.prompts(engines.sizes.clients, engines.sizes.context))


@contextmanager
def _torch(folder: Path) -> Iterator[Callable[[Sequence[Sequence[int]], int], float]]:
    """Tokens a second of prompts that transformers answers in a process of its own."""
    device = "cuda" if mx.cuda.is_available() else "cpu"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.benchmarks.gpu.torch_rate", str(folder), device],
        cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    orders, answers = process.stdin, process.stdout
    assert orders is not None
    assert answers is not None

    def answer() -> dict[str, float]:
        for line in answers:
            if line.startswith(b"{"):
                found: dict[str, float] = json.loads(line)
                return found
        raise RuntimeError("transformers ended")

    def rate(prompts: Sequence[Sequence[int]], num_tokens: int) -> float:
        orders.write(json.dumps({"prompts": prompts, "num_tokens": num_tokens}).encode() + b"\n")
        orders.flush()
        done = answer()
        return done["tokens"] / done["seconds"]

    try:
        answer()  # its versions, once it is ready
        yield rate
    finally:
        orders.close()
        answers.close()
        process.wait(timeout=60)
