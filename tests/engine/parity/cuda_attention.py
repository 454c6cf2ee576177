"""MLX's attention as its CUDA backend computes one query row: a slice of a longer array is read from elsewhere.

For a test without a GPU. What is a slice is told as that backend tells it, from the strides of the evaluated keys.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
from numpy.lib.stride_tricks import as_strided

SHORTEST = 256
"""Keys from which the one-row path is taken."""
LARGEST_HEAD = 128
_attention = mx.fast.scaled_dot_product_attention


class CudaAttention:
    """Stands in for ``mx.fast.scaled_dot_product_attention`` on float32 arrays.

    ``pages`` gives the arrays that slices may be of. Counts one-row calls that took the path, and slices among them.
    """

    def __init__(self, pages: Callable[[], list[mx.array]]) -> None:
        self._pages = pages
        self.num_calls = 0
        self.num_slices = 0

    def __call__(self, q, k, v, *, scale, mask=None, sinks=None):
        if q.shape[2] == 1 and mask is None and k.shape[2] >= SHORTEST and q.shape[3] <= LARGEST_HEAD:
            self.num_calls += 1
            k, v = self._unsliced(k), self._unsliced(v)
        return _attention(q, k, v, scale=scale, mask=mask, sinks=sinks)

    def _unsliced(self, rows: mx.array) -> mx.array:
        """As many of the first positions of the array that ``rows`` [1, heads, length, dim] are a slice of."""
        mx.eval(rows)
        found = np.array(rows, copy=False)
        length = found.strides[1] // found.strides[2]
        if length <= rows.shape[2]:
            return rows
        self.num_slices += 1
        for whole in self._pages():
            mx.eval(whole)
            memory = np.array(whole, copy=False)
            if 0 <= _address(found) - _address(memory) < memory.nbytes:
                return mx.array(as_strided(memory, found.shape, found.strides))
        raise AssertionError(f"a slice {rows.shape} of {length} positions that are not pages")


def _address(array) -> int:
    return array.__array_interface__["data"][0]


@contextmanager
def cuda_attention(pages: Callable[[], list[mx.array]]) -> Iterator[CudaAttention]:
    """While inside, every model's attention is a :class:`CudaAttention`."""
    stand_in = CudaAttention(pages)
    mx.fast.scaled_dot_product_attention = stand_in
    try:
        yield stand_in
    finally:
        mx.fast.scaled_dot_product_attention = _attention
