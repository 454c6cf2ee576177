"""What a backend keeps recurrent states with: the kernels that read and write slots in place, and their check."""

from collections.abc import Iterable
from typing import Protocol

import mlx.core as mx

from engine.runner.kernels import gated_delta, ssm, state_slots
from engine.runner.kernels.delta_check import delta_problem
from engine.runner.kernels.gated_delta import DeltaShape
from engine.runner.kernels.slots_check import slots_problem
from engine.runner.kernels.ssm import SsmShape
from engine.runner.kernels.ssm_check import ssm_problem

StateShape = tuple[tuple[int, ...], mx.Dtype]
"""Of a slot of one state, and its element type."""


class StateKernels(Protocol):
    """See :mod:`engine.runner.kernels.state_slots`, :mod:`engine.runner.kernels.gated_delta` and
    :mod:`engine.runner.kernels.ssm`.
    """

    def read_slots(self, states: mx.array, slots: mx.array, num_rows: int) -> mx.array:
        """States [num_rows, …] of the slots that are read."""

    def write_slots(
        self,
        values: mx.array,
        states: mx.array,
        slots: mx.array,
        *,
        read: mx.array | None = None,
        after: mx.array | None = None,
    ) -> mx.array:
        """Write ``values`` in place; gives an array that is known when that is done."""

    def delta_inputs(
        self,
        x: mx.array,
        b: mx.array,
        a: mx.array,
        conv_weight: mx.array,
        a_log: mx.array,
        dt_bias: mx.array,
        conv_states: mx.array,
        slots: mx.array,
        shape: DeltaShape,
    ) -> tuple[mx.array, mx.array]:
        """What stands before a gated delta net's recurrence."""

    def delta_step(
        self,
        mixed: mx.array,
        gates: mx.array,
        x: mx.array,
        z: mx.array,
        gain: mx.array,
        conv_states: mx.array,
        states: mx.array,
        slots: mx.array,
        shape: DeltaShape,
        *,
        eps: float,
    ) -> mx.array:
        """One token of many sequences, with the gated norm; moves the states on in place."""

    def delta_scan(
        self,
        mixed: mx.array,
        gates: mx.array,
        x: mx.array,
        conv_states: mx.array,
        states: mx.array,
        slots: mx.array,
        shape: DeltaShape,
    ) -> mx.array:
        """Many tokens of one sequence, without the norm; moves the states on in place."""

    def conv_step(
        self, x: mx.array, weight: mx.array, bias: mx.array | None, conv_states: mx.array, slots: mx.array
    ) -> mx.array:
        """A causal convolution's next output after silu; moves its states on in place."""

    def ssm_step(
        self,
        mixed: mx.array,
        dt: mx.array,
        a_log: mx.array,
        dt_bias: mx.array,
        d: mx.array,
        states: mx.array,
        slots: mx.array,
        shape: SsmShape,
    ) -> mx.array:
        """One token of many sequences of a Mamba 2 layer; moves the states on in place."""

    def ssm_problem(self, shape: SsmShape) -> str | None:
        """One line on what goes wrong for such Mamba 2 layers, None if nothing does."""

    def slots_problem(self, shapes: Iterable[StateShape]) -> str | None:
        """One line on what goes wrong for states of ``shapes``, None if nothing does."""

    def delta_problem(self, shape: DeltaShape) -> str | None:
        """One line on what goes wrong for such gated delta nets, None if nothing does."""


class GpuStateKernels:
    """The kernels on this machine's GPU. What was right is not checked again in this process."""

    def __init__(self) -> None:
        self._right: set[DeltaShape | SsmShape | StateShape] = set()

    read_slots = staticmethod(state_slots.read_slots)
    write_slots = staticmethod(state_slots.write_slots)
    delta_inputs = staticmethod(gated_delta.delta_inputs)
    delta_step = staticmethod(gated_delta.delta_step)
    delta_scan = staticmethod(gated_delta.delta_scan)
    conv_step = staticmethod(ssm.conv_step)
    ssm_step = staticmethod(ssm.ssm_step)

    def slots_problem(self, shapes: Iterable[StateShape]) -> str | None:
        """See :func:`engine.runner.kernels.slots_check.slots_problem`."""
        asked = [shape for shape in dict.fromkeys(shapes) if shape not in self._right]
        problem = slots_problem(asked, self)
        self._right.update(() if problem else asked)
        return problem

    def delta_problem(self, shape: DeltaShape) -> str | None:
        """See :func:`engine.runner.kernels.delta_check.delta_problem`."""
        problem = None if shape in self._right else delta_problem(shape, self)
        if problem is None:
            self._right.add(shape)
        return problem

    def ssm_problem(self, shape: SsmShape) -> str | None:
        """See :func:`engine.runner.kernels.ssm_check.ssm_problem`."""
        problem = None if shape in self._right else ssm_problem(shape, self)
        if problem is None:
            self._right.add(shape)
        return problem


GPU_STATE_KERNELS = GpuStateKernels()
