"""Sampling for a whole batch on the device, in vLLM v1's order.

1. raw logprobs: log_softmax of the float32 logits, where a row asks for them; then the grammar's mask
2. ``allowed_token_ids``
3. ``bad_words``
4. ``min_tokens`` (stop and end tokens are forbidden) and ``logit_bias``
5. penalties: repetition (prompt and output: > 0 divided, < 0 multiplied), then frequency x count
   and presence (output only)
6. temperature 0: the argmax of these logits
7. otherwise temperature, then min_p, top_k, top_p, then one draw
8. a token that a guide forces replaces the row's own

Steps 2 to 4 only add to logits (a bias, or -inf), so they are one sparse addition. In step 7 a
token's weight is its probability over the likeliest token's, and each filter keeps the weights
that reach a bound, so together they are one bound per row; tokens that tie with the last one kept
are kept too. A row's bound and draw use its own numbers and uniforms only, so its token does not
depend on the rest of the batch.

On a GPU one kernel does steps 5 to 7 in one launch, but for repetition penalties
(:mod:`engine.runner.kernels.draw_rows`); without it each of them is some operations of MLX's.

Everything returned is lazy. A row without a finite largest logit (NaN, or every token forbidden)
gives token id -1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from engine.outputs import Logprob, LogprobsAtPosition
from engine.runner.device.host import to_numpy
from engine.runner.kernels.best_rows import BestRows
from engine.runner.kernels.draw_rows import LOG2_E, DrawRows, takes
from engine.runner.sampling.sampling_metadata import SamplingMetadata
from engine.runner.sampling.sampling_parts import Additions, Bitmask, Draws, Nucleus, Penalties, Ranked
from engine.runner.sampling.top_weights import block_size, largest_of_blocks, largest_sorted

INVALID_TOKEN_ID = -1
"""What a row without a finite largest logit gives."""
_BLOCK = 256
"""Tokens per block of a two-step sum or draw: short sums keep float32 exact enough for 262k tokens."""
_SORT_LIMIT = 1024
"""Sort no more than this many values on the CPU, where a full sort costs as much as a layer."""


@dataclass(frozen=True, slots=True)
class LogprobArrays:
    """Raw log-probabilities of R positions: of the taken token, its rank, and the K likeliest ones.

    ``sampled_ids``, ``sampled_logprobs``, ``sampled_ranks`` [R]; ``top_ids``, ``top_logprobs`` [R, K], likeliest
    first, lower ids first among equals.
    """

    sampled_ids: mx.array
    sampled_logprobs: mx.array
    sampled_ranks: mx.array
    top_ids: mx.array
    top_logprobs: mx.array

    @property
    def arrays(self) -> list[mx.array]:
        """All of them, to evaluate together."""
        return [self.sampled_ids, self.sampled_logprobs, self.sampled_ranks, self.top_ids, self.top_logprobs]

    def numpy(self) -> "HostLogprobs":
        """The values, as numpy arrays; waits for the device."""
        mx.eval(self.arrays)
        return HostLogprobs(*map(to_numpy, self.arrays))


@dataclass(frozen=True, slots=True)
class HostLogprobs:
    """:class:`LogprobArrays` read by the host."""

    sampled_ids: np.ndarray
    sampled_logprobs: np.ndarray
    sampled_ranks: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


@dataclass(frozen=True, slots=True)
class SamplerOutput:
    """``token_ids`` [R] int32 and, where a row asked, logprobs of all R rows. Lazy."""

    token_ids: mx.array
    logprobs: LogprobArrays | None = None


class Sampler:
    """Takes one token per row of logits, by the kernel ``draw_rows`` where there is one that knows them.

    Where nothing but the likeliest tokens is asked for, by ``best_rows``.
    """

    def __init__(self, draw_rows: DrawRows | None = None, best_rows: BestRows | None = None) -> None:
        self._draw_rows = draw_rows
        self._best_rows = best_rows

    def sample(self, logits: mx.array, metadata: SamplingMetadata, pending: mx.array | None = None) -> SamplerOutput:
        """Sample ``logits`` [R, V]; ``pending`` are the token ids of the step in flight, still lazy."""
        assert logits.shape == (metadata.num_rows, metadata.vocab_size), "metadata was built for other logits"
        assert pending is not None or not metadata.needs_pending, "a row waits for a token of the step in flight"
        by_kernel = takes(logits.dtype, metadata.vocab_size)
        if self._best_rows is not None and metadata.argmax_only and by_kernel:
            token_ids = self._best_rows(logits)
        elif self._draw_rows is not None and by_kernel:
            token_ids = _by_kernel(self._draw_rows, logits, metadata, pending)
        else:
            if not metadata.argmax_only:
                logits = logits.astype(mx.float32)
            token_ids = _take(_process(logits, metadata, pending), metadata)
        if metadata.forced is not None:
            forced = mx.array(metadata.forced)
            token_ids = mx.where(forced >= 0, forced, token_ids)
        if metadata.num_logprobs is None:
            return SamplerOutput(token_ids)
        return SamplerOutput(token_ids, _logprobs(logits.astype(mx.float32), token_ids, metadata.num_logprobs))

    def prompt_logprobs(self, logits: mx.array, next_ids: mx.array, num_logprobs: int) -> LogprobArrays:
        """Logprobs of ``next_ids`` [T] under ``logits`` [T, V]; ``num_logprobs`` -1 is the whole vocabulary.

        Needs about five times the logits' memory while it runs: evaluate long prompts in pieces.
        """
        vocab_size = logits.shape[-1]
        k = vocab_size if num_logprobs == -1 else min(num_logprobs, vocab_size)
        return _logprobs(logits.astype(mx.float32), next_ids.astype(mx.int32), k)


def to_logprobs(arrays: HostLogprobs, row: int, num: int, decode: Callable[[int], str]) -> LogprobsAtPosition:
    """One position's logprobs: the taken token first, then the ``num`` likeliest (-1: all of ``arrays``).

    Empty for a row that gave no token.
    """
    token_id = int(arrays.sampled_ids[row])
    if token_id == INVALID_TOKEN_ID:
        return {}
    result = {token_id: Logprob(float(arrays.sampled_logprobs[row]), int(arrays.sampled_ranks[row]), decode(token_id))}
    ids = arrays.top_ids[row] if num == -1 else arrays.top_ids[row, :num]
    for rank, (top_id, logprob) in enumerate(zip(ids.tolist(), arrays.top_logprobs[row].tolist(), strict=False), 1):
        if top_id not in result:
            result[top_id] = Logprob(logprob, rank, decode(top_id))
    return result


def _by_kernel(draw_rows: DrawRows, logits: mx.array, metadata: SamplingMetadata, pending: mx.array | None) -> mx.array:
    """Token ids [R] of ``logits`` [R, V], whatever their element type."""
    penalties = metadata.penalties
    if penalties is None or not penalties.kept.by_kernel:
        if penalties is not None or metadata.masks:
            logits = _process(logits.astype(mx.float32), metadata, pending)
        counts = newest = None
    else:
        if metadata.masks:
            logits = _mask(logits.astype(mx.float32), metadata, pending)
        kept = penalties.kept
        if penalties.output is None:
            counts, newest = kept.counts, pending  # counted by the kernel, in place
        else:
            counts, newest = _counts(penalties, metadata.vocab_size, pending), kept.none_pending
            kept.counts = counts
    return draw_rows(logits, metadata.wishes.array, metadata.wishes.uniforms(metadata.uniforms), counts, newest)


def _process(logits: mx.array, metadata: SamplingMetadata, pending: mx.array | None) -> mx.array:
    """The mask and steps 2 to 5 on float32 ``logits`` [R, V]."""
    logits = _mask(logits, metadata, pending)
    return logits if metadata.penalties is None else _apply_penalties(logits, metadata.penalties, pending)


def _mask(logits: mx.array, metadata: SamplingMetadata, pending: mx.array | None) -> mx.array:
    """The mask and steps 2 to 4 on float32 ``logits`` [R, V]."""
    if metadata.bitmask is not None:
        logits = _apply_bitmask(logits, metadata.bitmask)
    if metadata.allowed is not None:
        logits = logits.at[metadata.allowed.rows.index].add(metadata.allowed.forbidden)
    if metadata.additions is not None:
        logits = _apply_additions(logits, metadata.additions, pending)
    return logits


def _apply_bitmask(logits: mx.array, bitmask: Bitmask) -> mx.array:
    rows = bitmask.rows
    # Unpacked here: on a CPU the shifts cost five times as much on MLX's side, and a byte per token is little.
    bits = np.unpackbits(bitmask.words.view(np.uint8), axis=1, count=logits.shape[1], bitorder="little")
    return rows.put(logits, mx.where(mx.array(bits.view(np.bool_)), rows.of(logits), -mx.inf))


def _apply_additions(logits: mx.array, additions: Additions, pending: mx.array | None) -> mx.array:
    values = mx.array(additions.values)
    if additions.conditional and pending is not None:
        waits = mx.array(additions.pending_rows)
        met = (waits < 0) | (pending[mx.maximum(waits, 0)] == mx.array(additions.expected))
        values = mx.where(met, values, 0.0)
    return logits.at[mx.array(additions.rows), mx.array(additions.token_ids)].add(values)


def _apply_penalties(logits: mx.array, penalties: Penalties, pending: mx.array | None) -> mx.array:
    kept = penalties.kept
    x = kept.rows.of(logits)
    counts = kept.counts = _counts(penalties, x.shape[-1], pending)
    if kept.repetition is not None and kept.prompt is not None:
        tokens = kept.prompt
        seen = counts.at[mx.array(tokens.entries), mx.array(tokens.token_ids)].add(1.0) > 0
        x = mx.where(seen, mx.where(x > 0, x / kept.repetition, x * kept.repetition), x)
    if kept.frequency is not None:
        x = x - kept.frequency * counts
    if kept.presence is not None:
        x = x - mx.where(counts > 0, kept.presence, 0.0)
    return kept.rows.put(logits, x)


def _counts(penalties: Penalties, vocab_size: int, pending: mx.array | None) -> mx.array:
    """How often each token stands in the outputs [P, V], pending ones included."""
    kept, output = penalties.kept, penalties.output
    if output is None:
        assert kept.counts is not None, "there was no step before"
        assert pending is not None, "the step before is the one in flight"
        # A row without a token (-1) has failed; what is counted for it does not matter.
        return kept.counts.at[kept.every, kept.rows.of(pending)].add(kept.ones)
    none = mx.zeros((len(kept.rows.numbers), vocab_size))
    counts = none.at[mx.array(output.entries), mx.array(output.token_ids)].add(1.0)
    if not penalties.conditional or pending is None:
        return counts
    waits = mx.array(penalties.pending_rows)
    token_ids = pending[mx.maximum(waits, 0)]
    known = ((waits >= 0) & (token_ids >= 0)).astype(mx.float32)
    return counts.at[kept.every, mx.maximum(token_ids, 0)].add(known)


def _take(logits: mx.array, metadata: SamplingMetadata) -> mx.array:
    """Steps 6 and 7: token ids [R]."""
    draws = metadata.draws
    if draws is None or metadata.uniforms is None:
        return _argmax(logits)
    token_ids = _draw(draws.rows.of(logits), draws, mx.array(metadata.uniforms))
    if draws.rows.all:
        return token_ids
    return mx.concatenate([token_ids, _argmax(draws.greedy.of(logits))])[draws.order]


def _argmax(logits: mx.array) -> mx.array:
    best = mx.argmax(logits, axis=-1)
    # Not mx.isfinite, which is six operations, nor the logit at ``best``: on CUDA MLX compiles that for seconds.
    finite = mx.abs(mx.max(logits, axis=-1)) < mx.inf
    return mx.where(finite, best.view(mx.int32), INVALID_TOKEN_ID)


def _draw(logits: mx.array, draws: Draws, uniforms: mx.array) -> mx.array:
    """Step 7 for rows [S, V] that are all drawn at random: token ids [S]."""
    weights = _weights(logits, draws.scale)
    if draws.min_p is not None:
        weights = mx.where(weights >= draws.min_p, weights, 0.0)
    ranked, nucleus = draws.ranked, draws.nucleus
    bound = mx.zeros((logits.shape[0], 1))
    if ranked is not None:
        bound = ranked.rows.put(bound, _ranked_bound(ranked.rows.of(weights), ranked))
    if nucleus is not None:
        bound = nucleus.rows.put(bound, _nucleus_bound(nucleus.rows.of(weights), nucleus))
    # False for NaN too: a row that has one has no other weight than 0 and NaN, so whatever its bound, nothing is left.
    return _draw_weighted(mx.where(weights >= bound, weights, 0.0), uniforms)


def _weights(logits: mx.array, scale: mx.array | float) -> mx.array:
    """Probabilities relative to the likeliest token's: 2**(scale * (logit - largest)).

    On Linux CPUs mx.power takes a third of mx.exp's time.
    """
    return mx.power(2.0, (logits - mx.max(logits, axis=-1, keepdims=True)) * scale)


def _ranked_bound(weights: mx.array, ranked: Ranked) -> mx.array:
    """The least weight [S, 1] that top_k and then top_p keep, from a sort of the largest k only."""
    largest = largest_of_blocks(weights, ranked.most)
    bound = mx.take_along_axis(largest, ranked.top_k - 1, axis=-1)
    if ranked.top_p is None:
        return bound
    kept = largest >= bound
    largest = mx.where(kept, largest, 0.0)
    # More tokens may tie at the bound than there are among the largest k.
    num_more = mx.sum(weights >= bound, axis=-1, keepdims=True) - mx.sum(kept, axis=-1, keepdims=True)
    total = mx.sum(largest, axis=-1, keepdims=True) + bound * num_more
    return mx.maximum(bound, _last_within(largest, 0.0, ranked.top_p * total))


def _last_within(largest: mx.array, above: mx.array | float, target: mx.array) -> mx.array:
    """The smallest weight that begins before the mass ``target``; ``above`` is the mass before the first."""
    before = above + mx.cumsum(largest, axis=-1) - largest
    return mx.min(mx.where(before < target, largest, 1.0), axis=-1, keepdims=True)


def _nucleus_bound(weights: mx.array, nucleus: Nucleus) -> mx.array:
    """The least weight [S, 1] that top_p keeps, over the whole vocabulary, exactly.

    A quickselect by mass: split the values into a larger and a smaller half, keep the half in
    which the nucleus ends, and sort what remains. Shapes do not depend on values, so it stays
    lazy; on the CPU it costs less than half of a sort, and elsewhere one sort is fastest.
    """
    target = nucleus.top_p * _mass(weights)
    above = mx.zeros_like(target)
    limit = _SORT_LIMIT if mx.default_device() == mx.cpu else weights.shape[-1]
    while (n := weights.shape[-1]) > limit:
        half = n // 2
        parts = mx.partition(weights, n - half, axis=-1)
        smaller, larger = parts[:, : n - half], parts[:, n - half :]
        mass = above + _mass(larger)
        ends_here = mass >= target
        if n % 2:
            larger = mx.pad(larger, [(0, 0), (0, 1)])
        weights = mx.where(ends_here, larger, smaller)
        above = mx.where(ends_here, above, mass)
    return _last_within(largest_sorted(weights, weights.shape[-1]), above, target)


def _draw_weighted(weights: mx.array, uniforms: mx.array) -> mx.array:
    """Draw from ``weights`` [S, V] >= 0: a block by its mass, then a token in it; -1 for no mass."""
    blocks = _blocks(weights)
    size = blocks.shape[-1]
    block, mass = _invert(mx.sum(blocks, axis=-1), uniforms[:, :1])
    chosen = mx.take_along_axis(blocks, block[..., None], axis=1)[:, 0]
    offset, _ = _invert(chosen, uniforms[:, 1:])
    valid = (mass > 0) & (mass < mx.inf)
    return mx.where(valid, block * size + offset, INVALID_TOKEN_ID)[:, 0]


def _blocks(weights: mx.array) -> mx.array:
    """``weights`` [S, V] as blocks [S, V / size, size]; what is missing in the last one is 0."""
    num_rows, width = weights.shape
    size = block_size(width) or _BLOCK
    if width % size:
        weights = mx.pad(weights, [(0, 0), (0, -width % size)])
    return weights.reshape(num_rows, -1, size)


def _mass(weights: mx.array) -> mx.array:
    """The sum [S, 1] of ``weights`` [S, V], block by block.

    On the CPU MLX adds a whole row in a few float32 numbers, in which a likely token hides the vocabulary's tail: 2e-4
    of the mass at 150k tokens. On a GPU the second sum is one small launch.
    """
    return mx.sum(mx.sum(_blocks(weights), axis=-1), axis=-1, keepdims=True)


def _invert(weights: mx.array, uniform: mx.array) -> tuple[mx.array, mx.array]:
    """The first index [S, 1] whose cumulated weight exceeds ``uniform`` of the whole, and the whole.

    An index of weight 0 is never taken: if rounding leaves none above, the heaviest is.
    """
    cumulated = mx.cumsum(weights, axis=-1)
    whole = cumulated[:, -1:]
    hit = (cumulated > uniform * whole) & (weights > 0)
    return mx.argmax(mx.where(hit, mx.inf, weights), axis=-1, keepdims=True).view(mx.int32), whole


def _logprobs(logits: mx.array, token_ids: mx.array, k: int) -> LogprobArrays:
    """Raw logprobs of ``token_ids`` [R] (-1 reads as token 0) and the ``k`` likeliest under ``logits`` [R, V]."""
    normaliser = _logsumexp(logits)
    taken = mx.take_along_axis(logits, mx.maximum(token_ids, 0)[:, None], axis=-1)
    ranks = 1 + mx.sum(logits > taken, axis=-1)
    top_ids = _top_ids(logits, k)
    top = mx.take_along_axis(logits, top_ids, axis=-1)
    return LogprobArrays(token_ids, (taken - normaliser)[:, 0], ranks, top_ids, top - normaliser)


def _logsumexp(logits: mx.array) -> mx.array:
    return mx.max(logits, axis=-1, keepdims=True) + mx.log(_mass(_weights(logits, LOG2_E)))


def _top_ids(logits: mx.array, k: int) -> mx.array:
    """Ids [R, k] of the largest logits, largest first, lower ids first among equals.

    Sorts integers that hold the logit's order in the high bits and the id below, so that the
    choice among equal logits does not depend on the device's sort.
    """
    num_rows, vocab_size = logits.shape
    if k == 0:
        return mx.zeros((num_rows, 0), mx.int32)
    bits = (logits + 0.0).view(mx.int32)
    ordered = mx.where(bits < 0, bits ^ 0x7FFFFFFF, bits).astype(mx.int64)
    keys = (ordered << 32) | (vocab_size - 1 - mx.arange(vocab_size)).astype(mx.int64)
    return (vocab_size - 1 - (largest_sorted(keys, k) & 0xFFFFFFFF)).astype(mx.int32)
