"""``python -m tests.benchmarks.step_host``: what Python costs per step on the engine's thread, part by part.

The whole engine runs, from the scheduler to streams and detokenizers, over a backend that computes
nothing: what is left is the host's work. ``--against`` adds whole steps of a tiny model beside
mlx-lm's BatchGenerator. Needs no weights and no tokenizer on disk.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import tokenizers
from mlx_lm.generate import BatchGenerator
from tokenizers import decoders, models, pre_tokenizers

from engine.core.kv_cache_manager import KVCacheManager
from engine.core.request import NewRequest, Request
from engine.core.scheduler import Scheduler
from engine.memory.cache_spec import FullAttentionSpec
from engine.memory.step_cost import AdmissionControl, StepCost
from engine.params.sampling_params import SamplingParams
from engine.runner.backends import Backend
from engine.runner.kv.input_batch import InputBatch, Int32
from engine.runner.kv.kv_spec import num_logits
from engine.runner.model_runner import ModelRunner
from engine.runner.warm_up import choose_backend
from engine.runtime.llm_engine import LLMEngine
from engine.runtime.metrics import EngineMetrics
from engine.runtime.stream import RequestStream
from engine.text.tokens.detokenizer import Detokenizer
from engine.text.tokens.tokenizer import Tokenizer

VOCAB_SIZE = 1000
BLOCK_SIZE = 16
NUM_PROMPT = 300
NUM_TOKENS = 400
BATCHES = (1, 16, 64, 256)
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.7, top_p=0.8, top_k=20, presence_penalty=1.5, max_tokens=NUM_TOKENS,
                         ignore_eos=True)  # fmt: skip
PARTS = ("schedule", "build", "sampling", "submit", "read", "hand-out")
"""``build`` is everything between schedule and submission but sampling; ``read`` waits for the device, too."""


class IdleBackend(Backend):
    """Lays a step out as attention over pages needs it, and gives logits that were made before."""

    model = nn.Module()
    paged = True
    block_size = BLOCK_SIZE
    attention_paths = ()

    def __init__(self, max_rows: int) -> None:
        self._logits = mx.random.normal((max_rows, VOCAB_SIZE), key=mx.random.key(1))
        self._tokens = mx.zeros(1, mx.int32)
        mx.eval(self._logits)

    def forward(self, batch: InputBatch, tokens: mx.array, wanted: Sequence[Int32]) -> mx.array:
        """See :class:`engine.runner.backends.Backend`."""
        self._tokens = tokens
        mx.array(batch.positions)
        mx.array(batch.tables())
        return self._logits[: sum(map(len, wanted))]

    def barrier(self) -> list[mx.array]:
        """See :class:`engine.runner.backends.Backend`."""
        return [self._tokens]

    def forget(self, request: Request) -> None:
        """Nothing is kept."""

    def make_room(self, batch: InputBatch, limits: Sequence[int]) -> None:
        """There is no memory."""

    def resize(self, limits: Sequence[int], moves: Sequence[Mapping[int, int]]) -> None:
        """There is no memory."""

    def settle(self) -> None:
        """Nothing can be undone."""

    def blank(self, blocks: Sequence[Int32]) -> None:
        """There are no pages."""

    def undo(self) -> bool:
        """Nothing was done."""
        return False

    def reset(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is kept."""


