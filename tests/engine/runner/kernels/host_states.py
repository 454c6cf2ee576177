"""The kernels of recurrent states as numpy would have them: they write into the slots' own memory.

As :mod:`tests.engine.runner.kernels.host_kernels`: inputs are evaluated when a kernel is called.
"""

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from engine.runner.kernels.delta_check import delta_problem
from engine.runner.kernels.delta_reference import DeltaWeights, gated_norm, mixed_inputs, recurrence, silu
from engine.runner.kernels.gated_delta import DeltaShape
from engine.runner.kernels.slots_check import slots_problem
from engine.runner.kernels.ssm import SsmShape
from engine.runner.kernels.ssm_check import ssm_problem, ssm_reference
from engine.runner.kernels.state_kernels import StateShape


class HostStateKernels:
    """As :class:`engine.runner.kernels.gpu_states.GpuStateKernels`. ``calls`` counts the launches by name."""

    def __init__(self) -> None:
        self.calls = {"read_slots": 0, "write_slots": 0, "delta_inputs": 0, "delta_step": 0, "delta_scan": 0}
        self.calls |= {"conv_step": 0, "ssm_step": 0}

    def read_slots(self, states: mx.array, slots: mx.array, num_rows: int) -> mx.array:
        """Rows of the slots that are read; zeros where there is none."""
        self.calls["read_slots"] += 1
        held = floats(states)
        rows = [held[slot] if slot >= 0 else np.zeros_like(held[0]) for slot in np.array(slots)[0, :num_rows]]
        return mx.array(np.stack(rows)).astype(states.dtype)

    def write_slots(
        self, values: mx.array, states: mx.array, slots: mx.array, *, read: mx.array | None = None,
        after: mx.array | None = None,
    ) -> mx.array:  # fmt: skip
        """Write rows into their slots."""
        self.calls["write_slots"] += 1
        mx.eval([some for some in (read, after) if some is not None])
        for row, slot in enumerate(np.array(slots)[1, : len(values)]):
            write(states, slot, floats(values[row]))
        return mx.zeros((8,), mx.int32)

    def delta_inputs(
        self, x: mx.array, b: mx.array, a: mx.array, conv_weight: mx.array, a_log: mx.array, dt_bias: mx.array,
        conv_states: mx.array, slots: mx.array, shape: DeltaShape,
    ) -> tuple[mx.array, mx.array]:  # fmt: skip
        """What stands before the recurrence."""
        self.calls["delta_inputs"] += 1
        known, known_b, known_a = plain(x, b, a, shape)
        weights = DeltaWeights(floats(conv_weight)[..., 0], floats(a_log), floats(dt_bias), np.zeros(1, np.float32), 0)
        mixed, gates = [], []
        for row, (reads, _) in enumerate(np.array(slots).T[: len(known)]):
            state = slot_of(conv_states, reads)
            found = mixed_inputs(known[row], known_b[row], known_a[row], state, weights, shape)
            mixed.append(found[0])
            gates.append(found[1])
        return mx.array(np.stack(mixed)).astype(shape.dtype), mx.array(np.stack(gates))

    def delta_step(
        self, mixed: mx.array, gates: mx.array, x: mx.array, z: mx.array, gain: mx.array, conv_states: mx.array,
        states: mx.array, slots: mx.array, shape: DeltaShape, *, eps: float,
    ) -> mx.array:  # fmt: skip
        """One token of many sequences."""
        self.calls["delta_step"] += 1
        nothing = np.zeros(1, np.float32)
        weights = DeltaWeights(nothing, nothing, nothing, floats(gain), eps)
        outputs = self._moved_on(mixed, gates, x, conv_states, states, slots, shape)
        width = shape.value_heads // shape.key_heads * shape.value_dim if shape.interleaved else -1
        gate = floats(z).reshape(len(outputs), shape.key_heads if shape.interleaved else 1, -1)[
            ..., -width if width > 0 else 0 :
        ]
        normed = [gated_norm(some, one.reshape(some.shape), weights) for some, one in zip(outputs, gate, strict=True)]
        return mx.array(np.stack(normed)).reshape(len(outputs), 1, -1).astype(shape.dtype)

    def delta_alone(
        self, x: mx.array, b: mx.array, a: mx.array, z: mx.array, conv_weight: mx.array, a_log: mx.array,
        dt_bias: mx.array, gain: mx.array, conv_states: mx.array, states: mx.array, slots: mx.array,
        shape: DeltaShape, *, eps: float,
    ) -> mx.array:  # fmt: skip
        """Both launches of a step."""
        mixed, gates = self.delta_inputs(x, b, a, conv_weight, a_log, dt_bias, conv_states, slots, shape)
        return self.delta_step(mixed, gates, x, z, gain, conv_states, states, slots, shape, eps=eps)

    def delta_scan(
        self, mixed: mx.array, gates: mx.array, x: mx.array, conv_states: mx.array, states: mx.array,
        slots: mx.array, shape: DeltaShape,
    ) -> mx.array:  # fmt: skip
        """Many tokens of one sequence."""
        self.calls["delta_scan"] += 1
        outputs = self._moved_on(mixed, gates, x, conv_states, states, slots, shape)
        return mx.array(np.stack(outputs)).astype(shape.dtype)

    def _moved_on(
        self, mixed: mx.array, gates: mx.array, x: mx.array, conv_states: mx.array, states: mx.array,
        slots: mx.array, shape: DeltaShape,
    ) -> list[NDArray[np.float32]]:  # fmt: skip
        given, known, known_gates = plain(x, None, None, shape)[0], floats(mixed), floats(gates)
        outputs = []
        for row, (reads, writes) in enumerate(np.array(slots).T[: len(given)]):
            if reads < 0 and writes < 0:
                outputs.append(np.zeros((len(given[row]), shape.value_heads, shape.value_dim), np.float32))
                continue
            conv = np.concatenate([slot_of(conv_states, reads), given[row]])[len(given[row]) :]
            output, state = recurrence(known[row], known_gates[row], slot_of(states, reads), shape)
            write(conv_states, writes, conv)
            write(states, writes, state)
            outputs.append(output)
        return outputs

    def conv_step(
        self, x: mx.array, weight: mx.array, bias: mx.array | None, conv_states: mx.array, slots: mx.array
    ) -> mx.array:
        """A convolution's next output."""
        self.calls["conv_step"] += 1
        given, outputs = floats(x), []
        for row, (reads, writes) in enumerate(np.array(slots).T[: len(given)]):
            taps = np.concatenate([slot_of(conv_states, reads), given[row]])
            write(conv_states, writes, taps[1:])
            out = silu((taps * floats(weight)[..., 0].T).sum(0) + (0 if bias is None else floats(bias)))
            outputs.append(out if max(reads, writes) >= 0 else 0 * out)
        return mx.array(np.stack(outputs)[:, None]).astype(x.dtype)

    def ssm_step(
        self, mixed: mx.array, dt: mx.array, a_log: mx.array, dt_bias: mx.array, d: mx.array, states: mx.array,
        slots: mx.array, shape: SsmShape,
    ) -> mx.array:  # fmt: skip
        """One token of many sequences."""
        self.calls["ssm_step"] += 1
        per_head, outputs = [floats(some) for some in (a_log, dt_bias, d)], []
        for row, (reads, writes) in enumerate(np.array(slots).T[: len(mixed)]):
            state = slot_of(states, reads)
            output, new = ssm_reference(floats(mixed)[row, 0], floats(dt)[row, 0], per_head, state, shape)
            write(states, writes, new)
            outputs.append((output if max(reads, writes) >= 0 else 0 * output).reshape(1, -1))
        return mx.array(np.stack(outputs)).astype(shape.dtype)

    def ssm_problem(self, shape: SsmShape) -> str | None:
        """The self-check, of these kernels."""
        return ssm_problem(shape, self)

    def slots_problem(self, shapes: Iterable[StateShape]) -> str | None:
        """The self-check, of these kernels."""
        return slots_problem(list(shapes), self)

    def delta_problem(self, shape: DeltaShape) -> str | None:
        """The self-check, of these kernels."""
        return delta_problem(shape, self)


