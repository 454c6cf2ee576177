import mlx.core as mx
import numpy as np
import pytest

from engine.params.sampling_params import SamplingParams
from engine.runner.sampling.sampler import Sampler, to_logprobs
from engine.runner.sampling.sampling_metadata import SamplingRow
from tests.engine.runner.sampling.test_sampler import sample


def test_logprobs_are_raw_whatever_is_done_to_the_logits_afterwards():
    logits = np.random.default_rng(4).standard_normal((2, 300)).astype(np.float32) * 4
    logits[1] -= 30
    params = SamplingParams(logprobs=4, temperature=0.3, repetition_penalty=2.0, top_k=1, logit_bias={7: 100.0})
    output = sample(logits, [SamplingRow(params, prompt_token_ids=[1, 2]), SamplingRow(SamplingParams())])
    assert output.logprobs is not None
    host = output.logprobs.numpy()
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    assert host.sampled_ids[0] == 7
    for row in range(2):
        token = host.sampled_ids[row]
        assert host.sampled_logprobs[row] == pytest.approx(expected[row, token], abs=1e-5)
        assert host.sampled_ranks[row] == 1 + (logits[row] > logits[row, token]).sum()
        assert host.top_ids[row].tolist() == np.argsort(-logits[row], kind="stable")[:4].tolist()
        np.testing.assert_allclose(host.top_logprobs[row], np.sort(expected[row])[::-1][:4], atol=1e-5)


@pytest.mark.parametrize("vocab_size", [151936, 32003])  # many blocks, and a last one that is not whole
def test_probabilities_over_a_vocabulary_make_one(vocab_size):
    """Against float64: a float32 sum in one go loses 2e-4 of the tail."""
    logits = (4 * np.random.default_rng(0).standard_normal((3, vocab_size))).astype(np.float32)
    arrays = Sampler().prompt_logprobs(mx.array(logits), mx.array([1, 2, 3]), -1).numpy()
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    expected = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    np.testing.assert_allclose(np.exp(arrays.top_logprobs.astype(np.float64)).sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(arrays.sampled_logprobs, expected[range(3), [1, 2, 3]], atol=1e-5)


def test_equally_likely_tokens_are_listed_by_id():
    logits = np.float32([[0, 1, -0.0, 1, 0, -1]])
    arrays = Sampler().prompt_logprobs(mx.array(logits), mx.array([2]), 5).numpy()
    assert arrays.top_ids.tolist() == [[1, 3, 0, 2, 4]]
    assert arrays.sampled_ranks.tolist() == [3]


def test_prompt_logprobs_cover_every_position_and_the_whole_vocabulary_when_asked():
    logits = np.random.default_rng(6).standard_normal((7, 50)).astype(np.float32)
    next_ids = mx.array(np.arange(7), dtype=mx.int32)
    arrays = Sampler().prompt_logprobs(mx.array(logits), next_ids, -1).numpy()
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert arrays.top_ids.shape == (7, 50)
    np.testing.assert_allclose(arrays.sampled_logprobs, expected[np.arange(7), np.arange(7)], atol=1e-5)
    np.testing.assert_allclose(np.exp(arrays.top_logprobs).sum(-1), 1, atol=1e-5)
    none = Sampler().prompt_logprobs(mx.array(logits), next_ids, 0).numpy()
    assert none.top_ids.shape == (7, 0)


def test_a_positions_logprobs_list_the_sampled_token_first_and_never_twice():
    logits = mx.array([[0.0, 3.0, 2.0, 1.0]])
    unlikely = Sampler().prompt_logprobs(logits, mx.array([0]), 3).numpy()
    listed = to_logprobs(unlikely, 0, 2, str)
    assert list(listed) == [0, 1, 2]
    assert [entry.rank for entry in listed.values()] == [4, 1, 2]
    assert listed[0].decoded_token == "0"
    likeliest = Sampler().prompt_logprobs(logits, mx.array([1]), 3).numpy()
    assert list(to_logprobs(likeliest, 0, 2, str)) == [1, 2]
    assert list(to_logprobs(likeliest, 0, 0, str)) == [1]
    assert list(to_logprobs(likeliest, 0, -1, str)) == [1, 2, 3]


def test_a_row_that_gave_no_token_lists_no_logprobs():
    output = sample(np.full((1, 9), np.nan), [SamplingRow(SamplingParams(temperature=0, logprobs=2))])
    assert output.logprobs is not None
    assert to_logprobs(output.logprobs.numpy(), 0, 2, str) == {}
