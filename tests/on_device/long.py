"""Long contexts through ``LLM`` and through the bare engine, every token against mlx-lm's logits on the same weights.

Contexts of 40 to 5,000 tokens, head sizes and element types, one row to 64, prompts in chunks, prefix hits, blocks
that others had, and preemption.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engine.core.kv_cache_manager import KVCacheManager
from engine.llm import LLM
from engine.params.sampling_params import SamplingParams
from engine.runner.kernels.self_check import AttentionKernels
from engine.runner.kv.attention_path import describe
from engine.runtime.llm_engine import LLMEngine
from tests.engine.parity.bare_engine import BLOCK_SIZE, BareEngine
from tests.on_device.small_models import VOCAB, SmallModel
from tests.on_device.ties import WRONG, Oracle
from tests.on_device.wanted_kernels import wanted_kernels

_BLOCK = 16
Answered = list[tuple[list[int], list[int]]]
"""Prompts and what the engine said."""


@dataclass(frozen=True)
class Size:
    """How much is tried of each model."""

    alone: tuple[int, ...]
    """Contexts of requests that run alone."""
    rows: int
    longest: int
    """Of the requests that run together."""
    shared: int
    """Tokens of the prefix that requests share."""
    crowd: tuple[int, int]
    """Requests, and tokens each, that are too many for a small pool."""
    chunk: int
    through_llm: tuple[SmallModel, ...]
    bare: tuple[SmallModel, ...]


FULL = Size(
    alone=(40, 250, 256, 257, 300, 512, 700, 1100, 2048, 5000),
    rows=64,
    longest=1600,
    shared=2000,
    crowd=(12, 300),
    chunk=512,
    through_llm=(
        SmallModel("qwen3", 128, "bfloat16"),
        SmallModel("qwen3", 64, "float16"),
        SmallModel("gemma3_text", 256, "float32"),
        SmallModel("gpt_oss", 64, "bfloat16"),
        SmallModel("qwen3_5", 256, "bfloat16"),
    ),
    bare=(
        SmallModel("llama", 128, "float16", {"num_key_value_heads": 1}),
        SmallModel("gemma2", 256, "float16"),
        SmallModel("qwen3", 128, "float32"),
        SmallModel("qwen3", 64, "float32"),
        SmallModel("qwen3", 64, "bfloat16"),
        SmallModel("gemma3_text", 256, "bfloat16"),
    ),
)
SMALL = Size(
    alone=(40, 300),
    rows=8,
    longest=320,
    shared=100,
    crowd=(4, 60),
    chunk=128,
    through_llm=(SmallModel("qwen3", 64, "float32", {"num_hidden_layers": 1}),),
    bare=(SmallModel("gemma3_text", 128, "bfloat16", {"num_hidden_layers": 2, "sliding_window_pattern": 2}),),
)


@dataclass
class Report:
    """Verdicts over all cases, one printed line each."""

    tokens: Counter[str] = field(default_factory=Counter)
    num_steps: int = 0
    problems: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Since the first case."""
        return time.monotonic() - self.began

    def case(self, name: str, oracle: Oracle, answers: Callable[[], Answered], steps: Callable[[], int]) -> None:
        """Run one case, judge every token of it and say so in a line; a failure is one, and the next case comes."""
        before, begin = steps(), time.monotonic()
        try:
            found = answers()
            ran = time.monotonic() - begin
            kinds, gap = _judge_all(oracle, found)
        except Exception as error:  # noqa: BLE001  (a case that fails; the others go on)
            self.problems.append(f"{name}: {type(error).__name__}: {error}")
            print(f"{name}: {WRONG}: {type(error).__name__}: {error}", flush=True)
            return
        self.tokens += kinds
        self.num_steps += steps() - before
        if kinds[WRONG]:
            self.problems.append(name)
        print(
            f"{name}: {len(found)} prompts, {_counts(kinds)}, largest gap {gap:.3f} of the spread,"
            f" {steps() - before} steps in {ran:.1f} s; {self.seconds:.0f} s so far",
            flush=True,
        )

    def leave_out(self, name: str) -> None:
        """A model for which there was no time."""
        self.problems.append(f"{name}: left out")
        print(f"{name}: LEFT OUT after {self.seconds:.0f} s", flush=True)

    def end(self) -> bool:
        """Print the sum; whether everything ran and nothing is wrong."""
        print(f"long: {_counts(self.tokens)} in {self.num_steps} steps, {self.seconds:.0f} s", flush=True)
        for problem in self.problems:
            print(f"long: {WRONG}: {problem}", flush=True)
        return not self.problems and self.tokens["equal"] > 0


