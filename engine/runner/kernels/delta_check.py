"""Do gated delta nets over slots give what they should on this GPU? Asked at load."""

from typing import Any

import mlx.core as mx
import numpy as np

from engine.errors import error_line
from engine.runner.device.host import floats
from engine.runner.kernels.delta_reference import DeltaWeights, Floats, gated_norm, mixed_inputs, recurrence
from engine.runner.kernels.gated_delta import DeltaShape
from engine.runner.kernels.kernel_cache import collecting, compile_all
from engine.runner.kernels.reference import difference
from engine.runner.kernels.state_kernels import StateKernels

TOLERANCE: dict[mx.Dtype, float] = {mx.bfloat16: 1e-2, mx.float16: 2e-3, mx.float32: 1e-4}
"""Of the norm of a sequence's output or state."""
_SLOTS = 8
_EPS = 1e-6
_Slots = tuple[int, int]


def delta_problem(shape: DeltaShape, kernels: StateKernels) -> str | None:
    """Run small random layers of ``shape`` beside numpy: one line on the first thing wrong, or None. Raises nothing.

    Chunks of a few lengths, and steps of several sequences in any order, among them padding rows, one that begins,
    and one whose state before is kept. NaN lies in slots that nobody owns; what is not written stays as it was.
    """
    try:
        if shape.problem:
            return shape.problem
        with collecting() as awaited:
            _launch_each(shape, kernels)
        compile_all(awaited)
        return _Check(shape, kernels).run()
    except Exception as error:  # noqa: BLE001  (whatever stops a kernel, the layers have another path)
        return error_line(error)


def _launch_each(shape: DeltaShape, kernels: StateKernels) -> None:
    """Launch what is compiled by itself, on zeros; nothing is evaluated."""
    check = _Check(shape, kernels)
    check.chunk(2, (-1, 0))
    check.step([(0, 0)])
    check.alone([(0, 0)])


