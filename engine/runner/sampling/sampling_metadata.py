"""What one step's sampling needs, gathered on the host as flat numpy arrays.

A field that no row uses stays ``None`` and costs nothing on the device. Nothing here depends on
which other rows share the step, so neither does any row's token.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from engine.core.token_guide import TokenGuide
from engine.errors import RequestError
from engine.params.sampling_params import SamplingParams

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]

LOG2_E = 1.4426950408889634
_KEEP_ALL = 2.0
"""A top_p above any possible mass: the row has no nucleus."""


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """One row of logits and what its request asks for.

    ``position`` is the index, in prompt and output together, of the token to be sampled; with
    ``seed`` it alone decides the row's random draw. ``output_token_ids`` are those known to the
    host; if the last token was sampled by a step still in flight, ``pending_row`` is its index in
    that step's token ids. Long ``prompt_token_ids`` are cheapest as numpy int32 arrays.
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
class Additions:
    """Values added to single logits (bias, or -inf to forbid), as a sparse list of N entries.

    An entry with ``pending_rows`` >= 0 counts only if that pending token equals ``expected``.
    """

    rows: Int32
    token_ids: Int32
    values: Float32
    pending_rows: Int32
    expected: Int32

    @property
    def conditional(self) -> bool:
        """Whether any entry waits for a pending token."""
        return bool((self.pending_rows >= 0).any())


@dataclass(frozen=True, slots=True)
class AllowedTokens:
    """Rows that may only give listed tokens: entry i allows ``token_ids[i]`` in ``rows[entries[i]]``."""

    rows: Int32
    entries: Int32
    token_ids: Int32


@dataclass(frozen=True, slots=True)
class Bitmask:
    """Rows under a grammar: bit ``t % 32`` of ``words[i, t // 32]`` allows token t in row ``rows[i]``."""

    rows: Int32
    words: Int32


@dataclass(frozen=True, slots=True)
class TokenList:
    """Tokens of several rows, flat: entry i is ``token_ids[i]`` in the row numbered ``entries[i]``."""

    entries: Int32
    token_ids: Int32


@dataclass(frozen=True, slots=True)
class Penalties:
    """P rows with penalties, and the tokens that they count (``prompt`` only for repetition)."""

    rows: Int32
    repetition: Float32
    frequency: Float32
    presence: Float32
    prompt: TokenList | None
    output: TokenList
    pending_rows: Int32

    @property
    def conditional(self) -> bool:
        """Whether any row has a pending token."""
        return bool((self.pending_rows >= 0).any())


@dataclass(frozen=True, slots=True)
class Ranked:
    """Sampled rows that keep their ``top_k`` likeliest tokens, and of these the nucleus ``top_p``."""

    rows: Int32
    top_k: Int32
    top_p: Float32

    @property
    def has_nucleus(self) -> bool:
        """Whether any of the rows also has a top_p."""
        return bool((self.top_p < 1).any())


@dataclass(frozen=True, slots=True)
class Nucleus:
    """Sampled rows with a ``top_p`` and no top_k."""

    rows: Int32
    top_p: Float32


@dataclass(frozen=True, slots=True)
class Draws:
    """S rows drawn at random. ``scale`` is log2(e) / temperature.

    ``uniforms`` [S, 2] in [0, 1) come from (seed, position) alone. ``ranked`` and ``nucleus``
    number their rows within these S.
    """

    rows: Int32
    scale: Float32
    min_p: Float32
    uniforms: Float32
    ranked: Ranked | None
    nucleus: Nucleus | None


@dataclass(frozen=True, slots=True)
class SamplingMetadata:
    """One step's sampling. ``num_logprobs`` is the most alternatives any row wants, None for no logprobs."""

    num_rows: int
    vocab_size: int
    greedy_rows: Int32
    draws: Draws | None = None
    additions: Additions | None = None
    bitmask: Bitmask | None = None
    forced: Int32 | None = None
    """Per row the token that comes whatever the logits say, -1 for none."""
    allowed: AllowedTokens | None = None
    penalties: Penalties | None = None
    num_logprobs: int | None = None

    @classmethod
    def build(cls, rows: Sequence[SamplingRow], vocab_size: int) -> Self:
        """Gather what ``rows`` (in the order of the logits' rows) need."""
        return cls(
            num_rows=len(rows),
            vocab_size=vocab_size,
            greedy_rows=_int32([i for i, row in enumerate(rows) if row.params.greedy]),
            draws=_draws(rows, vocab_size),
            additions=_additions(rows, vocab_size),
            bitmask=_bitmask(rows, vocab_size),
            forced=_forced(rows),
            allowed=_allowed(rows, vocab_size),
            penalties=_penalties(rows, vocab_size),
            num_logprobs=max_num_logprobs((row.params.logprobs for row in rows), vocab_size),
        )

    @property
    def needs_pending(self) -> bool:
        """Whether a row's result depends on tokens of the step in flight."""
        return any(part is not None and part.conditional for part in (self.additions, self.penalties))


def uniforms(seeds: Iterable[int], positions: Iterable[int]) -> Float32:
    """Two independent 24-bit uniforms in [0, 1) for each (seed, position), as float32 [N, 2].

    SplitMix64, its stream started at the mixed seed and indexed by position (Steele et al. 2014).
    """
    seed = np.array([value & 0xFFFFFFFFFFFFFFFF for value in seeds], np.uint64)
    position = np.array(list(positions), np.uint64)
    gamma = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        bits = _mix64(_mix64(seed + gamma) + (position + np.uint64(1)) * gamma)
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


