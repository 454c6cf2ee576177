"""``python -m tests.benchmarks.port_process FOLDER MS [PROFILE]``: the engine of :mod:`tests.benchmarks.port_speed`.

Its steps take ``MS`` milliseconds on a device that is not there. Orders come line by line on standard input.
"""

import cProfile
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

from engine.core.step import SchedulerOutput
from engine.llm import LLM
from engine.openai.server import ServerHandle
from engine.params.sampling_params import SamplingParams
from engine.runner.model_runner import InFlightStep, ModelRunner
from engine.runtime.llm_engine import LLMEngine
from tests.benchmarks.gpu.shapes import write_model
from tests.benchmarks.step_host import BLOCK_SIZE, IdleBackend

MOST = 256
"""Requests at once."""
_LENGTH = 1024


class WordBackend(IdleBackend):
    """As :class:`IdleBackend`; its rows always choose words, never bytes that wait for others."""

    def __init__(self, max_rows: int, vocab_size: int) -> None:
        super().__init__(max_rows)
        words = 256 + mx.arange(max_rows) % (vocab_size - 257)
        self._logits = (mx.arange(vocab_size)[None] == words[:, None]).astype(mx.float32)
        mx.eval(self._logits)


class TimedRunner(ModelRunner):
    """Steps that are done a while after they were submitted, one behind the other, as on a device."""

    def __init__(self, *args: Any, seconds: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._seconds, self._free = seconds, 0.0

    def execute(self, step: SchedulerOutput) -> InFlightStep:
        """See :class:`ModelRunner`."""
        in_flight, done = super().execute(step), 0.0
        submit, read = in_flight.submit, in_flight.read

        def timed_submit() -> None:
            nonlocal done
            submit()
            done = self._free = max(self._free, time.perf_counter()) + self._seconds

        def timed_read(token_text: Any) -> Any:
            wait = done - time.perf_counter()
            if wait > 0:
                time.sleep(wait)
            return read(token_text)

        in_flight.submit, in_flight.read = timed_submit, timed_read  # type: ignore[method-assign]
        return in_flight


def install(engine: LLMEngine, seconds: float) -> None:
    """Give ``engine`` a device that computes nothing for ``seconds`` a step."""
    vocab_size = 512
    blocks = [group.pool.num_blocks for group in engine.scheduler.kv.groups]
    engine.runner = TimedRunner(WordBackend(MOST, vocab_size), vocab_size, max_blocks=blocks, seconds=seconds)
    engine._submit_first = True


def main() -> None:
    """Follow orders until there are no more."""
    folder, milliseconds, profile = (*sys.argv[1:], "")[:3]
    write_model(Path(folder), "tiny")
    options = {"max_model_len": _LENGTH, "max_num_seqs": MOST, "max_num_batched_tokens": 1 << 14}
    with LLM(folder, gpu_memory_utilization=0.02, block_size=BLOCK_SIZE, reasoning_parser="qwen3", **options) as llm:
        llm._thread.call(lambda engine: install(engine, float(milliseconds) / 1000))
        if profile:
            _profile(profile)
        server = llm.serve(0, no_api_key=True)
        print(json.dumps({"port": server.port}), flush=True)
        for line in sys.stdin:
            print(json.dumps(_follow(llm, json.loads(line))), flush=True)


def _follow(llm: LLM, order: dict[str, Any]) -> dict[str, float]:
    if "local" not in order:
        return _thread_seconds()
    params = SamplingParams(temperature=0, max_tokens=order["num_tokens"], ignore_eos=True)
    prompts = [f"{number:04d} abcdefghijklmnopqrstuvwxyz" for number in range(order["local"])]
    before, begin = _thread_seconds(), time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - begin
    assert all(len(output.outputs[0].token_ids) == order["num_tokens"] for output in outputs)
    return {"seconds": seconds} | {name: value - before[name] for name, value in _thread_seconds().items()}


def _thread_seconds() -> dict[str, float]:
    """Seconds that the engine's and the port's thread have computed, what they waited for left out."""
    found = {"engine": 0.0, "port": 0.0}
    for thread in threading.enumerate():
        name = {"vm-engine": "engine", "openai-port": "port"}.get(thread.name)
        if name is not None:
            text = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text()
            found[name] = int(text.split()[0]) / 1e9
    return found


def _profile(path: str) -> None:
    """Have the port's thread write its profile to ``path`` when it ends."""
    run = ServerHandle._run

    def profiled(handle: ServerHandle) -> None:
        profiler = cProfile.Profile()
        profiler.enable()
        try:
            run(handle)
        finally:
            profiler.disable()
            profiler.dump_stats(path)

    ServerHandle._run = profiled  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
