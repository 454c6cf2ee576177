import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest

from engine.errors import RequestError
from engine.params.sampling_params import SamplingParams
from engine.runner.sampling import sampler as sampler_module
from engine.runner.sampling.sampler import Sampler, SamplerOutput
from engine.runner.sampling.sampling_metadata import SamplingMetadata, SamplingRow, check_token_ids, uniforms
from tests.engine.runner.sampling.exact import chi_square, reference_logits, reference_probabilities

NEG_INF = -np.inf


def sample(logits: np.ndarray, rows: Sequence[SamplingRow], pending: Sequence[int] | None = None) -> SamplerOutput:
    metadata = SamplingMetadata.build(rows, logits.shape[-1])
    lazy_pending = None if pending is None else mx.array(pending, dtype=mx.int32)
    return Sampler().sample(mx.array(logits.astype(np.float32)), metadata, lazy_pending)


def token_ids(logits: np.ndarray, rows: Sequence[SamplingRow], pending: Sequence[int] | None = None) -> list[int]:
    return sample(logits, rows, pending).token_ids.tolist()


def random_row(rng: np.random.Generator, vocab_size: int, pending_row: int | None) -> SamplingRow:
    def ids(most: int) -> list[int]:
        return rng.integers(0, vocab_size, rng.integers(0, most + 1)).tolist()

    def maybe(value, otherwise, chance=0.4):
        return value if rng.random() < chance else otherwise

    params = SamplingParams(
        temperature=maybe(0.0, float(rng.uniform(0.3, 2)), 0.25),
        top_p=maybe(float(rng.uniform(0.05, 0.99)), 1.0, 0.5),
        top_k=maybe(int(rng.integers(1, vocab_size + 5)), 0, 0.5),
        min_p=maybe(float(rng.uniform(0, 0.3)), 0.0),
        presence_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        frequency_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        repetition_penalty=maybe(float(rng.uniform(0.5, 2)), 1.0),
        logit_bias={i: float(rng.uniform(-5, 5)) for i in maybe(ids(4), [])},
        allowed_token_ids=maybe(ids(30), None, 0.2) or None,
        min_tokens=maybe(6, 0),
        stop_token_ids=ids(3),
        logprobs=maybe(int(rng.integers(0, 6)), None, 0.3),
    )
    output = ids(8)
    last = output[-1:]
    return SamplingRow(
        params,
        seed=int(rng.integers(-(2**63), 2**63)),
        position=int(rng.integers(0, 5000)),
        prompt_token_ids=ids(12),
        output_token_ids=output,
        pending_row=pending_row,
        eos_token_ids=frozenset(ids(2)),
        bad_words_ids=maybe([ids(1) or [0], [*last, *(ids(1) or [1]), 2], [*last, 3]], []),
    )


def random_batch(seed: int) -> tuple[np.ndarray, list[SamplingRow], list[int]]:
    rng = np.random.default_rng(seed)
    vocab_size = int(rng.choice([40, 256, 300]))
    num_rows = int(rng.integers(1, 7))
    pending = rng.integers(0, vocab_size, num_rows).tolist()
    rows = [random_row(rng, vocab_size, i if rng.random() < 0.5 else None) for i in range(num_rows)]
    logits = (rng.standard_normal((num_rows, vocab_size)) * rng.uniform(0.5, 5)).astype(np.float32)
    return logits, rows, pending