class _Check:
    """The slots' states on the device, and in float32 what they should be."""

    def __init__(self, shape: DeltaShape, kernels: StateKernels) -> None:
        self.shape, self.kernels, self.rng = shape, kernels, np.random.default_rng(0)
        heads, channels = shape.value_heads, shape.channels
        self.conv, conv = self._random(channels, shape.taps, 1, scale=0.5)
        self.a_log, a_log = self._random(heads, dtype=mx.float32)
        self.dt_bias, dt_bias = self._random(heads)
        self.gain, gain = self._random(shape.value_dim)
        self.weights = DeltaWeights(conv[..., 0], a_log, dt_bias, gain, _EPS)
        self.known = [np.full((_SLOTS, *sizes), np.nan, np.float32) for sizes in (shape.conv_shape, shape.state_shape)]
        kinds = shape.dtype, mx.float32
        self.states = [mx.array(known).astype(kind) for known, kind in zip(self.known, kinds, strict=True)]
        mx.eval(self.states)
        self.held = [floats(states) for states in self.states]

    def run(self) -> str | None:
        """One line on the first thing wrong."""
        return (
            self.chunk(21, (-1, 5)) or self.chunk(self.shape.taps - 2, (5, 5)) or self.chunk(9, (5, 2))
            or self.chunk(1, (-1, 0)) or self.chunk(40, (0, 0))
            or self.step([(2, 2), (-1, -1), (0, 6), (-1, 3), (5, 5)])
            or self.step([(6, 6), (3, 3), (2, 1)])
            or self.alone([(1, 1), (-1, -1), (6, 2), (-1, 7), (0, 0)]) or self.alone([(7, 7), (2, 3)])
        )  # fmt: skip

    def _random(self, *shape: int, scale: float = 1.0, dtype: mx.Dtype | None = None) -> tuple[mx.array, Floats]:
        """Random numbers in an element type, the layers' if None, and the same in float32."""
        numbers = self.rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)
        array = mx.array(numbers).astype(dtype or self.shape.dtype)
        return array, floats(array)

    def chunk(self, tokens: int, slots: _Slots) -> str | None:
        """Some tokens of one sequence; a problem."""
        if tokens == 0:
            return None
        launch = self._inputs(1, tokens, [slots])
        (mixed, gates), (conv_states, states) = launch["mixed"], self.states
        got = self.kernels.delta_scan(mixed, gates, launch["x"], conv_states, states, launch["slots"], self.shape)
        said = f"{tokens} tokens from slot {slots[0]} to {slots[1]}"
        return self._compare(got, [slots], launch, normed=False, said=said)

    def step(self, rows: list[_Slots]) -> str | None:
        """A token of each of some sequences; a problem."""
        launch = self._inputs(len(rows), 1, rows)
        (mixed, gates), (conv_states, states) = launch["mixed"], self.states
        got = self.kernels.delta_step(
            mixed,
            gates,
            launch["x"],
            launch["z"],
            self.gain,
            conv_states,
            states,
            launch["slots"],
            self.shape,
            eps=_EPS,
        )
        return self._compare(got, rows, launch, normed=True, said="a step")

    def alone(self, rows: list[_Slots]) -> str | None:
        """As :meth:`step`, in one launch if that is known for the shape."""
        if not self.shape.one_launch:
            return None
        launch, (conv_states, states) = self._inputs(len(rows), 1, rows), self.states
        b, a = launch["gates"]
        got = self.kernels.delta_alone(
            launch["x"], b, a, launch["z"], self.conv, self.a_log, self.dt_bias, self.gain, conv_states,
            states, launch["slots"], self.shape, eps=_EPS,
        )  # fmt: skip
        return self._compare(got, rows, launch, normed=True, said="a step in one launch")

    def _inputs(self, sequences: int, tokens: int, rows: list[_Slots]) -> dict[str, Any]:
        """Random inputs, and what the first launch makes of them."""
        shape = self.shape
        x, known_x = self._random(sequences, tokens, shape.channels)
        z, known_z = self._random(sequences, tokens, shape.value_heads, shape.value_dim)
        (b, known_b), (a, known_a) = (self._random(sequences, tokens, shape.value_heads) for _ in range(2))
        if shape.interleaved:
            x = z = _interleaved(x, z, shape)
            b = a = mx.concatenate(
                [some.reshape(sequences, tokens, shape.key_heads, -1) for some in (b, a)], axis=-1
            ).reshape(sequences, tokens, -1)
        slots = np.full((2, max(8, sequences)), -1, np.int32)
        slots[:, :sequences] = np.array(rows).T
        given_slots = mx.array(slots) + mx.zeros(slots.shape, mx.int32)
        mixed = self.kernels.delta_inputs(
            x, b, a, self.conv, self.a_log, self.dt_bias, self.states[0], given_slots, shape
        )
        known = known_x, known_b, known_a, known_z
        return {"x": x, "z": z, "gates": (b, a), "slots": given_slots, "mixed": mixed, "known": known}

    def _compare(
        self, got: mx.array, rows: list[_Slots], launch: dict[str, Any], *, normed: bool, said: str
    ) -> str | None:
        mx.eval(got)
        outputs = floats(got).reshape(len(rows), -1)
        for row, (reads, writes) in enumerate(rows):
            wanted = np.zeros_like(outputs[row])
            if writes >= 0:
                wanted = self._wanted(launch["known"], row, reads, writes, normed=normed)
            if problem := difference(outputs[row], wanted, TOLERANCE[self.shape.dtype]):
                return f"{said}, row {row}: {problem}"
        return self._changed(said, {writes for _, writes in rows})

    def _wanted(self, known: tuple[Floats, ...], row: int, reads: int, writes: int, *, normed: bool) -> Floats:
        """A row's output; its states are known from now on."""
        x, b, a, z = (some[row] for some in known)
        conv_state, state = (states[reads] if reads >= 0 else np.zeros_like(states[0]) for states in self.known)
        mixed, gates, conv_state = mixed_inputs(x, b, a, conv_state, self.weights, self.shape)
        # As they are handed from launch to launch: a small output is a difference of large products of them.
        mixed = floats(mx.array(mixed).astype(self.shape.dtype))
        outputs, state = recurrence(mixed, gates, state, self.shape)
        self.known[0][writes], self.known[1][writes] = conv_state, state
        return (gated_norm(outputs, z, self.weights) if normed else outputs).reshape(-1)

    def _changed(self, said: str, written: set[int]) -> str | None:
        """Whether a slot holds what it should not: what was not ``written`` is the same bit for bit."""
        before, self.held = self.held, [floats(states) for states in self.states]
        names = "convolution", "state"
        for name, held, was, known in zip(names, self.held, before, self.known, strict=True):
            for slot in range(_SLOTS):
                if slot in written:
                    if problem := difference(held[slot], known[slot], TOLERANCE[self.shape.dtype]):
                        return f"{said}: the {name} in slot {slot}: {problem}"
                elif not np.array_equal(held[slot], was[slot], equal_nan=True):
                    return f"{said}: the {name} in slot {slot} was written"
        return None


def _interleaved(x: mx.array, z: mx.array, shape: DeltaShape) -> mx.array:
    """Projections as they come by key head."""
    ends = [shape.key_heads * shape.key_dim, 2 * shape.key_heads * shape.key_dim]
    by_head = [some.reshape(*x.shape[:2], shape.key_heads, -1) for some in (*mx.split(x, ends, axis=-1), z)]
    return mx.concatenate(by_head, axis=-1).reshape(*x.shape[:2], -1)