def plain(x: mx.array, b: mx.array | None, a: mx.array | None, shape: DeltaShape) -> list[NDArray[np.float32]]:
    """Channels, b and a, whichever are given, as they are where projections are not interleaved."""
    if not shape.interleaved:
        return [floats(some) for some in (x, b, a) if some is not None]
    share = shape.value_heads // shape.key_heads
    by_head = floats(x).reshape(*x.shape[:2], shape.key_heads, -1)
    parts = np.split(by_head, [shape.key_dim, 2 * shape.key_dim, 2 * shape.key_dim + share * shape.value_dim], axis=-1)
    found = [np.concatenate([part.reshape(*x.shape[:2], -1) for part in parts[:3]], axis=-1)]
    if b is not None:
        gates = floats(b).reshape(*x.shape[:2], shape.key_heads, 2, share)
        found += [gates[..., side, :].reshape(*x.shape[:2], -1) for side in (0, 1)]
    return found


def floats(array: mx.array) -> NDArray[np.float32]:
    return np.array(array.astype(mx.float32))


def slot_of(states: mx.array, slot: int) -> NDArray[np.float32]:
    """The state in a slot; zeros where there is none."""
    held = floats(states)
    return held[slot] if slot >= 0 else np.zeros_like(held[0])


def write(states: mx.array, slot: int, value: NDArray[Any]) -> None:
    """``value`` into a slot's own memory."""
    if slot < 0:
        return
    mx.eval(states)
    memory = np.array(states.view(mx.uint16) if states.dtype == mx.bfloat16 else states, copy=False)
    assert not memory.flags.owndata, "not the slots' own memory"
    rounded = mx.array(value).astype(states.dtype)
    memory[slot] = np.array(rounded.view(mx.uint16) if states.dtype == mx.bfloat16 else rounded)
