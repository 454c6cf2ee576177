"""States of any layer read from slots, and written to them in place: one launch a state each.

``slots`` int32 [2, n] has the slot that each row reads, and the one that it writes; -1 reads zeros and writes nothing.
What :mod:`engine.runner.kernels.paged_attention` says of order holds here too. A write comes after the read of the
same state only if it takes what was read, and after another write only if it takes what that gave.
"""

import mlx.core as mx

from engine.runner.kernels.dialect import make_kernel

ELEMENT_TYPES = (mx.bfloat16, mx.float16, mx.float32)
_THREADS = 256
_MOST_BLOCKS = 64
"""Of a row."""
_DONE = 8
"""Elements of a write's output: fewer would lie in the host's memory on CUDA."""

# By 16 bytes where rows of the last axis are: values may be a part of a longer array, from any of its rows on.
_EACH = r"""
  if (ROW * int(sizeof(T)) % 16 == 0) {
    constexpr int VEC = 16 / int(sizeof(T));
    for (int i = (BLK_X * THREADS + TID) * VEC; i < WIDTH; i += GRID_X * THREADS * VEC) { @VECTOR@ }
  } else {
    for (int i = BLK_X * THREADS + TID; i < WIDTH; i += GRID_X * THREADS) { @ELEMENT@ }
  }
"""
_READ = r"""
  const int row = BLK_Y, from = slots[row];
  GLOBAL const T* kept = states + (from < 0 ? 0 : (size_t)from * WIDTH);
  GLOBAL T* given = out + (size_t)row * WIDTH;
""" + _EACH.replace(
    "@VECTOR@", "*(GLOBAL uint4*)(given + i) = from < 0 ? ZERO4 : *(GLOBAL const uint4*)(kept + i);"
).replace("@ELEMENT@", "given[i] = from < 0 ? T(0.0f) : kept[i];")
_WRITE = r"""
  const int row = BLK_Y, to = slots[slots_shape[1] + row];
  if (row == 0 && BLK_X == 0 && TID < 8) done[TID] = 0;
  if (to < 0) return;
  GLOBAL T* kept = const_cast<GLOBAL T*>(states) + (size_t)to * WIDTH;
  GLOBAL const T* given = values + (size_t)row * WIDTH;
""" + _EACH.replace("@VECTOR@", "*(GLOBAL uint4*)(kept + i) = *(GLOBAL const uint4*)(given + i);").replace(
    "@ELEMENT@", "kept[i] = given[i];"
)


def read_slots(states: mx.array, slots: mx.array, num_rows: int) -> mx.array:
    """States [num_rows, …] of the first rows of ``slots``, from ``states`` [slots, …]."""
    (out,) = make_kernel("read_slots", ("states", "slots"), ("out",), _READ)(
        inputs=[states, slots],
        template=_template(states),
        grid=(_threads(states), num_rows, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(num_rows, *states.shape[1:])],
        output_dtypes=[states.dtype],
    )
    return out


def write_slots(
    values: mx.array, states: mx.array, slots: mx.array, *, read: mx.array | None = None, after: mx.array | None = None
) -> mx.array:
    """Write ``values`` [rows, …] to their slots in ``states`` [slots, …], of one element type.

    After ``read``, what :func:`read_slots` gave of the same ``states``, and ``after``, which such a write gave. Gives
    an int32 [8] that is known once all is written.
    """
    if values.shape[1:] != states.shape[1:] or values.dtype != states.dtype:
        raise ValueError(f"{values.dtype} {values.shape} does not fit slots of {states.dtype} {states.shape}")
    (done,) = make_kernel("write_slots", ("values", "states", "slots", "read", "earlier"), ("done",), _WRITE)(
        # Those that are not read are there for the order alone; each has one type, since each type is a kernel.
        inputs=[values, states, slots, values if read is None else read, slots if after is None else after],
        template=_template(states),
        grid=(_threads(states), values.shape[0], 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(_DONE,)],
        output_dtypes=[mx.int32],
    )
    return done


def _template(states: mx.array) -> list[tuple[str, mx.Dtype | int]]:
    width = states.size // states.shape[0]
    return [("T", states.dtype), ("WIDTH", width), ("ROW", states.shape[-1]), ("THREADS", _THREADS)]


def _threads(states: mx.array) -> int:
    width, by_vectors = states.size // states.shape[0], states.shape[-1] * states.dtype.size % 16 == 0
    steps = width * states.dtype.size // 16 if by_vectors else width
    return _THREADS * min(_MOST_BLOCKS, -(-steps // _THREADS))
