"""The texts of what keeps recurrent states, both dialects, compiled for this machine and run on it."""

import math
import shutil
import subprocess
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from engine.runner.kernels import gated_delta, gated_delta_text, ssm, ssm_text, state_slots
from engine.runner.kernels.delta_check import delta_problem
from engine.runner.kernels.gated_delta import DeltaShape, scan_geometry, step_geometry
from engine.runner.kernels.gpu_states import GPU_STATE_KERNELS
from engine.runner.kernels.slots_check import slots_problem
from engine.runner.kernels.ssm import SsmShape
from engine.runner.kernels.ssm_check import ssm_problem
from tests.engine.runner.kernels.conftest import TextKernels
from tests.engine.runner.kernels.text_on_host import HERE, HostKernel

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
    return text_kernels(gated_delta, ssm, state_slots)


@pytest.mark.parametrize("name", SHAPES)
def test_gated_delta_nets_give_what_numpy_gives(name: str, kernels: dict[str, HostKernel]) -> None:
    assert delta_problem(SHAPES[name], GPU_STATE_KERNELS) is None
    alone = {"gated_delta_alone"} if SHAPES[name].one_launch else set()
    assert set(kernels) == {"gated_delta_inputs", "gated_delta_step", "gated_delta_scan"} | alone


def test_a_step_is_one_launch_where_a_block_holds_what_a_key_head_has() -> None:
    assert [name for name, shape in SHAPES.items() if shape.one_launch] == [
        "f32 16 of 2", "bf16 128 of 2", "bf16 128 of 2, interleaved", "bf16 256 and 32",
    ]  # fmt: skip


def test_states_are_read_and_written_where_the_slots_say(kernels: dict[str, HostKernel]) -> None:
    shapes = [((3, 64), mx.bfloat16), ((4, 7, 5), mx.float32), ((9,), mx.float16), ((2, 1, 2100), mx.float32)]
    assert slots_problem(shapes, GPU_STATE_KERNELS) is None
    assert set(kernels) == {"read_slots", "write_slots"}


@pytest.mark.parametrize("dialect", ["cuda"])
@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("INPUTS", "taps[tap][i] = taps[tap + 1][i];", ""),
        ("FUNCTIONS", "TAPS - 1 + (t)) * CHANNELS", "TAPS - 2 + (t)) * CHANNELS"),
        ("INPUTS", "head < HK ? length * RSQRT(float(DK)) : length", "length"),
        ("INPUTS", "+ float(dt_bias[own])", ""),
        ("STEP", "value[r] - decay * sum", "value[r] - sum"),
        ("STEP", "if (to < 0 && from < 0)", "if (from < 0)"),
        ("STEP", "if (to >= 0 && ROW(r) < DV)", "if (from >= 0 && ROW(r) < DV)"),
        ("STEP", "float(gain[ROW(r)]) * silu_of(gate)", "float(gain[ROW(r)])"),
        ("ALONE", "= raw[tap + 1];", "= raw[tap];"),
        ("ALONE", "(part < DK ? DK + part : part - DK) / 4", "part / 4"),
        ("ALONE", "(HK + key_head - 1) * DK + part", "key_head * DK + part"),
        ("ALONE", "shared_values[own * DV + ROW(r)]", "shared_values[ROW(r)]"),
        ("ALONE", "shared_gates[2 * own + 1];", "shared_gates[1];"),
        ("SCAN", ": TID % 2 ? 0.0f : 1.0f", ": 0.0f"),
        ("SCAN", "mine += upper ? left : 0;", ""),
        ("SCAN", "TAP(tokens + tap - TAPS + 1, c)", "TAP(tap - TAPS + 1, c)"),
    ],
)  # fmt: skip
def test_a_fault_in_the_text_is_found(
    name: str, right: str, wrong: str, kernels: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = getattr(gated_delta_text, name)
    assert right in whole
    broken = whole.replace(right, wrong)
    for each in ("FUNCTIONS", "STEP_FUNCTIONS", "SCAN_FUNCTIONS") if name == "FUNCTIONS" else (name,):
        own = getattr(gated_delta_text, each)
        monkeypatch.setattr(gated_delta_text, each, own.replace(whole, broken))
    assert delta_problem(SHAPES["f32 16 of 2"], GPU_STATE_KERNELS) is not None


@pytest.mark.parametrize("dialect", ["metal"])
@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("_READ", "from < 0 ? ZERO4 : ", ""),
        ("_WRITE", "(size_t)to * WIDTH", "(size_t)row * WIDTH"),
        ("_WRITE", "slots[slots_shape[1] + row]", "slots[row]"),
    ],
)
def test_a_fault_in_the_copies_is_found(
    name: str, right: str, wrong: str, kernels: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = getattr(state_slots, name)
    assert right in whole
    monkeypatch.setattr(state_slots, name, whole.replace(right, wrong))
    assert slots_problem([((4, 8), mx.bfloat16)], GPU_STATE_KERNELS) is not None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dtype": mx.int32}, "gated delta nets in"),
        ({"taps": 9}, "a convolution over 9 inputs"),
        ({"value_heads": 5}, "5 value heads over 2 key heads"),
        ({"key_dim": 40}, "heads of 40 and 16"),
        ({"key_dim": 256, "value_dim": 256}, "heads of 256 and 256"),
    ],
)
def test_what_the_kernels_do_not_know_is_said(changes: dict[str, Any], said: str) -> None:
    shape = replace(SHAPES["f32 16 of 2"], **changes)
    assert said in (shape.problem or "")
    assert delta_problem(shape, GPU_STATE_KERNELS) == shape.problem


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dims", [(16, 16), (64, 64), (96, 48), (128, 128), (192, 128), (256, 64), (256, 128)])
def test_work_is_divided_without_a_rest(dims: tuple[int, int], size: int) -> None:
    shape = DeltaShape(mx.bfloat16 if size == 2 else mx.float32, 2, 4, *dims, 4)
    assert shape.problem is None
    for geometry in (step_geometry(shape), scan_geometry(shape)):
        assert shape.key_dim % (4 * geometry.lanes) == 0
        assert 32 % geometry.lanes == 0
        assert geometry.warps <= 16
        assert geometry.rows * shape.key_dim // geometry.lanes <= 64
    assert step_geometry(shape).teams * step_geometry(shape).rows >= shape.value_dim


