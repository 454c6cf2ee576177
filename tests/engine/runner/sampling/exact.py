"""The exact distribution of a row's token, in float64 and in the order that the sampler promises."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.params.sampling_params import SamplingParams
from engine.runner.sampling.sampling_metadata import SamplingRow

Floats = NDArray[np.float64]


def reference_logits(logits: NDArray[Any], row: SamplingRow, pending: Sequence[int] = ()) -> Floats:
    """The logits [V] from which ``row`` draws: masks, biases and penalties, before temperature."""
    x = logits.astype(np.float64).copy()
    params = row.params
    output = list(row.output_token_ids) + ([] if row.pending_row is None else [pending[row.pending_row]])
    if params.allowed_token_ids:
        keep = x[list(params.allowed_token_ids)]
        x[:] = -np.inf
        x[list(params.allowed_token_ids)] = keep
    for word in row.bad_words_ids:
        prefix = list(word[:-1])
        if len(word) <= len(output) + 1 and (not prefix or output[-len(prefix) :] == prefix):
            x[word[-1]] = -np.inf
    if len(output) < params.min_tokens:
        x[[*params.stop_token_ids, *row.eos_token_ids]] = -np.inf
    for token_id, bias in params.logit_bias.items():
        x[token_id] += bias
    seen = list({*row.prompt_token_ids, *output})
    x[seen] = np.where(x[seen] > 0, x[seen] / params.repetition_penalty, x[seen] * params.repetition_penalty)
    for token_id in set(output):
        x[token_id] -= params.frequency_penalty * output.count(token_id) + params.presence_penalty
    return x


def reference_probabilities(x: Floats, params: SamplingParams) -> tuple[Floats, float]:
    """Probabilities [V], and how close top_p comes to cutting elsewhere (rounding may then decide)."""
    x = x / params.temperature
    p = np.exp(x - x.max())
    p /= p.sum()
    p[p < params.min_p * p.max()] = 0
    if params.top_k and params.top_k < len(p):
        p[p < np.sort(p)[-params.top_k]] = 0
    p /= p.sum()
    margin = 1.0
    if params.top_p < 1:
        order = np.argsort(-p, kind="stable")
        before = np.cumsum(p[order]) - p[order]
        margin = float(np.abs(before - params.top_p).min())
        last = p[order][before < params.top_p].min()
        p[p < last] = 0
    return p / p.sum(), margin


def chi_square(counts: NDArray[Any], expected: Floats) -> float:
    """Deviation from ``expected`` in standard deviations of the chi-square distribution."""
    total = counts.sum()
    used = expected > 0
    statistic = ((counts[used] - total * expected[used]) ** 2 / (total * expected[used])).sum()
    freedom = used.sum() - 1
    return float((statistic - freedom) / math.sqrt(2 * freedom))
