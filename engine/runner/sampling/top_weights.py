"""The largest values of each row of a wide array, without sorting the rows."""

import mlx.core as mx

_BLOCK = 256
_GAIN = 4
"""Blocks are looked at where the values in the chosen ones are at most so small a part of a row."""


def block_size(width: int) -> int | None:
    """A size of blocks that rows of ``width`` values divide into; None if they do into short ones only."""
    return next((size for size in (_BLOCK, 128, 64, 32) if width % size == 0), None)


def largest_sorted(x: mx.array, k: int) -> mx.array:
    """The ``k`` largest values of each row [R, V], largest first."""
    n = x.shape[-1]
    if k < n and mx.default_device() == mx.cpu:  # on a GPU to partition is to sort
        x = mx.partition(x, n - k, axis=-1)[:, n - k :]
    return mx.sort(x, axis=-1)[:, : -k - 1 : -1]


def largest_of_blocks(x: mx.array, k: int) -> mx.array:
    """As :func:`largest_sorted`, exactly: the ``k`` largest lie in the ``k`` blocks with the largest maxima.

    One pass over the rows, then a sort of k blocks.
    """
    num_rows, width = x.shape
    size = block_size(width)
    if size is None or k * size * _GAIN > width:
        return largest_sorted(x, k)
    blocks = x.reshape(num_rows, width // size, size)
    maxima = mx.max(blocks, axis=-1)
    chosen = mx.argpartition(maxima, maxima.shape[-1] - k, axis=-1)[:, -k:]
    candidates = mx.take_along_axis(blocks, chosen[..., None], axis=1).reshape(num_rows, k * size)
    return largest_sorted(candidates, k)