@pytest.mark.parametrize(
    "shape",
    [
        SsmShape(mx.float32, 1, 8, 16, 16, 4, biased=True, limit=(0.0, math.inf)),
        SsmShape(mx.bfloat16, 2, 4, 128, 64, 4, biased=False, limit=(0.001, 0.1)),
        SsmShape(mx.float16, 1, 3, 64, 80, 3, biased=True, limit=(0.0, 1e9)),
        SsmShape(mx.bfloat16, 1, 1, 256, 128, 2, biased=True, limit=(0.5, 0.6)),
    ],
)
def test_steps_of_mamba_2_give_what_numpy_gives(shape: SsmShape, kernels: dict[str, HostKernel]) -> None:
    assert ssm_problem(shape, GPU_STATE_KERNELS) is None
    assert set(kernels) == {"conv_step", "ssm_step"}


@pytest.mark.parametrize("dialect", ["metal"])
@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("CONV", "= raw[tap + 1];", "= raw[tap];"),
        ("CONV", "BIASED ? float(bias[c + i]) : 0.0f", "0.0f"),
        ("CONV", "from < 0 && to < 0", "from < 0"),
        ("SSM", "FMAX(plus, CONSTANT(LOW))", "plus"),
        ("SSM", "head / (HV / HK) * DK", "0"),
        ("SSM", "FMA(skip, x, y)", "y"),
        ("SSM", "to >= 0 && ROW(r) < DV", "from >= 0 && ROW(r) < DV"),
    ],
)
def test_a_fault_in_the_text_of_mamba_2_is_found(
    name: str, right: str, wrong: str, kernels: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = getattr(ssm_text, name)
    assert right in whole
    monkeypatch.setattr(ssm_text, name, whole.replace(right, wrong))
    shape = SsmShape(mx.float32, 2, 4, 16, 16, 4, biased=True, limit=(1.0, math.inf))
    assert ssm_problem(shape, GPU_STATE_KERNELS) is not None


@pytest.mark.skipif(shutil.which("clang++") is None, reason="needs clang++, which knows address spaces")
@pytest.mark.parametrize("dialect", ["metal"])
def test_every_pointer_has_its_address_space(kernels: dict[str, HostKernel]) -> None:
    assert delta_problem(SHAPES["bf16 128 of 2, interleaved"], GPU_STATE_KERNELS) is None
    assert ssm_problem(SsmShape(mx.float16, 1, 3, 64, 80, 3, biased=True, limit=(0.0, 1e9)), GPU_STATE_KERNELS) is None
    assert slots_problem([((4, 8), mx.bfloat16), ((9,), mx.float32)], GPU_STATE_KERNELS) is None
    for kernel in kernels.values():
        for source in kernel.sources:
            flags = ["-std=c++17", "-fsyntax-only", "-DADDRESS_SPACES", "-Wno-everything", f"-I{HERE}"]
            said = subprocess.run(["clang++", *flags, str(source)], capture_output=True, text=True)
            assert said.returncode == 0, said.stderr[:2000]
