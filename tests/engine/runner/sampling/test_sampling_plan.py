"""A batch's plan serves its steps as metadata made anew for each of them would, for less."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.params.sampling_params import SamplingParams
from engine.runner.sampling import top_weights
from engine.runner.sampling.sampler import Sampler
from engine.runner.sampling.sampling_metadata import SamplingMetadata, SamplingPlan, SamplingRow
from engine.runner.sampling.top_weights import largest_of_blocks, largest_sorted

VOCAB = 300
WISHES: list[dict[str, Any]] = [
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "presence_penalty": 1.5},
    {"temperature": 0.0, "frequency_penalty": 0.9},
    {"temperature": 1.2, "repetition_penalty": 1.4, "min_p": 0.01},
    {"temperature": 0.9, "top_p": 0.9, "min_tokens": 4, "stop_token_ids": [3]},
    {"temperature": 0.0, "logit_bias": {5: 3.0}},
    {"temperature": 1.0, "allowed_token_ids": [1, 5, 9, 200]},
]


def make_rows(outputs: list[list[int]], pending: list[int] | None, positions: list[int]) -> list[SamplingRow]:
    return [
        SamplingRow(
            SamplingParams(**wish), seed=i, position=positions[i], prompt_token_ids=[1, 2, 3], eos_token_ids={7},
            output_token_ids=outputs[i], pending_row=None if pending is None else i, bad_words_ids=[[4, 6]],
        )
        for i, wish in enumerate(WISHES)
    ]  # fmt: skip


def test_a_plan_gives_every_step_the_tokens_that_fresh_metadata_gives():
    rng = np.random.default_rng(0)
    outputs: list[list[int]] = [[] for _ in WISHES]
    plan = SamplingPlan(make_rows(outputs, None, [0] * len(WISHES)), VOCAB)
    newest: mx.array | None = None
    for step in range(12):
        logits = mx.array(rng.standard_normal((len(WISHES), VOCAB)).astype(np.float32) * 2)
        positions = [3 + step] * len(WISHES)
        pending = None if newest is None else newest.tolist()
        fresh = SamplingMetadata.build(make_rows(outputs, pending, positions), VOCAB)
        rows = np.full(len(WISHES), -1) if newest is None else np.arange(len(WISHES))
        planned = plan.metadata(np.array(positions), rows.astype(np.int32), follows=newest is not None)
        expected = Sampler().sample(logits, fresh, newest).token_ids.tolist()
        found = Sampler().sample(logits, planned, newest).token_ids
        assert found.tolist() == expected, step
        for output, token in zip(outputs, pending or [], strict=False):
            output.append(token)
        newest = found
    assert plan._penalties is not None
    assert plan._penalties.counts is not None
    assert plan._penalties.counts.sum().item() == 12 * len(plan._penalties.rows.numbers) - 3  # the last is not counted


def test_the_outputs_of_a_batch_that_goes_on_are_not_read_again():
    class Unread(list):  # type: ignore[type-arg]
        def __iter__(self):
            raise AssertionError("an output was read")

        def __len__(self):
            return 4

    params = SamplingParams(temperature=0.7, top_k=20, top_p=0.8, presence_penalty=1.5)
    outputs = [[1, 2, 3, 4] for _ in range(3)]
    plan = SamplingPlan([SamplingRow(params, seed=i, output_token_ids=outputs[i]) for i in range(3)], VOCAB)
    logits, newest = mx.zeros((3, VOCAB)), mx.array([1, 2, 3], dtype=mx.int32)
    Sampler().sample(logits, plan.metadata(np.arange(3), np.arange(3, dtype=np.int32)), newest)
    plan.rows = [SamplingRow(params, seed=i, output_token_ids=Unread()) for i in range(3)]
    followed = plan.metadata(np.arange(3), np.arange(3, dtype=np.int32), follows=True)
    assert followed.penalties is not None
    assert followed.penalties.output is None


@pytest.mark.parametrize("width", [4096, 151936 // 8, 1000])
@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("ties", [False, True])
def test_the_largest_values_are_found_in_blocks_as_by_a_sort(width, k, ties):
    rng = np.random.default_rng(width + k)
    x = rng.standard_normal((5, width)).astype(np.float32)
    if ties:
        x = np.round(x * 2) / 2
        x[0] = 1.0
        x[1, : width // 2] = 0.0
    assert np.array_equal(np.array(largest_of_blocks(mx.array(x), k)), -np.sort(-x, axis=-1)[:, :k])


def test_blocks_are_looked_at_only_where_that_is_less_work(monkeypatch):
    asked = []
    monkeypatch.setattr(top_weights, "largest_sorted", lambda x, k: asked.append(x.shape[-1]) or largest_sorted(x, k))
    for width, k in ((16384, 4), (16384, 17), (1000, 4), (16384 + 32, 4)):
        largest_of_blocks(mx.zeros((2, width)), k)
    assert asked == [4 * 256, 16384, 1000, 4 * 32]


@pytest.mark.parametrize(
    "wish", [{}, {"top_k": 2}, {"top_k": 2, "top_p": 0.9}, {"top_p": 0.9}, {"min_p": 0.1}, {"min_p": 0.1, "top_k": 3}]
)
@pytest.mark.parametrize("values", [[np.nan], [np.inf], [np.nan, np.inf], [-np.inf] * 4096])
def test_a_row_whose_largest_logit_is_not_finite_gives_no_token_whatever_filters_it_has(wish, values):
    logits = np.random.default_rng(0).standard_normal((2, 4096)).astype(np.float32)
    logits[1, : len(values)] = values
    rows = [SamplingRow(SamplingParams(**wish), seed=i) for i in range(2)]
    tokens = Sampler().sample(mx.array(logits), SamplingMetadata.build(rows, 4096)).token_ids.tolist()
    assert tokens[0] >= 0
    assert tokens[1] == -1
