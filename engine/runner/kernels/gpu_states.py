"""The kernels of recurrent states on this machine's GPU, with their checks."""

from collections.abc import Iterable

from engine.runner.kernels import gated_delta, ssm, state_slots
from engine.runner.kernels.delta_check import delta_problem
from engine.runner.kernels.gated_delta import DeltaShape
from engine.runner.kernels.slots_check import slots_problem
from engine.runner.kernels.ssm import SsmShape
from engine.runner.kernels.ssm_check import ssm_problem
from engine.runner.kernels.state_kernels import StateShape


class GpuStateKernels:
    """Launched as they are. What was right is not checked again in this process."""

    def __init__(self) -> None:
        self._right: set[DeltaShape | SsmShape | StateShape] = set()

    read_slots = staticmethod(state_slots.read_slots)
    write_slots = staticmethod(state_slots.write_slots)
    delta_inputs = staticmethod(gated_delta.delta_inputs)
    delta_step = staticmethod(gated_delta.delta_step)
    delta_alone = staticmethod(gated_delta.delta_alone)
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
