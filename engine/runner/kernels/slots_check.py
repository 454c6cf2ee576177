"""Are states read from slots and written to them as they should be on this GPU? Asked at load."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from engine.errors import error_line
from engine.runner.device.host import floats
from engine.runner.kernels.kernel_cache import collecting, compile_all
from engine.runner.kernels.state_kernels import StateKernels, StateShape
from engine.runner.kernels.state_slots import ELEMENT_TYPES

_SLOTS = 9
_READS, _WRITES = (6, -1, 2, -1, 0), (6, 3, 5, -1, -1)
"""A slot that is read and written, a state that begins, one that is kept, a padding row, one that is read alone."""


def slots_problem(shapes: Sequence[StateShape], kernels: StateKernels) -> str | None:
    """Read and write slots of each shape beside numpy: one line on the first thing wrong, or None. Raises nothing."""
    try:
        for _, dtype in shapes:
            if dtype not in ELEMENT_TYPES:
                return f"states in {str(dtype).rpartition('.')[2]}"
        with collecting() as awaited:
            for shape in shapes:
                _launched(shape, kernels)
        compile_all(awaited)
        return next((problem for shape in shapes if (problem := _problem(shape, kernels))), None)
    except Exception as error:  # noqa: BLE001  (whatever stops a kernel, the layers have another path)
        return error_line(error)


def _launched(given: StateShape, kernels: StateKernels) -> None:
    shape, dtype = given
    states, slots = mx.zeros((2, *shape), dtype), mx.zeros((2, 8), mx.int32)
    kernels.write_slots(kernels.read_slots(states, slots, 2), states, slots)


def _problem(given: StateShape, kernels: StateKernels) -> str | None:
    """NaN lies in every slot that nobody owns, and stays there."""
    shape, dtype = given
    rows, rng = len(_READS), np.random.default_rng(0)
    known = rng.standard_normal((_SLOTS, *shape), dtype=np.float32)
    known[[1, 4, 7, 8]] = np.nan
    states = mx.array(known).astype(dtype)
    values = mx.array(rng.standard_normal((rows, *shape), dtype=np.float32)).astype(dtype)
    mx.eval(states, values)
    expected, new = (floats(some) for some in (states, values))
    slots = np.full((2, 8), -1, np.int32)
    slots[0, :rows], slots[1, :rows] = _READS, _WRITES
    given_slots = mx.array(slots) + mx.zeros((2, 8), mx.int32)
    read = kernels.read_slots(states, given_slots, rows)
    done = kernels.write_slots(values, states, given_slots, read=read)
    # A second write of the same row, after the first: what it leaves is what stays.
    done = kernels.write_slots(values[::-1], states, given_slots, after=done)
    mx.eval(read, done)
    wanted = np.stack([expected[slot] if slot >= 0 else np.zeros(shape, np.float32) for slot in _READS])
    if not np.array_equal(floats(read), wanted):
        return "states are read wrongly"
    for row, slot in enumerate(_WRITES):
        if slot >= 0:
            expected[slot] = new[rows - 1 - row]
    same = np.array_equal(floats(states + done[:1].astype(dtype)), expected, equal_nan=True)
    return None if same else "another state was written, or one was not"