def _int32(values: Iterable[int]) -> Int32:
    return np.array(list(values), np.int32)


def _float32(values: Iterable[float]) -> Float32:
    return np.array(list(values), np.float32)


def _draws(rows: Sequence[SamplingRow], vocab_size: int) -> Draws | None:
    drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
    if not drawn:
        return None
    params = [rows[i].params for i in drawn]
    ranked = [i for i, p in enumerate(params) if 0 < p.top_k < vocab_size]
    nucleus = [i for i, p in enumerate(params) if p.top_p < 1 and not 0 < p.top_k < vocab_size]
    return Draws(
        rows=_int32(drawn),
        scale=_float32(LOG2_E / p.temperature for p in params),
        min_p=_float32(p.min_p for p in params),
        uniforms=uniforms((rows[i].seed for i in drawn), (rows[i].position for i in drawn)),
        ranked=Ranked(
            _int32(ranked),
            _int32(params[i].top_k for i in ranked),
            _float32(params[i].top_p if params[i].top_p < 1 else _KEEP_ALL for i in ranked),
        )
        if ranked
        else None,
        nucleus=Nucleus(_int32(nucleus), _float32(params[i].top_p for i in nucleus)) if nucleus else None,
    )


_Addition = tuple[int, int, float, int, int]


def _additions(rows: Sequence[SamplingRow], vocab_size: int) -> Additions | None:
    found: list[_Addition] = []
    for i, row in enumerate(rows):
        params = row.params
        if row.bad_words_ids:
            found += _forbidden_words(i, row)
        if row.num_output_tokens < params.min_tokens:
            stops = {*params.stop_token_ids, *row.eos_token_ids}
            found += [(i, token_id, -np.inf, -1, -1) for token_id in stops]
        if params.logit_bias:
            found += [(i, token_id, bias, -1, -1) for token_id, bias in params.logit_bias.items()]
    found = [entry for entry in found if 0 <= entry[1] < vocab_size]
    if not found:
        return None
    row_numbers, token_ids, values, pending, expected = zip(*found, strict=True)
    return Additions(_int32(row_numbers), _int32(token_ids), _float32(values), _int32(pending), _int32(expected))


def _forbidden_words(index: int, row: SamplingRow) -> Iterable[_Addition]:
    """Last tokens of bad words whose beginning the output ends with (prompts do not count, as in vLLM)."""
    for word in row.bad_words_ids:
        *prefix, last = word
        known = prefix
        pending, expected = -1, -1
        if prefix and row.pending_row is not None:
            *known, expected = prefix
            pending = row.pending_row
        if _ends_with(row.output_token_ids, known):
            yield index, last, -np.inf, pending, expected


def _ends_with(tokens: Sequence[int] | Int32, tail: Sequence[int]) -> bool:
    return not tail or list(tokens[-len(tail) :]) == list(tail)


def _bitmask(rows: Sequence[SamplingRow], vocab_size: int) -> Bitmask | None:
    guided = [i for i, row in enumerate(rows) if row.guide is not None]
    if not guided:
        return None
    words = np.zeros((len(guided), -(-vocab_size // 32)), dtype=np.int32)
    masked = []
    for entry, i in enumerate(guided):
        guide = rows[i].guide
        assert guide is not None
        if guide.fill_bitmask(words[entry]):
            masked.append(entry)
    return Bitmask(_int32(guided[entry] for entry in masked), words[masked]) if masked else None


def _forced(rows: Sequence[SamplingRow]) -> Int32 | None:
    tokens = [row.guide.forced_token if row.guide is not None else None for row in rows]
    if all(token is None for token in tokens):
        return None
    return _int32(-1 if token is None else token for token in tokens)


def _allowed(rows: Sequence[SamplingRow], vocab_size: int) -> AllowedTokens | None:
    limited = [(i, row.params.allowed_token_ids) for i, row in enumerate(rows) if row.params.allowed_token_ids]
    if not limited:
        return None
    tokens = _token_list([ids for _, ids in limited if ids is not None], vocab_size)
    return AllowedTokens(_int32(i for i, _ in limited), tokens.entries, tokens.token_ids)


def _penalties(rows: Sequence[SamplingRow], vocab_size: int) -> Penalties | None:
    chosen = [i for i, row in enumerate(rows) if _has_penalty(row.params)]
    if not chosen:
        return None
    picked = [rows[i] for i in chosen]
    params = [row.params for row in picked]
    prompt = None
    if any(p.repetition_penalty != 1 for p in params):
        prompts = [row.prompt_token_ids if row.params.repetition_penalty != 1 else () for row in picked]
        prompt = _token_list(prompts, vocab_size)
    return Penalties(
        rows=_int32(chosen),
        repetition=_float32(p.repetition_penalty for p in params),
        frequency=_float32(p.frequency_penalty for p in params),
        presence=_float32(p.presence_penalty for p in params),
        prompt=prompt,
        output=_token_list([row.output_token_ids for row in picked], vocab_size),
        pending_rows=_int32(-1 if row.pending_row is None else row.pending_row for row in picked),
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
