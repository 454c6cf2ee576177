"""The texts of what keeps recurrent states, both dialects, compiled for this machine and run on it."""

import shutil

import mlx.core as mx
import pytest

from engine.runner.kernels import gated_delta, state_slots
from engine.runner.kernels.delta_check import delta_problem
from engine.runner.kernels.gated_delta import DeltaShape
from engine.runner.kernels.slots_check import slots_problem
from engine.runner.kernels.state_kernels import GPU_STATE_KERNELS
from tests.engine.runner.kernels.conftest import TextKernels
from tests.engine.runner.kernels.text_on_host import HostKernel

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the kernels' text")
SHAPES = {
    "f32 16 of 2": DeltaShape(mx.float32, 2, 4, 16, 16, 4),
    "bf16 128 of 2": DeltaShape(mx.bfloat16, 1, 2, 128, 128, 4),
    "bf16 128 of 2, interleaved": DeltaShape(mx.bfloat16, 2, 4, 128, 64, 4, interleaved=True),
    "f16 192 and 128, 3 inputs": DeltaShape(mx.float16, 1, 1, 192, 128, 3),
    "f32 96 and 48, interleaved, 2 inputs": DeltaShape(mx.float32, 2, 6, 96, 48, 2, interleaved=True),
    "bf16 256 and 32": DeltaShape(mx.bfloat16, 1, 3, 256, 32, 4),
}


@pytest.fixture
def kernels(text_kernels: TextKernels) -> dict[str, HostKernel]:
    return text_kernels(gated_delta, state_slots)


@pytest.mark.parametrize("name", SHAPES)
def test_gated_delta_nets_give_what_numpy_gives(name: str, kernels: dict[str, HostKernel]) -> None:
    assert delta_problem(SHAPES[name], GPU_STATE_KERNELS) is None
    assert set(kernels) == {"gated_delta_inputs", "gated_delta_step", "gated_delta_scan"}


def test_states_are_read_and_written_where_the_slots_say(kernels: dict[str, HostKernel]) -> None:
    shapes = [((3, 64), mx.bfloat16), ((4, 7, 5), mx.float32), ((9,), mx.float16), ((2, 1, 2100), mx.float32)]
    assert slots_problem(shapes, GPU_STATE_KERNELS) is None
    assert set(kernels) == {"read_slots", "write_slots"}
