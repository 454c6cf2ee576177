"""What a backend keeps recurrent states with: the kernels that read and write slots in place."""

from collections.abc import Iterable
from typing import Protocol

import mlx.core as mx

from engine.runner.kernels.gated_delta import DeltaShape
from engine.runner.kernels.ssm import SsmShape

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

    def delta_alone(
        self,
        x: mx.array,
        b: mx.array,
        a: mx.array,
        z: mx.array,
        conv_weight: mx.array,
        a_log: mx.array,
        dt_bias: mx.array,
        gain: mx.array,
        conv_states: mx.array,
        states: mx.array,
        slots: mx.array,
        shape: DeltaShape,
        *,
        eps: float,
    ) -> mx.array:
        """Both launches of a step in one, where the shape allows it."""

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
