"""With a kernel that samples the Sampler gives the tokens that it gives without, in one launch."""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from engine.params.sampling_params import SamplingParams
from engine.runner.kernels import draw_rows as module
from engine.runner.sampling import sampler_choice
from engine.runner.sampling.sampler import Sampler
from engine.runner.sampling.sampler_choice import choose_sampler
from engine.runner.sampling.sampling_metadata import SamplingMetadata, SamplingPlan, SamplingRow
from tests.engine.runner.kernels.host_draw_rows import HostDrawRows, host_best_rows
from tests.engine.runner.kernels.text_on_host import HostKernel
from tests.engine.runner.sampling.test_sampler import random_batch
from tests.engine.runner.sampling.test_sampling_plan import VOCAB, WISHES

USUAL = SamplingParams(temperature=0.7, top_k=20, top_p=0.8, presence_penalty=1.5)


def both(
    logits: np.ndarray[Any, Any], rows: list[SamplingRow], pending: list[int], kernel: Any
) -> tuple[list[int], list[int]]:
    """Tokens without the kernel, and with it."""
    found = []
    for sampler in (Sampler(), Sampler(kernel)):
        metadata = SamplingMetadata.build(rows, logits.shape[-1])
        found.append(sampler.sample(mx.array(logits), metadata, mx.array(pending, mx.int32)).token_ids.tolist())
    return found[0], found[1]


@pytest.mark.parametrize("seed", range(60))
def test_mixed_batches_give_the_same_tokens(seed: int) -> None:
    kernel = HostDrawRows()
    without, with_kernel = both(*random_batch(seed), kernel)
    assert with_kernel == without
    assert kernel.calls == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the kernel's text")
@pytest.mark.parametrize("dialect", ["metal", "cuda"])
def test_mixed_batches_give_the_same_tokens_by_the_kernels_text(
    dialect: str, kernel_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, HostKernel] = {}

    def make(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str, header: str = "") -> HostKernel:
        return made.setdefault(name, HostKernel(dialect, name, inputs, outputs, source, header, kernel_folder))

    monkeypatch.setattr(module, "make_kernel", make)
    for seed in range(15):
        without, with_kernel = both(*random_batch(seed), module.draw_rows)
        assert with_kernel == without, seed


@pytest.mark.parametrize("left_out", ["", "repetition_penalty"])
def test_a_plan_by_the_kernel_gives_every_step_the_tokens_of_a_plan_without_it(left_out: str) -> None:
    """The kernel counts pending tokens in place; a batch with a repetition penalty keeps MLX's way of that."""
    rng = np.random.default_rng(0)
    wishes = [{key: value for key, value in wish.items() if key != left_out} for wish in WISHES]
    outputs: list[list[int]] = [[] for _ in wishes]
    rows = [
        SamplingRow(SamplingParams(**wish), seed=i, prompt_token_ids=[1, 2, 3], output_token_ids=outputs[i])
        for i, wish in enumerate(wishes)
    ]
    kernel = HostDrawRows()
    ways = [(Sampler(), SamplingPlan(rows, VOCAB)), (Sampler(kernel), SamplingPlan(rows, VOCAB))]
    newest: list[mx.array | None] = [None, None]
    every, none = np.arange(len(rows), dtype=np.int32), np.full(len(rows), -1, np.int32)
    for step in range(12):
        logits = mx.array(rng.standard_normal((len(rows), VOCAB)).astype(np.float32) * 2)
        before = newest[0]
        newest = [
            sampler.sample(
                logits, plan.metadata(every + step, every if step else none, follows=step > 0), last
            ).token_ids
            for (sampler, plan), last in zip(ways, newest, strict=True)
        ]  # fmt: skip
        own, by_kernel = (np.array(tokens).tolist() for tokens in newest)
        assert own == by_kernel, step
        for output, token in zip(outputs, [] if before is None else before.tolist(), strict=False):
            output.append(token)
    assert kernel.calls == 12
    counts = [np.array(plan._penalties.counts) for _, plan in ways if plan._penalties is not None]
    assert np.array_equal(counts[0], counts[1])
    assert counts[0].sum() == 11 * len(counts[0])


