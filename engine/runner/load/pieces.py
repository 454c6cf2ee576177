"""Evaluates weights in pieces, so that reading, converting and copying overlap and progress shows."""

from collections.abc import Callable, Iterable, Sequence

import mlx.core as mx

_PIECE_BYTES = 512 << 20
"""At most this much is begun at once (a single larger array aside)."""
_MIN_PIECES = 32
"""Small models are read in pieces too: a bar that never moves helps nobody."""
_CACHE_BYTES = 1 << 28
"""Buffers freed by conversions are given back when they reach this size."""


class Pieces:
    """Evaluates arrays of ``total`` bytes: a piece is begun before the one before it is waited for.

    Evaluating array by array would wait for the device each time; evaluating all at once would hold every stored
    array beside its converted one. Here it is two pieces of them at most. ``done`` counts the bytes complete.
    """

    def __init__(self, total: int) -> None:
        self.done = 0
        self._limit = min(_PIECE_BYTES, max(1, total // _MIN_PIECES))
        self._piece: list[mx.array] = []
        self._piece_bytes = 0
        self._begun: list[mx.array] = []
        self._begun_bytes = 0

    def add(self, *arrays: mx.array) -> None:
        """Take ``arrays``; where they fill a piece it is begun, and the one before it waited for."""
        self._piece += arrays
        self._piece_bytes += sum(array.nbytes for array in arrays)
        if self._piece_bytes >= self._limit:
            self._begin()

    def finish(self) -> None:
        """Complete all that was added."""
        self._begin()
        self._wait()

    def _begin(self) -> None:
        # Of several arrays MLX evaluates the last one first, and files are read fastest forwards.
        piece, num_bytes = self._piece[::-1], self._piece_bytes
        mx.async_eval(piece)  # type: ignore[no-untyped-call]
        self._wait()
        self._begun, self._begun_bytes = piece, num_bytes
        self._piece, self._piece_bytes = [], 0

    def _wait(self) -> None:
        mx.eval(self._begun)
        self.done += self._begun_bytes
        self._begun, self._begun_bytes = [], 0
        if mx.get_cache_memory() > _CACHE_BYTES:
            mx.clear_cache()


def evaluate(arrays: Sequence[mx.array], report: Callable[[int], None]) -> None:
    """Evaluate ``arrays``; ``report`` is told after each what is complete since the last time, often 0 bytes."""
    pieces, told = Pieces(sum(array.nbytes for array in arrays)), 0
    for array in arrays:
        pieces.add(array)
        report(pieces.done - told)
        told = pieces.done
    pieces.finish()
    report(pieces.done - told)


def in_file_order(parameters: Iterable[tuple[str, mx.array]], names: Iterable[str]) -> list[mx.array]:
    """The arrays of ``parameters`` as they lie in files whose tensors are ``names``.

    A parameter with another name (models rename and join what they load) stays behind its neighbour.
    """
    position = {name: number for number, name in enumerate(names)}
    placed: list[tuple[int, mx.array]] = []
    for name, array in parameters:
        before = placed[-1][0] if placed else 0
        placed.append((position.get(name, before), array))
    return [array for _, array in sorted(placed, key=lambda one: one[0])]
