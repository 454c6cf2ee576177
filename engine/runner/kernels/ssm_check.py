"""Do a Mamba 2 layer's steps over slots give what they should on this GPU? Asked at load."""

import mlx.core as mx
import numpy as np

from engine.errors import error_line
from engine.runner.device.host import floats
from engine.runner.kernels.delta_check import TOLERANCE
from engine.runner.kernels.delta_reference import Floats, silu
from engine.runner.kernels.kernel_cache import collecting, compile_all
from engine.runner.kernels.reference import difference
from engine.runner.kernels.ssm import SsmShape
from engine.runner.kernels.state_kernels import StateKernels

_SLOTS = 8
_STEPS: tuple[tuple[tuple[int, int], ...], ...] = (
    ((-1, 5), (-1, 0), (-1, -1)), ((5, 2), (-1, -1), (0, 0), (-1, 3)), ((0, 0), (5, 6), (2, 2)),
)  # fmt: skip
"""Slots that rows read and write: states that begin, go on and are kept, and padding rows."""


def ssm_problem(shape: SsmShape, kernels: StateKernels) -> str | None:
    """Run steps of a small random layer of ``shape`` beside numpy: one line on the first thing wrong, or None.

    NaN lies in slots that nobody owns; what is not written stays as it was. Raises nothing.
    """
    try:
        if shape.problem:
            return shape.problem
        with collecting() as awaited:
            _Check(shape, kernels).step(_STEPS[0])
        compile_all(awaited)
        check = _Check(shape, kernels)
        return next((problem for rows in _STEPS if (problem := check.step(rows))), None)
    except Exception as error:  # noqa: BLE001  (whatever stops a kernel, the layers have another path)
        return error_line(error)


class _Check:
    """A layer's weights, its slots on the device, and in float32 what they should be."""

    def __init__(self, shape: SsmShape, kernels: StateKernels) -> None:
        self.shape, self.kernels, self.rng = shape, kernels, np.random.default_rng(0)
        self.weight = self._random(shape.channels, shape.taps, 1)
        self.bias = self._random(shape.channels) if shape.biased else None
        self.per_head = [self._random(shape.heads) for _ in range(3)]
        kinds = shape.dtype, mx.float32
        self.known = [np.full((_SLOTS, *size), np.nan, np.float32) for size in (shape.conv_shape, shape.state_shape)]
        self.states = [mx.array(known).astype(kind) for known, kind in zip(self.known, kinds, strict=True)]
        mx.eval(self.states)

    def _random(self, *shape: int) -> mx.array:
        return mx.array(self.rng.standard_normal(shape, dtype=np.float32)).astype(self.shape.dtype)

    def step(self, rows: tuple[tuple[int, int], ...]) -> str | None:
        """A token of each of some sequences; a problem."""
        shape, (conv_states, states) = self.shape, self.states
        x, dt = self._random(len(rows), 1, shape.channels), self._random(len(rows), 1, shape.heads)
        slots = np.full((2, 8), -1, np.int32)
        slots[:, : len(rows)] = np.array(rows).T
        given = mx.array(slots) + mx.zeros(slots.shape, mx.int32)
        mixed = self.kernels.conv_step(x, self.weight, self.bias, conv_states, given)
        a_log, dt_bias, d = self.per_head
        out = self.kernels.ssm_step(mixed, dt, a_log, dt_bias, d, states, given, shape)
        mx.eval(out)
        got, known_mixed = floats(out)[:, 0], floats(mixed)[:, 0]
        for row, (reads, writes) in enumerate(rows):
            wanted, wanted_mixed = np.zeros_like(got[row]), np.zeros_like(known_mixed[row])
            if writes >= 0:
                wanted_mixed = self._convolved(floats(x)[row, 0], reads, writes)
                wanted = self._moved_on(known_mixed[row], floats(dt)[row, 0], reads, writes)
            for name, some, expected in (("convolution", known_mixed, wanted_mixed), ("output", got, wanted)):
                if problem := difference(some[row], expected, TOLERANCE[self.shape.dtype]):
                    return f"a step from slot {reads} to {writes}: {name}: {problem}"
        return self._changed()

    def _convolved(self, x: Floats, reads: int, writes: int) -> Floats:
        """The convolution's output; its state is known from now on."""
        states = self.known[0]
        taps = np.concatenate([states[reads] if reads >= 0 else np.zeros_like(states[0]), x[None]])
        states[writes] = taps[1:]
        bias = np.float32(0) if self.bias is None else floats(self.bias)
        return silu((taps * floats(self.weight)[..., 0].T).sum(0) + bias)

    def _moved_on(self, mixed: Floats, dt: Floats, reads: int, writes: int) -> Floats:
        """A row's output; its state is known from now on."""
        shape, states = self.shape, self.known[1]
        state = states[reads] if reads >= 0 else np.zeros_like(states[0])
        output, states[writes] = ssm_reference(mixed, dt, [floats(some) for some in self.per_head], state, shape)
        return output.reshape(-1)

    def _changed(self) -> str | None:
        for name, states, known in zip(("convolution", "state"), self.states, self.known, strict=True):
            for slot, (held, wanted) in enumerate(zip(floats(states), known, strict=True)):
                if np.isnan(wanted).any():
                    if not np.isnan(held).all():
                        return f"the {name} of slot {slot}, which is nobody's, was written"
                elif problem := difference(held, wanted, TOLERANCE[self.shape.dtype]):
                    return f"the {name} in slot {slot}: {problem}"
        return None


def ssm_reference(
    mixed: Floats, dt: Floats, per_head: list[Floats], state: Floats, shape: SsmShape
) -> tuple[Floats, Floats]:
    """A step's output [heads, head_dim] and new state, of ``per_head`` (a_log, dt_bias, d), in float32."""
    a_log, dt_bias, d = per_head
    x, b, c = np.split(mixed, np.cumsum([shape.heads * shape.head_dim, shape.groups * shape.state_dim]).tolist())
    x, share = x.reshape(shape.heads, shape.head_dim), shape.heads // shape.groups
    b, c = (some.reshape(shape.groups, shape.state_dim).repeat(share, axis=0) for some in (b, c))
    step = np.clip(np.logaddexp(dt + dt_bias, np.float32(0)), *shape.limit)
    decay = np.exp(-np.exp(a_log) * step)
    new = (decay[:, None, None] * state + (step[:, None] * x)[..., None] * b[:, None]).astype(np.float32)
    return np.einsum("hpn,hn->hp", new, c) + d[:, None] * x, new