def word_tokenizer() -> Tokenizer:
    """A byte-level tokenizer of :data:`VOCAB_SIZE` tokens: the bytes, then words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: i for i, text in enumerate([*alphabet, *(f"Ġword{i}" for i in range(len(alphabet), VOCAB_SIZE))])}
    hf = tokenizers.Tokenizer(models.BPE(vocab, []))
    hf.decoder = decoders.ByteLevel()
    return Tokenizer(hf)


def make_engine(
    backend: Backend, num_requests: int, vocab_size: int, *, num_tokens: int = NUM_PROMPT + NUM_TOKENS,
    submit_first: bool = True,
) -> LLMEngine:  # fmt: skip
    """The engine around ``backend``, with room for ``num_requests`` of ``num_tokens`` tokens."""
    tokenizer = word_tokenizer()
    spec = FullAttentionSpec((0,), bytes_per_token=1, block_size=backend.block_size)
    num_blocks = num_requests * (-(-num_tokens // backend.block_size) + 1)
    kv = KVCacheManager.of_specs([(spec, num_blocks)], enable_caching=True)
    scheduler = Scheduler(kv, max_num_seqs=num_requests, max_num_batched_tokens=2048)
    return LLMEngine(
        scheduler,
        ModelRunner(backend, vocab_size, max_blocks=[num_blocks]),
        lambda prompt, params: Detokenizer(tokenizer, prompt, params),
        tokenizer.token_text,
        EngineMetrics("host"),
        submit_first=submit_first,
        admission=AdmissionControl(StepCost(0.0), 0, lambda: 1 << 40),
        max_model_len=num_tokens,
    )


def submit(engine: LLMEngine, prompts: Sequence[list[int]], params: SamplingParams) -> list[RequestStream]:
    """Queue a request for each prompt, each with its own seed."""
    streams = []
    for number, prompt in enumerate(prompts):
        name = str(number)
        stream = RequestStream(name, None, prompt, params, lambda: None)
        new = NewRequest(name, prompt, params, params.max_tokens or 1, frozenset({VOCAB_SIZE}), seed=number)
        engine.add_request(new, stream)
        streams.append(stream)
    return streams


def random_prompts(number: int, vocab_size: int, length: int = NUM_PROMPT) -> list[list[int]]:
    """``number`` prompts with nothing in common."""
    prompts: list[list[int]] = np.random.default_rng(0).integers(0, vocab_size, (number, length)).tolist()
    return prompts


class PartTimes:
    """Seconds that each of :data:`PARTS` takes in a step; what one part calls of another counts only there."""

    def __init__(self, engine: LLMEngine) -> None:
        self.steps: list[dict[str, float]] = []
        self._open: list[str] = []
        self._since = 0.0
        runner = engine.runner
        self._time(engine.scheduler, "schedule", "schedule")
        self._time(runner, "execute", "build", self._follow)
        self._time(runner, "_sample", "sampling")
        self._time(engine, "_hand_out", "hand-out")

    def step(self, engine: LLMEngine) -> None:
        """One step of the engine."""
        self.steps.append(dict.fromkeys(("step", *PARTS), 0.0))
        begin = time.perf_counter()
        engine.step()
        self.steps[-1]["step"] = time.perf_counter() - begin

    def median(self, part: str) -> float:
        """Milliseconds of the middle step."""
        return 1000 * statistics.median(step[part] for step in self.steps)

    def _time(self, owner: Any, method: str, part: str, then: Callable[[Any], None] = lambda result: None) -> None:
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._open.append(part)
            try:
                result = inner(*args, **kwargs)
            finally:
                self._switch()
                self._open.pop()
            then(result)
            return result

        setattr(owner, method, timed)

    def _switch(self) -> None:
        """What passed since the last switch belongs to the innermost open part."""
        now = time.perf_counter()
        if self._open and self.steps:
            self.steps[-1][self._open[-1]] += now - self._since
        self._since = now

    def _follow(self, in_flight: Any) -> None:
        self._time(in_flight, "submit", "submit")
        self._time(in_flight, "read", "read")


def host_times(number: int, params: SamplingParams = GREEDY, num_steps: int = 200) -> PartTimes:
    """Steps in which ``number`` requests decode and nothing else happens."""
    engine = make_engine(IdleBackend(number), number, VOCAB_SIZE)
    streams = submit(engine, random_prompts(number, VOCAB_SIZE), params)
    while min(stream.num_tokens for stream in streams) < 2:
        engine.step()
    times = PartTimes(engine)
    for _ in range(num_steps):
        times.step(engine)
        for stream in streams:
            stream.drain(0)
    assert all(not stream.finished for stream in streams), "a request ended while it was measured"
    engine.close()
    return times


class TinySteps:
    """Whole decode steps of a tiny model at one batch size, in ms: ours through the whole engine, or mlx-lm's."""

    def __init__(self, number: int) -> None:
        from tests import tiny_models  # whose packages a GPU's machine may not have

        config = tiny_models.tiny_config("llama", vocab_size=VOCAB_SIZE)
        self.model = tiny_models.build_model(config)
        self.number = number
        self.prompts = random_prompts(number, VOCAB_SIZE)

    def ours(self, num_steps: int, params: SamplingParams = GREEDY) -> list[float]:
        """Steps of the engine, streams and text included."""
        backend, _ = choose_backend(
            self.model, paged=True, block_size=BLOCK_SIZE, device="cpu", vocab_size=num_logits(self.model)
        )
        engine = make_engine(backend, self.number, VOCAB_SIZE, submit_first=False)
        streams = submit(engine, self.prompts, params)
        while min(stream.num_tokens for stream in streams) < 2:
            engine.step()
        times = [_milliseconds(engine.step) for _ in range(num_steps)]
        engine.close()
        return times

    def theirs(self, num_steps: int) -> list[float]:
        """Steps of mlx-lm's BatchGenerator: tokens only."""
        generator = BatchGenerator(self.model, max_tokens=NUM_TOKENS, completion_batch_size=self.number)
        generator.insert(self.prompts)
        while len(generator.next_generated()) < self.number:
            pass
        times = [_milliseconds(generator.next_generated) for _ in range(num_steps)]
        generator.close()
        return times


def _milliseconds(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return 1000 * (time.perf_counter() - begin)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.step_host", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="the best of N runs is shown (3)")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, metavar="N", help="requests (1 16 64 256)")
    parser.add_argument("--against", action="store_true", help="whole steps of a tiny model beside mlx-lm as well")
    args = parser.parse_args()
    gc.freeze()
    print("ms per step".ljust(22) + "".join(part.rjust(10) for part in (*PARTS, "host", "step")))
    for name, params in (("greedy", GREEDY), ("sampled", SAMPLED)):
        for number in args.batches:
            runs = [host_times(number, params) for _ in range(args.repeats)]
            best = {part: min(run.median(part) for run in runs) for part in (*PARTS, "step")}
            host = best["step"] - best["read"] - best["submit"]
            values = (*(best[part] for part in PARTS), host, best["step"])
            print(f"{name}, {number} requests".ljust(22) + "".join(f"{value:10.3f}" for value in values), flush=True)
    if args.against:
        compare(args.batches, args.repeats)
    return 0


def compare(batches: Sequence[int], repeats: int, num_steps: int = 40) -> None:
    """Print the smallest median of each engine, runs taken in turn."""
    for number in batches:
        tiny = TinySteps(number)
        ours, theirs = [], []
        for _ in range(repeats):
            ours.append(statistics.median(tiny.ours(num_steps)))
            theirs.append(statistics.median(tiny.theirs(num_steps)))
        print(
            f"tiny model, {number} requests: {min(ours):.2f} ms, BatchGenerator {min(theirs):.2f} ms, "
            f"{min(ours) / min(theirs):.2f} times as long",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
