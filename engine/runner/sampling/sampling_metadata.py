"""What one step's sampling needs, gathered on the host.

A field that no row uses stays ``None`` and costs nothing on the device. Nothing here depends on
which other rows share the step, so neither does any row's token.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from engine.core.token_guide import TokenGuide
from engine.errors import RequestError
from engine.params.sampling_params import SamplingParams
from engine.runner.kernels.draw_rows import KEEP_ALL, LOG2_E
from engine.runner.sampling.row_wishes import RowWishes
from engine.runner.sampling.sampling_parts import (
    Additions,
    AllowedTokens,
    Bitmask,
    Draws,
    Float32,
    Int32,
    Nucleus,
    Penalties,
    PenaltyRows,
    Ranked,
    Rows,
    TokenList,
)


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One row of logits and what its request asks for.

    ``position`` is the index, in prompt and output together, of the token to be sampled; with
    ``seed`` it alone decides the row's random draw. ``output_token_ids`` are those known to the
    host; if the last token was sampled by a step still in flight, ``pending_row`` is its index in
    that step's token ids. Both may change while a :class:`SamplingPlan` serves the row, and the output grow.
    """

    params: SamplingParams
    seed: int = 0
    position: int = 0
    prompt_token_ids: Sequence[int] | Int32 = ()
    output_token_ids: Sequence[int] | Int32 = ()
    pending_row: int | None = None
    eos_token_ids: Collection[int] = ()
    bad_words_ids: Sequence[Sequence[int]] = ()
    guide: TokenGuide | None = None

    @property
    def num_output_tokens(self) -> int:
        """Sampled tokens, the one in flight included."""
        return len(self.output_token_ids) + (self.pending_row is not None)


@dataclass(frozen=True, slots=True)
class SamplingMetadata:
    """One step's sampling. ``num_logprobs`` is the most alternatives any row wants, None for no logprobs.

    ``uniforms`` [S, 2] in [0, 1), one pair for each of ``draws``, come from (seed, position) alone.
    """

    num_rows: int
    vocab_size: int
    wishes: RowWishes
    draws: Draws | None = None
    uniforms: Float32 | None = None
    additions: Additions | None = None
    bitmask: Bitmask | None = None
    forced: Int32 | None = None
    """Per row the token that comes whatever the logits say, -1 for none."""
    allowed: AllowedTokens | None = None
    penalties: Penalties | None = None
    num_logprobs: int | None = None

    @staticmethod
    def build(rows: Sequence[SamplingRow], vocab_size: int) -> "SamplingMetadata":
        """Gather what ``rows`` (in the order of the logits' rows) need."""
        pending = _int32(-1 if row.pending_row is None else row.pending_row for row in rows)
        return SamplingPlan(rows, vocab_size).metadata(_int32(row.position for row in rows), pending)

    @property
    def argmax_only(self) -> bool:
        """Whether the likeliest token of each row is all that is asked for."""
        changes = (self.draws, self.additions, self.bitmask, self.allowed, self.penalties, self.num_logprobs)
        return all(part is None for part in changes)

    @property
    def masks(self) -> bool:
        """Whether anything is forbidden or added before the penalties."""
        return any(part is not None for part in (self.bitmask, self.allowed, self.additions))

    @property
    def needs_pending(self) -> bool:
        """Whether a row's result depends on tokens of the step in flight."""
        return any(part is not None and part.conditional for part in (self.additions, self.penalties))