def long(backend: str = "auto", *, small: bool = False, seconds: float = 95.0) -> bool:
    """Every case, until ``seconds`` are over; whether all are right. ``backend``: as ``attention_backend``."""
    size, report = SMALL if small else FULL, Report()
    with tempfile.TemporaryDirectory() as temporary:
        for number, model in enumerate(size.through_llm):
            if report.seconds < seconds:
                _through_llm(report, model, size, Path(temporary) / str(number), backend)
            else:
                report.leave_out(f"LLM {model}")
    for model in size.bare:
        if report.seconds < seconds:
            _through_bare(report, model, size, backend)
        else:
            report.leave_out(f"bare {model}")
    return report.end()


def _through_llm(report: Report, model: SmallModel, size: Size, folder: Path, backend: str) -> None:
    """One model through the front door, in the order in which blocks get ever more of a past."""
    oracle = _oracle(model, model.write(folder), size)
    begin = time.monotonic()
    options: dict[str, Any] = {
        "max_model_len": max(size.alone) + 64,
        "max_num_seqs": size.rows,
        "max_num_batched_tokens": size.chunk,
        "attention_backend": backend,
    }
    with LLM(str(folder), **options) as llm:
        print(
            f"LLM {model}: {describe(llm.attention_paths)}; loaded in {time.monotonic() - begin:.1f} s;"
            f" a tie is below {oracle.tie:.3f}",
            flush=True,
        )
        rng, steps = np.random.default_rng(1), _count_steps(llm)

        def case(name: str, answers: Callable[[], Answered]) -> None:
            report.case(f"LLM {model}, {name}", oracle, answers, steps)

        alone = [_prompt(rng, length) for length in size.alone]
        case("alone", lambda: [pair for prompt in alone for pair in _ask(llm, [prompt], 8)])
        case(f"1 to {size.rows} rows", lambda: _ask(llm, _mixed(rng, size), range(4, 4 + size.rows)))
        case("prefix hits", lambda: _prefix_hits(llm, rng, size))
        case("preemption", lambda: _preempted(llm, rng, size))
        case("blocks that others had", lambda: _ask(llm, _mixed(rng, size)[:4] * 2, [3, 12] * 4))


def _ask(llm: LLM, prompts: Sequence[list[int]], num_tokens: int | Sequence[int]) -> Answered:
    """All at once, each with its number of tokens."""
    numbers = [num_tokens] * len(prompts) if isinstance(num_tokens, int) else list(num_tokens)[: len(prompts)]
    params = [SamplingParams(temperature=0, max_tokens=number, ignore_eos=True) for number in numbers]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    found = [list(output.outputs[0].token_ids) for output in outputs]
    assert [len(tokens) for tokens in found] == numbers, "a request ended early"
    return list(zip(map(list, prompts), found, strict=True))


def _prefix_hits(llm: LLM, rng: np.random.Generator, size: Size) -> Answered:
    prefix = _prompt(rng, size.shared)
    first = _ask(llm, [prefix], 4)
    tails = [[*prefix, *_prompt(rng, length)] for length in (1, 5, 17, 40, 90, 200)]
    streams = [llm.submit_prompt(tokens, _greedy(6)) for tokens in tails]
    outputs = [stream.result() for stream in streams]
    paged = all(path.backend != "contiguous" for path in llm.attention_paths)
    assert not paged or any(output.num_cached_tokens for output in outputs), "no prefix was found again"
    return [
        *first,
        *((tokens, list(output.outputs[0].token_ids)) for tokens, output in zip(tails, outputs, strict=True)),
    ]


