"""Draws follow the exact distribution, with every filter and penalty; log-probabilities are those of float64."""

import mlx.core as mx
import numpy as np
import pytest

from engine.params.sampling_params import SamplingParams
from engine.runner.sampling.sampler import Sampler
from engine.runner.sampling.sampling_metadata import SamplingRow
from tests.engine.runner.sampling.test_sampler import sample
from tests.nightly import size
from tests.on_device.draws import CASES, Case, deviation_of, exact, found_of, logits_of

pytestmark = pytest.mark.timeout(3600)


@pytest.mark.nightly
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_draws_follow_the_exact_distribution_and_none_is_masked(case: Case) -> None:
    found = found_of(case, 96, size(50_000, 10_000_000), Sampler())
    assert found.right, str(found)


@pytest.mark.nightly
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[-1]], ids=lambda case: case.name)
def test_draws_from_several_blocks_of_logits_do_too(case: Case) -> None:
    found = found_of(case, 1536, size(20_000, 1_000_000), Sampler())
    assert found.right, str(found)


def test_a_slightly_wrong_distribution_is_found() -> None:
    """A hundredth more temperature, or a token too many, at the draws of a nightly run."""
    logits = logits_of(96)
    right = exact(Case("", SamplingParams(top_k=7)), logits)
    for wrong in (SamplingParams(top_k=7, temperature=1.01), SamplingParams(top_k=8)):
        counts = np.round(1e7 * exact(Case("", wrong), logits)).astype(np.int64)
        assert counts[right == 0].sum() > 0 or abs(deviation_of(counts, right)) > 5


@pytest.mark.nightly
@pytest.mark.parametrize("width", [7, 256, 32_003, 151_936])
def test_log_probabilities_are_within_1e_5_of_float64(width: int) -> None:
    rng = np.random.default_rng(width)
    for spread in (0.01, 1.0, 4.0, 12.0)[: size(3, 4)]:
        for shift in (0.0, -30.0, 25.0):
            logits = (spread * rng.standard_normal((4, width)) + shift).astype(np.float32)
            logits[0, width // 2 :] = -np.inf
            rows = [SamplingRow(SamplingParams(logprobs=5), seed=seed) for seed in range(4)]
            arrays = sample(logits, rows).logprobs
            assert arrays is not None
            host = arrays.numpy()
            shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
            expected = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
            np.testing.assert_allclose(host.sampled_logprobs, expected[range(4), host.sampled_ids], atol=1e-5, rtol=0)
            top = np.take_along_axis(expected, host.top_ids, axis=-1)
            np.testing.assert_allclose(host.top_logprobs, top, atol=1e-5, rtol=0)
            whole = Sampler().prompt_logprobs(mx.array(logits), mx.array(host.sampled_ids), -1).numpy()
            every = np.take_along_axis(expected, whole.top_ids, axis=-1)
            np.testing.assert_allclose(whole.top_logprobs, every, atol=1e-5, rtol=0)
