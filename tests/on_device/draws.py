"""Millions of draws against the exact distribution, by the sampler as the engine calls it.

``python -m tests.on_device draws``: on a GPU by the kernel that samples, elsewhere by MLX's own operations.
"""

import itertools
import time
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from engine.params.sampling_params import SamplingParams
from engine.runner.kernels.dialect import kernels_available
from engine.runner.kernels.draw_rows import draw_rows
from engine.runner.sampling.sampler import Sampler
from engine.runner.sampling.sampling_metadata import SamplingPlan, SamplingRow, uniforms
from tests.engine.core.stand_ins import FreeGuide
from tests.engine.runner.sampling.exact import chi_square, reference_logits, reference_probabilities

ROWS = 2048
"""Draws of a step: a row each, of its own seed."""
WIDTHS = (96, 1536)
"""Logits of a row: one block of columns of the draw, and several."""
MOST = 5.0
"""Standard deviations of the chi-square distribution. Seeds are fixed, so a run that passes once always does."""
FEWEST = 8.0
"""Tokens that are expected less often are counted together."""


class Grammar(FreeGuide):
    """Allows every third token."""

    def __init__(self, width: int) -> None:
        super().__init__(waits=True)
        bits = np.zeros(-(-width // 32) * 32, np.uint8)
        bits[:width:3] = 1
        self._words = np.packbits(bits, bitorder="little").view(np.int32)

    def fill_bitmask(self, words: NDArray[np.int32]) -> bool:
        words[:] = self._words
        return True


@dataclass(frozen=True)
class Case:
    """What every row of a run asks for."""

    name: str
    params: SamplingParams
    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    eos: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: bool = False

    def row(self, seed: int, guide: Grammar | None) -> SamplingRow:
        """A row of the batch."""
        return SamplingRow(
            self.params, seed=seed, prompt_token_ids=self.prompt, output_token_ids=self.output,
            eos_token_ids=self.eos, bad_words_ids=self.bad_words, guide=guide,
        )  # fmt: skip


_SAID = (3, 3, 3, 7, 7, 20, 31)
CASES = (
    Case("plain", SamplingParams()),
    Case("temperature 0.3", SamplingParams(temperature=0.3)),
    Case("temperature 2", SamplingParams(temperature=2.0)),
    Case("top_k 7", SamplingParams(temperature=0.5, top_k=7)),
    Case("top_p 0.8", SamplingParams(top_p=0.8)),
    Case("min_p 0.05", SamplingParams(min_p=0.05)),
    Case("top_k, top_p and min_p", SamplingParams(temperature=1.5, top_k=40, top_p=0.9, min_p=0.01)),
    Case("frequency and presence", SamplingParams(frequency_penalty=0.7, presence_penalty=-0.9), output=_SAID),
    Case("repetition", SamplingParams(repetition_penalty=1.4), prompt=(1, 2, 3, 90), output=_SAID),
    Case("logit_bias", SamplingParams(logit_bias={4: 3.0, 5: -2.5, 6: -np.inf})),
    Case("allowed_token_ids", SamplingParams(allowed_token_ids=[2, 3, 5, 8, 13, 21, 34, 55])),
    Case("bad_words", SamplingParams(), output=(9, 8, 7), bad_words=((11,), (8, 7, 12), (7, 13), (6, 14))),
    Case("min_tokens", SamplingParams(min_tokens=9, stop_token_ids=[15, 16]), output=(1, 2), eos=(0, 17)),
    Case("a grammar", SamplingParams(), grammar=True),
    Case(
        "all together",
        SamplingParams(
            temperature=0.8, top_k=25, top_p=0.95, min_p=0.002, frequency_penalty=0.4, presence_penalty=0.3,
            repetition_penalty=1.2, logit_bias={3: 2.0, 4: -np.inf}, min_tokens=20, max_tokens=None,
            stop_token_ids=[18],
        ),
        prompt=(3, 60), output=_SAID, eos=(0,), bad_words=((31, 24), (21,)), grammar=True,
    ),
)  # fmt: skip


@dataclass
class Found:
    """What a run counted: draws, how far they lie from the exact distribution, and what never may come."""

    case: str
    width: int
    draws: int
    deviation: float
    masked: int
    seconds: float = field(compare=False)

    @property
    def right(self) -> bool:
        """Whether draws follow the distribution and none was masked."""
        return abs(self.deviation) < MOST and self.masked == 0

    def __str__(self) -> str:
        said = f"{self.deviation:+.1f} sd, {self.masked} masked"
        return f"{self.case}, {self.width} logits, {self.draws:.1e} draws: {said} ({self.seconds:.0f} s)"


def logits_of(width: int) -> NDArray[np.float32]:
    """A row [V] as a model gives it: few likely tokens, a long tail, some forbidden outright."""
    logits = (2.0 * np.random.default_rng(width).standard_normal(width)).astype(np.float32)
    logits[40:45] = -np.inf
    return logits


def exact(case: Case, logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probabilities [V] in float64; asserts that rounding does not decide where top_p ends."""
    masked = logits.astype(np.float64)
    if case.grammar:
        masked[np.arange(len(logits)) % 3 != 0] = -np.inf
    expected, margin = reference_probabilities(reference_logits(masked, case.row(0, None)), case.params)
    assert margin > 1e-5, f"{case.name}: top_p ends within rounding of a token"
    return expected


def counts_of(case: Case, logits: NDArray[np.float32], draws: int, sampler: Sampler) -> NDArray[np.int64]:
    """How often each token [V] came in at least ``draws`` draws; a row without a token is an error."""
    width = len(logits)
    guide = Grammar(width) if case.grammar else None
    plan = SamplingPlan([case.row(seed, guide) for seed in range(ROWS)], width)
    batch = mx.array(np.tile(logits, (ROWS, 1)))
    first = plan.metadata(np.zeros(ROWS, np.int32), np.full(ROWS, -1, np.int32))
    counts = np.zeros(width, np.int64)
    for step in range(-(-draws // ROWS)):
        metadata = replace(first, uniforms=uniforms(range(ROWS), [step] * ROWS))  # all else is the same at every step
        tokens = np.array(sampler.sample(batch, metadata).token_ids)
        assert tokens.min() >= 0, f"{case.name}: a row gave no token"
        counts += np.bincount(tokens, minlength=width)
    return counts


def deviation_of(counts: NDArray[np.int64], expected: NDArray[np.float64]) -> float:
    """Standard deviations of the chi-square distribution; rare tokens are one."""
    likely = expected * counts.sum() >= FEWEST
    rest = expected[~likely].sum()
    groups = [(counts[likely], expected[likely])]
    if rest > 0:
        groups.append((counts[~likely].sum(keepdims=True), rest[None]))
    return chi_square(np.concatenate([each for each, _ in groups]), np.concatenate([each for _, each in groups]))


def found_of(case: Case, width: int, draws: int, sampler: Sampler) -> Found:
    """One run."""
    begin = time.monotonic()
    logits = logits_of(width)
    expected = exact(case, logits)
    counts = counts_of(case, logits, draws, sampler)
    masked = int(counts[expected == 0].sum())
    return Found(case.name, width, int(counts.sum()), deviation_of(counts, expected), masked, time.monotonic() - begin)


def draws(number: int) -> bool:
    """Print a line for each case; whether all are right."""
    by_kernel = kernels_available()
    sampler = Sampler(draw_rows) if by_kernel else Sampler()
    print(f"draws: by {'the kernel that samples' if by_kernel else 'operations of MLX'}", flush=True)
    right = True
    total = masked = 0
    for case, width in itertools.product(CASES, WIDTHS):
        found = found_of(case, width, number, sampler)
        print(f"draws: {'ok   ' if found.right else 'WRONG'} {found}", flush=True)
        right, total, masked = right and found.right, total + found.draws, masked + found.masked
    print(f"draws: {masked} masked tokens in {total:.2e} draws", flush=True)
    return right
