"""The likeliest token of each row by many blocks: both dialects' text on this machine's CPU, against numpy."""

import shutil
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.params.sampling_params import SamplingParams
from engine.runner.kernels import best_rows as module
from engine.runner.kernels.best_rows import best_rows
from engine.runner.kernels.draw_check import best_problem
from engine.runner.sampling.sampler import Sampler
from engine.runner.sampling.sampling_metadata import SamplingMetadata, SamplingRow
from tests.engine.runner.kernels.conftest import TextKernels
from tests.engine.runner.kernels.host_draw_rows import HostDrawRows
from tests.engine.runner.kernels.text_on_host import HostKernel

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the kernel's text")


@pytest.fixture
def kernels(text_kernels: TextKernels) -> dict[str, HostKernel]:
    return text_kernels(module)


@needs_compiler
@pytest.mark.parametrize(
    ("dialect", "dtype", "width"),
    [
        ("metal", mx.bfloat16, 4_096),
        ("metal", mx.float32, 1_001),
        ("cuda", mx.float16, 9_003),
        ("cuda", mx.bfloat16, 32),
    ],
)
def test_the_first_of_the_largest_is_taken_and_none_where_that_is_not_finite(
    dtype: mx.Dtype, width: int, kernels: dict[str, HostKernel]
) -> None:
    assert best_problem(dtype, best_rows, (width,)) is None
    assert set(kernels) == {"best_of_rows", "join_best"}


@needs_compiler
@pytest.mark.parametrize("dialect", ["metal"])
@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        ("_BEST", "if (first + i < width)", "if (first + i < width - 1)"),
        ("_BEST", "first += PARTS * THREADS * 8", "first += width"),
        ("_JOIN", "key <= HIGHEST_KEY ? column", "true ? column"),
        ("_HEADER", "other_column < column", "other_column > column"),
    ],
)
def test_a_fault_in_the_text_is_found(
    text: str, right: str, wrong: str, kernels: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert getattr(module, text).count(right) == 1
    monkeypatch.setattr(module, text, getattr(module, text).replace(right, wrong))
    assert best_problem(mx.bfloat16, best_rows, (70_001,)) is not None


def test_only_steps_that_ask_for_nothing_else_take_it() -> None:
    asked: list[tuple[int, ...]] = []

    def best(logits: mx.array) -> mx.array:
        asked.append(logits.shape)
        return mx.argmax(logits, axis=-1).astype(mx.int32)

    sampler, logits = Sampler(HostDrawRows(), best), mx.array(np.random.default_rng(0).normal(size=(2, 64)))
    for params, times in (({}, 1), ({"presence_penalty": 1.0}, 1), ({"logprobs": 1}, 1), ({"temperature": 1.0}, 1)):
        given: dict[str, Any] = {"temperature": 0.0, **params}
        rows = [SamplingRow(SamplingParams(**given), prompt_token_ids=[1], output_token_ids=[2]) for _ in range(2)]
        found = sampler.sample(logits.astype(mx.float32), SamplingMetadata.build(rows, 64)).token_ids
        assert found.shape == (2,)
        assert len(asked) == times, params
