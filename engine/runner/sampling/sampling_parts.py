"""The parts of one step's sampling: what a few of its rows ask for, as arrays.

What stays the same from step to step is on the device already, so that a step uploads only what changed.
"""

from dataclasses import dataclass, field
from functools import cached_property

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from engine.runner.kernels.draw_rows import FEWEST_ROWS

Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]


class Rows:
    """Some of an array's first-axis entries, in increasing order; all of them need no copy."""

    def __init__(self, numbers: Int32, num_rows: int) -> None:
        self.numbers = numbers
        self.num_rows = num_rows
        self.all = len(numbers) == num_rows

    @cached_property
    def index(self) -> mx.array:
        """The entries' numbers, on the device."""
        return mx.array(self.numbers)

    def of(self, array: mx.array) -> mx.array:
        """The chosen entries."""
        return array if self.all else array[self.index]

    def put(self, array: mx.array, values: mx.array) -> mx.array:
        """``array`` with the chosen entries replaced."""
        if self.all:
            return values
        result = mx.array(array)
        result[self.index] = values
        return result


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


@dataclass(frozen=True)
class AllowedTokens:
    """Rows that may only give listed tokens: entry i allows ``token_ids[i]`` in row ``entries[i]`` of ``rows``."""

    rows: Rows
    entries: Int32
    token_ids: Int32
    vocab_size: int

    @cached_property
    def forbidden(self) -> mx.array:
        """0 for what a row may give, else -inf [rows, V]."""
        forbidden = mx.full((len(self.rows.numbers), self.vocab_size), -mx.inf)
        forbidden[mx.array(self.entries), mx.array(self.token_ids)] = 0.0
        return forbidden


@dataclass(frozen=True, slots=True)
class Bitmask:
    """Rows under a grammar: bit ``t % 32`` of ``words[i, t // 32]`` allows token t in row i of ``rows``."""

    rows: Rows
    words: Int32


@dataclass(frozen=True, slots=True)
class TokenList:
    """Tokens of several rows, flat: entry i is ``token_ids[i]`` in the row numbered ``entries[i]``."""

    entries: Int32
    token_ids: Int32


@dataclass
class PenaltyRows:
    """P rows with penalties, as long as they run together. A penalty that none of them has is None, else [P, 1].

    ``prompt`` (for repetition) are the tokens of the prompts; ``counts`` [P, V] how often each token stands in
    the outputs, kept on the device from step to step. A kernel that samples counts pending tokens in place.
    """

    rows: Rows
    repetition: mx.array | None
    frequency: mx.array | None
    presence: mx.array | None
    prompt: TokenList | None
    counts: mx.array | None = field(default=None, repr=False)

    @cached_property
    def ones(self) -> mx.array:
        """One token more for each row [P]."""
        return mx.ones(len(self.rows.numbers))

    @cached_property
    def every(self) -> mx.array:
        """0, 1, ... P - 1."""
        return mx.arange(len(self.rows.numbers))

    @property
    def by_kernel(self) -> bool:
        """Whether a kernel that samples applies them, where one is in use: it knows no repetition penalty."""
        return self.repetition is None

    @cached_property
    def none_pending(self) -> mx.array:
        """For a kernel: no row [R, or 4 if those are fewer] has a token that is not counted yet."""
        return mx.full((max(self.rows.num_rows, FEWEST_ROWS),), -1, mx.int32)


@dataclass(frozen=True, slots=True)
class Penalties:
    """A step's penalties. ``output``: the tokens known; None: those of the step before, and then the pending ones."""

    kept: PenaltyRows
    output: TokenList | None
    pending_rows: Int32

    @property
    def conditional(self) -> bool:
        """Whether any row has a pending token."""
        return bool((self.pending_rows >= 0).any())


@dataclass(frozen=True, slots=True)
class Ranked:
    """Drawn rows that keep their ``top_k`` [N, 1] likeliest tokens, and of these the nucleus ``top_p`` [N, 1].

    ``most``: the largest top_k. ``top_p`` None: no row has one.
    """

    rows: Rows
    top_k: mx.array
    most: int
    top_p: mx.array | None


@dataclass(frozen=True, slots=True)
class Nucleus:
    """Drawn rows with a ``top_p`` [N, 1] and no top_k."""

    rows: Rows
    top_p: mx.array


@dataclass(frozen=True, slots=True)
class Draws:
    """S rows drawn at random; the others are ``greedy``.

    ``scale`` [S, 1] is log2(e) / temperature; ``min_p`` [S, 1], None where no row has one. ``ranked`` and ``nucleus``
    number their rows within these S. ``order`` puts drawn rows and then greedy ones back in their places.
    """

    rows: Rows
    greedy: Rows
    order: mx.array
    scale: mx.array
    min_p: mx.array | None
    ranked: Ranked | None
    nucleus: Nucleus | None
