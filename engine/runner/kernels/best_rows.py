"""The likeliest token of each row, when a step asks for nothing else, by as many blocks as keep a GPU busy.

One block per row, as :mod:`engine.runner.kernels.draw_rows` works, takes 50 to 110 us for 150,000 logits on an H200,
a tenth of a step of packed weights.
"""

from typing import Protocol

import mlx.core as mx

from engine.runner.kernels.dialect import make_kernel
from engine.runner.kernels.draw_rows_text import DRAW_HEADER

PARTS, THREADS = 32, 256
"""Blocks of a row, one for each lane of the warp that joins them; and threads of a block."""

_CONSTANTS = f"""
#undef THREADS
#define THREADS {THREADS}
#define PARTS {PARTS}
// The larger key, and of equal ones the lower column.
#define BETTER(other_key, other_column) \\
  if (other_key > key || (other_key == key && other_column < column)) {{ key = other_key; column = other_column; }}
"""
_HEADER = DRAW_HEADER + _CONSTANTS
_BEST = r"""
  SHARED unsigned keys[THREADS / 32];
  SHARED int columns[THREADS / 32];
  const int part = BLK_X, row = BLK_Y, width = logits_shape[1];
  GLOBAL const T* mine = logits + (size_t)row * width;
  unsigned key = 0u;
  int column = 0x7fffffff;
  for (int first = (part * THREADS + TID) * 8; first < width; first += PARTS * THREADS * 8) {
    float x[8];
    if (width % 8 == 0) {
      unpack_vector<T>(*(GLOBAL const uint4*)(mine + first), x);
      if (sizeof(T) == 4) unpack_vector<T>(*(GLOBAL const uint4*)(mine + first + 4), x + 4);
    } else {
      read_eight<T>(mine, first, width, x);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (first + i < width) {
        const unsigned other = ordered(x[i]);
        BETTER(other, first + i)
      }
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    const unsigned other = SHFL_XOR(key, mask);
    const int where = int(SHFL_XOR(unsigned(column), mask));
    BETTER(other, where)
  }
  if (LANE == 0) { keys[WARP] = key; columns[WARP] = column; }
  BARRIER;
  if (TID == 0) {
    for (int w = 1; w < THREADS / 32; ++w) BETTER(keys[w], columns[w])
    best[(row * PARTS + part) * 2] = int(key);
    best[(row * PARTS + part) * 2 + 1] = column;
  }
"""
_JOIN = r"""
  const int row = BLK_X;
  unsigned key = unsigned(best[(row * PARTS + LANE) * 2]);
  int column = best[(row * PARTS + LANE) * 2 + 1];
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    const unsigned other = SHFL_XOR(key, mask);
    const int where = int(SHFL_XOR(unsigned(column), mask));
    BETTER(other, where)
  }
  if (TID == 0) tokens[row] = key >= LOWEST_KEY && key <= HIGHEST_KEY ? column : -1;
"""


class BestRows(Protocol):
    """What takes the likeliest tokens on a device."""

    def __call__(self, logits: mx.array) -> mx.array:
        """See :func:`best_rows`."""


def best_rows(logits: mx.array) -> mx.array:
    """Token ids int32 [R] of the largest ``logits`` [R, V], the first of equal ones; -1 where that is not finite.

    Element types as :func:`engine.runner.kernels.draw_rows.takes` says; NaN counts as the largest.
    """
    rows = logits.shape[0]
    (best,) = make_kernel("best_of_rows", ("logits",), ("best",), _BEST, _HEADER)(
        inputs=[logits],
        template=[("T", logits.dtype)],
        grid=(PARTS * THREADS, rows, 1),
        threadgroup=(THREADS, 1, 1),
        output_shapes=[(rows, PARTS, 2)],
        output_dtypes=[mx.int32],
    )
    (tokens,) = make_kernel("join_best", ("best",), ("tokens",), _JOIN, _HEADER)(
        inputs=[best],
        template=[],
        grid=(PARTS * rows, 1, 1),
        threadgroup=(PARTS, 1, 1),
        output_shapes=[(rows,)],
        output_dtypes=[mx.int32],
    )
    return tokens