class SamplingPlan:
    """The sampling of a batch as long as its requests and their values stay: a step looks only at what changes.

    Of a row the constant part is read here; its output grows, its guide moves on, and ``position`` and
    ``pending_row`` are given anew.
    """

    def __init__(self, rows: Sequence[SamplingRow], vocab_size: int) -> None:
        self.rows = rows
        self.vocab_size = vocab_size
        self._draws = _draws(rows, vocab_size)
        self._seeds = None if self._draws is None else _stream_starts(rows[i].seed for i in self._draws.rows.numbers)
        self._allowed = _allowed(rows, vocab_size)
        self._penalties = _penalty_rows(rows, vocab_size)
        self._wishes = RowWishes([row.params for row in rows], vocab_size, self._draws, self._penalties)
        self._guided = [i for i, row in enumerate(rows) if row.guide is not None]
        self._adding = [i for i, row in enumerate(rows) if _may_add(row)]
        self._num_logprobs = max_num_logprobs((row.params.logprobs for row in rows), vocab_size)

    def metadata(self, positions: Int32, pending_rows: Int32, *, follows: bool = False) -> SamplingMetadata:
        """A step of these rows; ``pending_rows`` [R] is -1 where the host knows the last token.

        ``follows``: the step before had this plan too, and every row's last token is its pending one.
        """
        draws, seeds = self._draws, self._seeds
        return SamplingMetadata(
            num_rows=len(self.rows),
            vocab_size=self.vocab_size,
            wishes=self._wishes,
            draws=draws,
            uniforms=None if draws is None or seeds is None else _uniforms(seeds, positions[draws.rows.numbers]),
            additions=self._additions(pending_rows) if self._adding else None,
            bitmask=self._bitmask() if self._guided else None,
            forced=self._forced() if self._guided else None,
            allowed=self._allowed,
            penalties=self._step_penalties(pending_rows, follows=follows),
            num_logprobs=self._num_logprobs,
        )

    def _step_penalties(self, pending_rows: Int32, *, follows: bool) -> Penalties | None:
        kept = self._penalties
        if kept is None:
            return None
        output = None
        if not follows or kept.counts is None:
            output = _token_list([self.rows[i].output_token_ids for i in kept.rows.numbers], self.vocab_size)
        return Penalties(kept, output, pending_rows[kept.rows.numbers])

    def _additions(self, pending_rows: Int32) -> Additions | None:
        found: list[_Addition] = []
        for i in self._adding:
            row, pending = self.rows[i], int(pending_rows[i])
            if row.bad_words_ids:
                found += _forbidden_words(i, row, pending)
            if len(row.output_token_ids) + (pending >= 0) < row.params.min_tokens:
                stops = {*row.params.stop_token_ids, *row.eos_token_ids}
                found += [(i, token_id, -np.inf, -1, -1) for token_id in stops]
            found += [(i, token_id, bias, -1, -1) for token_id, bias in row.params.logit_bias.items()]
        found = [entry for entry in found if 0 <= entry[1] < self.vocab_size]
        if not found:
            return None
        rows, token_ids, values, pending_of, expected = zip(*found, strict=True)
        return Additions(_int32(rows), _int32(token_ids), _float32(values), _int32(pending_of), _int32(expected))

    def _bitmask(self) -> Bitmask | None:
        words = np.zeros((len(self._guided), -(-self.vocab_size // 32)), dtype=np.int32)
        masked = []
        for entry, i in enumerate(self._guided):
            guide = self.rows[i].guide
            assert guide is not None, "only rows with a guide are asked"
            if guide.fill_bitmask(words[entry]):
                masked.append(entry)
        if not masked:
            return None
        return Bitmask(Rows(_int32(self._guided[entry] for entry in masked), len(self.rows)), words[masked])

    def _forced(self) -> Int32 | None:
        tokens = [row.guide.forced_token if row.guide is not None else None for row in self.rows]
        if all(token is None for token in tokens):
            return None
        return _int32(-1 if token is None else token for token in tokens)


def uniforms(seeds: Iterable[int], positions: Iterable[int]) -> Float32:
    """Two independent 24-bit uniforms in [0, 1) for each (seed, position), as float32 [N, 2].

    SplitMix64, its stream started at the mixed seed and indexed by position (Steele et al. 2014).
    """
    return _uniforms(_stream_starts(seeds), np.array(list(positions)))


_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _stream_starts(seeds: Iterable[int]) -> NDArray[np.uint64]:
    seed = np.array([value & 0xFFFFFFFFFFFFFFFF for value in seeds], np.uint64)
    with np.errstate(over="ignore"):
        return _mix64(seed + _GAMMA)


def _uniforms(starts: NDArray[np.uint64], positions: NDArray[np.integer]) -> Float32:
    with np.errstate(over="ignore"):
        bits = _mix64(starts + (positions.astype(np.uint64) + np.uint64(1)) * _GAMMA)
    high, low = bits >> np.uint64(40), (bits >> np.uint64(16)) & np.uint64(0xFFFFFF)
    return np.stack([high, low], axis=-1).astype(np.float32) * np.float32(2.0**-24)


def _mix64(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def max_num_logprobs(wanted: Iterable[int | None], vocab_size: int) -> int | None:
    """The widest of several ``logprobs`` values (-1 is the whole vocabulary); None if none is set."""
    return max(
        (vocab_size if value == -1 else min(value, vocab_size) for value in wanted if value is not None), default=None
    )


def check_token_ids(params: SamplingParams, vocab_size: int) -> None:
    """Refuse ``logit_bias`` and ``allowed_token_ids`` outside the vocabulary (RequestError)."""
    for name, given in (("logit_bias", params.logit_bias), ("allowed_token_ids", params.allowed_token_ids or ())):
        outside = [token_id for token_id in given if not 0 <= token_id < vocab_size]
        if outside:
            raise RequestError(
                f"token_id(s) {outside} in {name} contain out-of-vocab token ids. Vocabulary size: {vocab_size}",
                param=name,
            )
    for token_id, bias in params.logit_bias.items():
        if not bias < np.inf:
            raise RequestError(f"logit_bias of token {token_id} must be a number, got {bias}.", param="logit_bias")


def _int32(values: Iterable[int]) -> Int32:
    return np.array(list(values), np.int32)


def _float32(values: Iterable[float]) -> Float32:
    return np.array(list(values), np.float32)


def _column(values: Iterable[float]) -> mx.array:
    return mx.array(_float32(values))[:, None]


def _draws(rows: Sequence[SamplingRow], vocab_size: int) -> Draws | None:
    drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
    if not drawn:
        return None
    greedy = [i for i, row in enumerate(rows) if row.params.greedy]
    params = [rows[i].params for i in drawn]
    nucleus = [i for i, p in enumerate(params) if p.top_p < 1 and not 0 < p.top_k < vocab_size]
    return Draws(
        rows=Rows(_int32(drawn), len(rows)),
        greedy=Rows(_int32(greedy), len(rows)),
        order=mx.array(np.argsort([*drawn, *greedy]).astype(np.int32)),
        scale=_column(LOG2_E / p.temperature for p in params),
        min_p=_column(p.min_p for p in params) if any(p.min_p > 0 for p in params) else None,
        ranked=_ranked(params, vocab_size),
        nucleus=Nucleus(Rows(_int32(nucleus), len(params)), _column(params[i].top_p for i in nucleus))
        if nucleus
        else None,
    )


def _ranked(params: Sequence[SamplingParams], vocab_size: int) -> Ranked | None:
    ranked = [i for i, p in enumerate(params) if 0 < p.top_k < vocab_size]
    if not ranked:
        return None
    top_k, top_p = [params[i].top_k for i in ranked], [params[i].top_p for i in ranked]
    return Ranked(
        Rows(_int32(ranked), len(params)),
        mx.array(_int32(top_k))[:, None],
        max(top_k),
        _column(p if p < 1 else KEEP_ALL for p in top_p) if min(top_p) < 1 else None,
    )


_Addition = tuple[int, int, float, int, int]


def _may_add(row: SamplingRow) -> bool:
    return bool(row.bad_words_ids or row.params.logit_bias or row.params.min_tokens)


def _forbidden_words(index: int, row: SamplingRow, pending_row: int) -> Iterable[_Addition]:
    """Last tokens of bad words whose beginning the output ends with (prompts do not count, as in vLLM)."""
    for word in row.bad_words_ids:
        *prefix, last = word
        known = prefix
        pending, expected = -1, -1
        if prefix and pending_row >= 0:
            *known, expected = prefix
            pending = pending_row
        if _ends_with(row.output_token_ids, known):
            yield index, last, -np.inf, pending, expected


def _ends_with(tokens: Sequence[int] | Int32, tail: Sequence[int]) -> bool:
    return not tail or list(tokens[-len(tail) :]) == list(tail)


def _allowed(rows: Sequence[SamplingRow], vocab_size: int) -> AllowedTokens | None:
    limited = [(i, row.params.allowed_token_ids) for i, row in enumerate(rows) if row.params.allowed_token_ids]
    if not limited:
        return None
    tokens = _token_list([ids for _, ids in limited if ids is not None], vocab_size)
    return AllowedTokens(Rows(_int32(i for i, _ in limited), len(rows)), tokens.entries, tokens.token_ids, vocab_size)


def _penalty_rows(rows: Sequence[SamplingRow], vocab_size: int) -> PenaltyRows | None:
    chosen = [i for i, row in enumerate(rows) if _has_penalty(row.params)]
    if not chosen:
        return None
    params = [rows[i].params for i in chosen]
    repetition = [p.repetition_penalty for p in params]
    repeats = any(value != 1 for value in repetition)
    prompts = [rows[i].prompt_token_ids if value != 1 else () for i, value in zip(chosen, repetition, strict=True)]
    frequency, presence = ([getattr(p, f"{name}_penalty") for p in params] for name in ("frequency", "presence"))
    return PenaltyRows(
        Rows(_int32(chosen), len(rows)),
        _column(repetition) if repeats else None,
        _column(frequency) if any(frequency) else None,
        _column(presence) if any(presence) else None,
        _token_list(prompts, vocab_size) if repeats else None,
    )


def _has_penalty(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0


def _token_list(lists: Sequence[Sequence[int] | Int32], vocab_size: int) -> TokenList:
    arrays = [np.asarray(ids, np.int32) for ids in lists]
    token_ids = np.concatenate(arrays)
    entries = np.repeat(np.arange(len(arrays), dtype=np.int32), [len(ids) for ids in arrays])
    # An id outside the vocabulary would be a write outside the array on the device.
    inside = (token_ids >= 0) & (token_ids < vocab_size)
    return TokenList(entries[inside], token_ids[inside])
