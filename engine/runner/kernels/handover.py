"""What a decoder layer leaves for the one behind it, beside its rows."""

from typing import Generic, TypeVar

import mlx.core as mx

T = TypeVar("T")


class Handover(Generic[T]):
    """What a layer's launches made of its rows, for the layer that gets them next.

    A model passes on the very array that a layer gave it: who gets that one takes what lies here; of whatever else
    comes nothing is known. An array that was changed in place is the same one, and not told apart: only for loops
    that change none.
    """

    def __init__(self) -> None:
        self._left: tuple[mx.array, T] | None = None

    def leave(self, rows: mx.array, made: T | None) -> mx.array:
        """``rows`` as the model passes them on, of which ``made`` is known; None: nothing is."""
        self._left = None if made is None else (rows, made)
        return rows

    def take(self, rows: mx.array) -> T | None:
        """What was left of ``rows``, once; None if they are others."""
        left, self._left = self._left, None
        return left[1] if left is not None and left[0] is rows else None