class Recorder:
    """Keeps the weights that the sampler draws from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.weights: list[np.ndarray] = []
        original = sampler_module._draw_weighted

        def draw(weights: mx.array, uniform: mx.array) -> mx.array:
            self.weights.append(np.array(weights, np.float64))
            return original(weights, uniform)

        monkeypatch.setattr(sampler_module, "_draw_weighted", draw)


@pytest.mark.parametrize("seed", range(60))
def test_every_row_of_a_mixed_batch_has_the_reference_distribution(seed, monkeypatch):
    monkeypatch.setattr(sampler_module, "_SORT_LIMIT", 16)
    recorder = Recorder(monkeypatch)
    logits, rows, pending = random_batch(seed)
    tokens = token_ids(logits, rows, pending)
    drawn = iter(recorder.weights[0] if recorder.weights else [])
    for i, row in enumerate(rows):
        expected_logits = reference_logits(logits[i], row, pending)
        if row.params.greedy:
            if not np.isfinite(expected_logits.max()):
                assert tokens[i] == -1
            else:
                assert expected_logits[tokens[i]] == pytest.approx(expected_logits.max(), abs=1e-5)
            continue
        weights = next(drawn)
        if not np.isfinite(expected_logits.max()):
            assert tokens[i] == -1
            continue
        expected, margin = reference_probabilities(expected_logits, row.params)
        if margin < 1e-5:
            continue
        np.testing.assert_allclose(weights / weights.sum(), expected, atol=2e-6, rtol=1e-4)
        assert weights[tokens[i]] > 0


@pytest.mark.parametrize("seed", range(25))
def test_a_rows_token_is_the_same_whatever_shares_its_batch_and_in_whatever_row(seed):
    logits, rows, pending = random_batch(seed)
    together = token_ids(logits, rows, pending)
    order = np.random.default_rng(seed).permutation(len(rows))
    shuffled = token_ids(logits[order], [rows[i] for i in order], pending)
    assert shuffled == [together[i] for i in order]
    for i, row in enumerate(rows):
        assert token_ids(logits[i : i + 1], [row], pending) == [together[i]]


def test_the_same_seed_and_position_give_the_same_token_and_others_differ():
    logits = np.zeros((1, 1000), np.float32)

    def at(seed: int, position: int) -> list[int]:
        return token_ids(logits, [SamplingRow(SamplingParams(), seed=seed, position=position)])

    assert at(7, 3) == at(7, 3)
    assert len({at(7, position)[0] for position in range(20)}) > 15
    assert len({at(seed, 3)[0] for seed in range(-10, 10)}) > 15


def test_uniforms_are_uniform_independent_and_below_one():
    values = uniforms([1] * 200_000, range(200_000))
    assert values.min() >= 0
    assert values.max() < 1
    for column in values.T:
        counts, _ = np.histogram(column, bins=50, range=(0, 1))
        assert chi_square(counts, np.full(50, 1 / 50)) < 5
    assert abs(np.corrcoef(values.T)[0, 1]) < 0.01
    assert abs(np.corrcoef(values[1:, 0], values[:-1, 0])[0, 1]) < 0.01
    by_seed = uniforms(range(100_000), [5] * 100_000)
    assert abs(np.corrcoef(by_seed[1:, 0], by_seed[:-1, 0])[0, 1]) < 0.015
    assert len(np.unique(by_seed[:, 0])) > 99_000


def test_half_a_million_draws_never_give_a_forbidden_token_and_reach_every_other():
    weights = np.where(np.arange(60) % 2, 10.0 ** -(np.arange(60) / 20), 0).astype(np.float32)
    counts = np.zeros(60)
    for batch in range(25):
        pairs = mx.array(uniforms([batch] * 20_000, range(20_000)))
        rows = mx.broadcast_to(mx.array(weights), (20_000, 60))
        counts += np.bincount(np.array(sampler_module._draw_weighted(rows, pairs)), minlength=60)
    assert counts[weights == 0].sum() == 0
    assert counts[weights > 0].min() > 0
    assert abs(chi_square(counts, weights / weights.sum())) < 5


@pytest.mark.parametrize("edge", [0.0, 2.0**-24, 0.5, 1 - 2.0**-24])
@pytest.mark.parametrize("vocab_size", [3, 255, 256, 257, 1000])
def test_edge_uniforms_never_give_a_token_of_probability_zero(edge, vocab_size):
    rng = np.random.default_rng(vocab_size)
    weights = np.where(rng.random((200, vocab_size)) < 0.05, rng.random((200, vocab_size)), 0)
    weights *= 10.0 ** rng.uniform(-30, 0, weights.shape)
    weights[np.arange(200), rng.integers(0, vocab_size, 200)] = 1
    for other in (0.0, 1 - 2.0**-24):
        pairs = mx.array(np.tile(np.float32([edge, other]), (200, 1)))
        drawn = sampler_module._draw_weighted(mx.array(weights.astype(np.float32)), pairs).tolist()
        assert all(weights.astype(np.float32)[i, token] > 0 for i, token in enumerate(drawn))


def test_a_uniform_that_rounding_pushes_to_the_whole_still_gives_a_possible_token():
    weights = mx.array([[0.0, 1.0, 0.25, 0.0]])
    index, _ = sampler_module._invert(weights, mx.array([[1.0]]))
    assert index.tolist() == [[1]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top", [{}, {"top_k": 3}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.5, "min_p": 0.1}])
def test_rows_without_a_finite_largest_logit_give_minus_one_and_leave_others_alone(temperature, top):
    logits = np.random.default_rng(0).standard_normal((4, 50))
    logits[0] = np.nan
    logits[2] = NEG_INF
    params = SamplingParams(temperature=temperature, **top)
    rows = [SamplingRow(params, seed=i) for i in range(4)]
    tokens = token_ids(logits, rows)
    assert tokens[0] == tokens[2] == -1
    assert tokens[1] == token_ids(logits[1:2], rows[1:2])[0] >= 0
    assert tokens[3] == token_ids(logits[3:], rows[3:])[0] >= 0


def test_a_sampled_row_with_one_nan_or_infinite_logit_gives_minus_one():
    logits = np.zeros((2, 20))
    logits[0, 4] = np.nan
    logits[1, 4] = np.inf
    assert token_ids(logits, [SamplingRow(SamplingParams())] * 2) == [-1, -1]


def test_forbidding_every_allowed_token_gives_minus_one():
    params = SamplingParams(allowed_token_ids=[4], min_tokens=2, stop_token_ids=[4])
    assert token_ids(np.zeros((1, 20)), [SamplingRow(params)]) == [-1]


def test_min_tokens_counts_the_token_in_flight_and_forbids_end_and_stop_tokens_before():
    logits = np.zeros((1, 20))
    logits[0, [3, 5]] = [9, 8]
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[5])
    first = SamplingRow(params, output_token_ids=[1], eos_token_ids={3, 10**9})
    second = SamplingRow(params, output_token_ids=[1], pending_row=0, eos_token_ids={3})
    assert token_ids(logits, [first]) == [0]
    assert token_ids(logits, [second], [1]) == [3]


def test_a_bad_word_is_cut_at_its_last_token_also_when_its_beginning_is_still_in_flight():
    logits = np.zeros((1, 20))
    logits[0, 9] = 5
    params = SamplingParams(temperature=0)
    word = [[7, 8, 9]]
    known = SamplingRow(params, output_token_ids=[7, 8], bad_words_ids=word)
    in_flight = SamplingRow(params, output_token_ids=[7], pending_row=1, bad_words_ids=word)
    prompt_only = SamplingRow(params, prompt_token_ids=[7, 8], bad_words_ids=word)
    assert token_ids(logits, [known]) != [9]
    assert token_ids(logits, [in_flight], [0, 8]) != [9]
    assert token_ids(logits, [in_flight], [8, 0]) == [9]
    assert token_ids(logits, [prompt_only]) == [9]


def test_penalties_count_the_token_in_flight_like_any_other():
    logits = np.random.default_rng(2).standard_normal((1, 30)) * 3
    params = SamplingParams(temperature=0, frequency_penalty=1.5, presence_penalty=0.5, repetition_penalty=1.3)
    for last in range(30):
        lazy = SamplingRow(params, prompt_token_ids=[1, 2], output_token_ids=[last, 4], pending_row=0)
        known = SamplingRow(params, prompt_token_ids=[1, 2], output_token_ids=[last, 4, last])
        assert token_ids(logits, [lazy], [last]) == token_ids(logits, [known])


def test_an_invalid_token_in_flight_is_not_counted():
    logits = np.zeros((1, 10))
    logits[0, 0] = 1
    row = SamplingRow(SamplingParams(temperature=0, presence_penalty=2.0), pending_row=0)
    assert token_ids(logits, [row], [-1]) == [0]


def test_token_ids_outside_the_vocabulary_are_not_written_to_the_device():
    row = SamplingRow(
        SamplingParams(temperature=0, repetition_penalty=1.5, presence_penalty=1.0, min_tokens=3),
        prompt_token_ids=[-1, 500_000],
        output_token_ids=[10, 11],
        eos_token_ids={10},
    )
    logits = np.zeros((1, 10))
    logits[0, 3] = 1
    assert token_ids(logits, [row]) == [3]


def test_nothing_is_evaluated_while_sampling_so_steps_can_overlap(monkeypatch):
    def refuse(*_args):
        raise AssertionError("the sampler waited for the device")

    logits, rows, pending = random_batch(3)
    metadata = SamplingMetadata.build(rows, logits.shape[-1])
    lazy = mx.array(logits) * 1.0
    waiting = mx.array(pending, dtype=mx.int32) + 0
    with monkeypatch.context() as patch:
        patch.setattr(mx, "eval", refuse)
        output = Sampler().sample(lazy, metadata, waiting)
    mx.eval(output.token_ids)
    assert output.token_ids.dtype == mx.int32


def test_an_all_greedy_batch_is_an_argmax_and_builds_nothing_else():
    logits = np.random.default_rng(0).standard_normal((5, 700))
    rows = [SamplingRow(SamplingParams(temperature=0), prompt_token_ids=[1], pending_row=0)] * 5
    metadata = SamplingMetadata.build(rows, 700)
    assert metadata.draws is metadata.additions is metadata.allowed is metadata.penalties is None
    assert not metadata.needs_pending
    output = sample(logits, rows)
    assert output.logprobs is None
    assert output.token_ids.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("sort_limit", [1, 4, 33, 5000])
@pytest.mark.parametrize("top_p", [1e-40, 0.01, 0.5, 0.9, 0.999999])
def test_the_nucleus_of_the_whole_vocabulary_is_exact_up_to_the_rounding_of_its_mass(sort_limit, top_p, monkeypatch):
    monkeypatch.setattr(sampler_module, "_SORT_LIMIT", sort_limit)
    recorder = Recorder(monkeypatch)
    rng = np.random.default_rng(5)
    logits = np.stack([rng.standard_normal(1237) * scale for scale in (0.01, 0.5, 2, 8, 40)]).astype(np.float32)
    params = SamplingParams(top_p=top_p)
    tokens = token_ids(logits, [SamplingRow(params, seed=i) for i in range(5)])
    for row, token, weights in zip(logits, tokens, recorder.weights[0], strict=True):
        expected, margin = reference_probabilities(row.astype(np.float64), params)
        if margin > 1e-5:
            assert np.array_equal(weights > 0, expected > 0)
        else:
            differ = (weights > 0) != (expected > 0)
            assert np.maximum(weights / weights.sum(), expected)[differ].sum() < 5e-6
        assert weights[token] > 0


def test_tokens_that_tie_at_a_bound_are_all_kept_so_a_neighbours_top_k_cannot_choose_among_them(monkeypatch):
    recorder = Recorder(monkeypatch)
    logits = np.tile(np.float32([3, 1, 1, 1, 1, 0, 0, 0]), (4, 1))
    mix = [SamplingParams(top_k=k) for k in (2, 6)] + [SamplingParams(top_k=2, top_p=0.95), SamplingParams(top_p=0.9)]
    token_ids(logits, [SamplingRow(params) for params in mix])
    assert [np.count_nonzero(weights) for weights in recorder.weights[0]] == [5, 8, 5, 5]


def test_the_nucleus_of_top_k_counts_the_mass_of_ties_beyond_k(monkeypatch):
    recorder = Recorder(monkeypatch)
    token_ids(np.float32([[3, 1, 1, 1, 1, 0, 0, 0]]), [SamplingRow(SamplingParams(top_k=2, top_p=0.8))])
    assert np.count_nonzero(recorder.weights[0]) == 5


def test_min_p_of_one_keeps_the_likeliest_tokens():
    rows = [SamplingRow(SamplingParams(min_p=1.0), position=i) for i in range(30)]
    assert set(token_ids(np.tile([0.0, 7.0, 7.0, 6.9], (30, 1)), rows)) == {1, 2}


def test_a_long_vocabulary_loses_no_tail_mass_to_rounding():
    vocab_size, draws = 262_144, 64
    logits = np.full((draws, vocab_size), -14.0, np.float32)
    logits[:, 0] = 0
    rows = [SamplingRow(SamplingParams(), seed=1, position=i) for i in range(draws)]
    tail = [token for token in token_ids(logits, rows) if token]
    expected = (vocab_size - 1) * math.exp(-14) / (1 + (vocab_size - 1) * math.exp(-14))
    assert abs(len(tail) / draws - expected) < 4 * math.sqrt(expected * (1 - expected) / draws)
    assert len(set(tail)) == len(tail)


def test_tokens_outside_the_vocabulary_are_refused_at_the_door():
    check_token_ids(SamplingParams(logit_bias={9: 1.0}, allowed_token_ids=[0]), 10)
    with pytest.raises(RequestError, match=r"token_id\(s\) \[10\] in logit_bias contain out-of-vocab") as refused:
        check_token_ids(SamplingParams(logit_bias={10: 1.0}), 10)
    assert refused.value.param == "logit_bias"
    with pytest.raises(RequestError, match="allowed_token_ids"):
        check_token_ids(SamplingParams(allowed_token_ids=[-1]), 10)