def _preempted(llm: LLM, rng: np.random.Generator, size: Size) -> Answered:
    """More requests than a pool made small can hold to their ends."""
    count, length = size.crowd
    prompts = [_prompt(rng, length) for _ in range(count)]
    blocks = count * -(-length // _BLOCK) + 1
    before = llm.stats().num_preemptions
    with _few_blocks(llm, max(blocks, -(-max(size.alone) // _BLOCK) // 4)):
        found = _ask(llm, prompts, 3 * _BLOCK)
    assert llm.stats().num_preemptions > before, "nobody had to give way"
    return found


@contextmanager
def _few_blocks(llm: LLM, num_blocks: int) -> Iterator[None]:
    """Inside, an idle engine has pools of pages of so many blocks; afterwards empty ones of their planned size."""

    def swap(limit: int | None) -> Callable[[LLMEngine], None]:
        def act(engine: LLMEngine) -> None:
            planned = [
                (spec, llm.plan.num_blocks_of(spec) if limit is None or not spec.paged else limit)
                for spec in llm.plan.groups
            ]
            caching = engine.scheduler.kv.groups[0].pool.enable_caching
            engine.scheduler.kv = KVCacheManager.of_specs(planned, enable_caching=caching)
            engine.runner.max_blocks = tuple(number for _, number in planned)

        return act

    llm._thread.call(swap(num_blocks))
    try:
        yield
    finally:
        llm._thread.call(swap(None))


def _count_steps(llm: LLM) -> Callable[[], int]:
    """What gives the number of steps since."""
    count = 0

    def start(engine: LLMEngine) -> None:
        step = engine.step

        def counted() -> None:
            nonlocal count
            count += 1
            step()

        engine.step = counted  # type: ignore[method-assign]

    llm._thread.call(start)
    return lambda: count


def _oracle(model: SmallModel, module: Any, size: Size) -> Oracle:
    return Oracle.of(module, model.build(), _prompt(np.random.default_rng(3), min(size.longest, 500)))


class _Bare:
    """A bare engine that counts its steps."""

    def __init__(self, module: Any, kernels: AttentionKernels | None = None) -> None:
        self.engine = BareEngine(module, kernels=kernels)
        self.num_steps = 0

    def run(self, prompts: Sequence[list[int]], num_tokens: int, **start: Any) -> Answered:
        """All at once; ``start``: from empty caches and pools of such sizes."""
        if start:
            self.engine.start(**start)
        runner = self.engine.runner
        execute = runner.execute

        def counted(scheduled: Any) -> Any:
            self.num_steps += 1
            return execute(scheduled)

        runner.execute = counted  # type: ignore[assignment,method-assign]
        try:
            requests = self.engine.generate(prompts, num_tokens)
        finally:
            runner.execute = execute  # type: ignore[method-assign]
        return [(list(request.prompt_token_ids), list(request.output_token_ids)) for request in requests]


def _through_bare(report: Report, model: SmallModel, size: Size, backend: str) -> None:
    """One model without tokenizer and thread: twice, so that the second finds prefixes, then with too few blocks."""
    module = model.build()
    bare, oracle = _Bare(module, wanted_kernels(backend)), _oracle(model, module, size)
    print(f"bare {model}: {describe(bare.engine.backend.attention_paths)}; a tie is below {oracle.tie:.3f}", flush=True)
    rng = np.random.default_rng(2)
    prompts = _mixed(rng, size)[: max(4, size.rows // 4)]
    count, length = size.crowd
    crowd = [_prompt(rng, length) for _ in range(count)]

    def case(name: str, answers: Callable[[], Answered]) -> None:
        report.case(f"bare {model}, {name}", oracle, answers, lambda: bare.num_steps)

    blocks = sum(-(-len(prompt) // BLOCK_SIZE) + 4 for prompt in prompts)
    few = count * -(-length // BLOCK_SIZE) + 1
    case("alone", lambda: [pair for prompt in prompts[:3] for pair in bare.run([prompt], 8, num_blocks=blocks)])
    case(f"{len(prompts)} rows", lambda: bare.run(prompts, 8, num_blocks=blocks, chunk=size.chunk))
    case("prefix hits", lambda: bare.run(prompts, 8))
    case("preemption", lambda: bare.run(crowd, 24, num_blocks=few, num_seqs=count, chunk=size.chunk))
    bare.engine.backend.close()


def _mixed(rng: np.random.Generator, size: Size) -> list[list[int]]:
    """Prompts from 40 tokens to ``size.longest``, and one of the longest context of all."""
    lengths = rng.integers(40, size.longest, size.rows)
    lengths[1] = max(size.alone) - 80
    return [_prompt(rng, int(length)) for length in lengths]


def _prompt(rng: np.random.Generator, length: int) -> list[int]:
    return [int(token) for token in rng.integers(0, VOCAB - 1, length)]


def _greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


def _judge_all(oracle: Oracle, found: Answered) -> tuple[Counter[str], float]:
    kinds: Counter[str] = Counter()
    largest = 0.0
    for prompt, tokens in found:
        some, gap = oracle.judge(prompt, tokens)
        kinds += some
        largest = max(largest, gap)
    return kinds, largest


def _counts(kinds: Counter[str]) -> str:
    return f"{kinds['equal']} tokens equal, {kinds['tie']} tie, {kinds[WRONG]} {WRONG}"