def test_logits_go_to_the_kernel_as_the_model_gives_them_unless_something_changes_them_before() -> None:
    logits = mx.array(np.random.default_rng(1).standard_normal((2, 64)), mx.bfloat16)
    for params, dtype in (
        (USUAL, mx.bfloat16),
        (SamplingParams(temperature=0), mx.bfloat16),
        (SamplingParams(logprobs=2), mx.bfloat16),
        (SamplingParams(logit_bias={3: 1.0}), mx.float32),
        (SamplingParams(repetition_penalty=1.2), mx.float32),
    ):
        kernel = HostDrawRows()
        rows = [SamplingRow(params, seed=i, output_token_ids=[5]) for i in range(2)]
        output = Sampler(kernel).sample(logits, SamplingMetadata.build(rows, 64))
        assert kernel.dtypes == {dtype}
        assert (output.logprobs is None) == (params.logprobs is None)


def test_logits_that_the_kernel_does_not_know_are_sampled_without_it() -> None:
    kernel = HostDrawRows()
    rows = [SamplingRow(USUAL, seed=1)]
    assert Sampler(kernel).sample(mx.zeros((1, 20)), SamplingMetadata.build(rows, 20)).token_ids.shape == (1,)
    assert kernel.calls == 0


class Model(nn.Module):
    """Gives logits of one element type."""

    def __init__(self, dtype: mx.Dtype, vocab_size: int) -> None:
        super().__init__()
        self.layers: list[nn.Module] = []
        self._logits = mx.zeros((1, 1, vocab_size), dtype)

    def __call__(self, tokens: mx.array, cache: object = None) -> mx.array:
        return self._logits


def test_a_kernel_that_is_right_is_chosen_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(sampler_choice, "draw_problem", lambda dtypes, kernel: asked.append(dtypes))
    for dtype, checked in ((mx.bfloat16, [mx.bfloat16, mx.float32]), (mx.float32, [mx.float32])):
        kernel = HostDrawRows()
        sampler, note = choose_sampler(Model(dtype, 64), 64, kernel, host_best_rows)
        assert note is None
        assert asked.pop() == checked
        sampler.sample(mx.zeros((1, 64), dtype), SamplingMetadata.build([SamplingRow(USUAL)], 64))
        assert kernel.calls == 1


def test_a_kernel_that_is_wrong_is_not_used_and_a_line_says_so() -> None:
    class Wrong(HostDrawRows):
        def __call__(self, *given: Any) -> mx.array:
            return mx.maximum(super().__call__(*given), 0)

    kernel = Wrong()
    sampler, note = choose_sampler(Model(mx.bfloat16, 64), 64, kernel)
    assert str(note).startswith("sampling: MLX's own operations (20000 bfloat16 logits, ")
    assert "of a row without any" in str(note)
    calls = kernel.calls
    sampler.sample(mx.zeros((1, 64)), SamplingMetadata.build([SamplingRow(USUAL)], 64))
    assert kernel.calls == calls


def test_likeliest_tokens_that_are_wrong_are_taken_by_the_kernel_that_draws_and_a_line_says_so() -> None:
    answers = [-1, 0]

    def best(logits: mx.array) -> mx.array:
        return host_best_rows(logits) + answers[0]

    model, kernel = Model(mx.bfloat16, 64), HostDrawRows()
    sampler, note = choose_sampler(model, 64, kernel, best)
    assert str(note).startswith("sampling: likeliest tokens by the kernel that draws, not by their own (20000 bfloat16")
    calls = kernel.calls
    sampler.sample(mx.zeros((1, 64)), SamplingMetadata.build([SamplingRow(SamplingParams(temperature=0))], 64))
    assert kernel.calls == calls + 1
    answers.pop(0)
    assert choose_sampler(model, 64, kernel, best)[1] is None, "what failed once is asked again"


def test_too_few_logits_need_no_check() -> None:
    def unasked(*_given: object) -> mx.array:
        raise AssertionError("the kernel was launched")

    assert choose_sampler(Model(mx.float32, 20), 20, unasked)[1] is None  # type: ignore[arg-type]


def test_a_kernel_that_was_right_is_not_checked_again_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    model, kernel, asked = Model(mx.float32, VOCAB), HostDrawRows(), list[list[mx.Dtype]]()
    answers: list[str | None] = ["wrong", None]

    def answer(dtypes: list[mx.Dtype], _kernel: object) -> str | None:
        asked.append(dtypes)
        return answers.pop(0)

    monkeypatch.setattr(sampler_choice, "draw_problem", answer)
    notes = [sampler_choice.choose_sampler(model, VOCAB, kernel, host_best_rows)[1] for _ in range(3)]
    assert notes == ["sampling: MLX's own operations (wrong)", None, None]
    assert asked == [[mx.float32]] * 2
