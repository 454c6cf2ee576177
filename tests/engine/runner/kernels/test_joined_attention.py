"""The text of attention from a joined product, in both dialects, on this machine's CPU against numpy."""

import shutil
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from engine.runner.kernels import joined_attention as module
from engine.runner.kernels import paged_attention
from engine.runner.kernels.joined_check import JoinedShape, joined_problem
from engine.runner.kernels.paged_attention import attention_geometry
from engine.runner.kernels.self_check import GPU_KERNELS
from tests.engine.runner.kernels.conftest import TextKernels
from tests.engine.runner.kernels.text_on_host import HostKernel

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the kernels' text")


def shape(dtype: mx.Dtype, dim: int, group: int, **more: object) -> JoinedShape:
    known = {"heads": 2 * group, "kv_heads": 2, "block_size": 16, "scale": dim**-0.5}
    return JoinedShape(dtype=dtype, dim=dim, **{**known, **more})  # type: ignore[arg-type]


QWEN3 = shape(mx.bfloat16, 128, 4, eps=1e-6)
SHAPES = {
    "qwen3": QWEN3,
    "llama, window": shape(mx.bfloat16, 128, 8, window=100),
    "f16 of 64": shape(mx.float16, 64, 7),
    "f32 of 96, normed": shape(mx.float32, 96, 2, eps=1e-5, block_size=8),
    "gemma 4, sliding": shape(mx.bfloat16, 256, 2, eps=1e-6, scale=1.0, window=100, value_heads="normalized"),
    "gemma 4, full": shape(mx.bfloat16, 512, 8, eps=1e-6, scale=1.0, value_heads="normalized keys"),
    "f32 of 32, values normed": shape(mx.float32, 32, 2, eps=1e-5, value_heads="normalized"),
    "f16 of 16, keys as values": shape(mx.float16, 16, 1, eps=1e-5, value_heads="normalized keys"),
}

PACKED = {
    "qwen3, 8 bits": shape(mx.bfloat16, 128, 4, eps=1e-6, bits=8),
    "llama, 4 bits, window": shape(mx.float16, 64, 8, window=100, bits=4),
    "f32 of 96, 8 bits": shape(mx.float32, 96, 2, eps=1e-5, bits=8),
    "gemma 4, sliding, 8 bits": shape(
        mx.bfloat16, 256, 2, eps=1e-6, scale=1.0, window=100, bits=8, value_heads="normalized"
    ),
    "gemma 4, full, 4 bits": shape(mx.bfloat16, 512, 8, eps=1e-6, scale=0.1, bits=4, value_heads="normalized keys"),
}
ON_TENSOR_CORES = PACKED | {
    "llama of 12": shape(mx.bfloat16, 128, 12, window=100),
    "f16 of 256": shape(mx.float16, 256, 8, eps=1e-6),
    "values normed, of 256": shape(mx.bfloat16, 256, 8, eps=1e-6, window=100, value_heads="normalized"),
    "gemma 4, full": SHAPES["gemma 4, full"],
}


@pytest.fixture
def kernels(text_kernels: TextKernels) -> dict[str, HostKernel]:
    return text_kernels(paged_attention)


@needs_compiler
@pytest.mark.parametrize(
    ("dialect", "name"),
    [
        *(("metal", name) for name in SHAPES),
        ("cuda", "qwen3"),
        ("cuda", "f16 of 64"),
        ("cuda", "gemma 4, sliding"),
        ("cuda", "f16 of 16, keys as values"),
    ],
)
def test_the_text_gives_what_numpy_gives(name: str, kernels: dict[str, HostKernel]) -> None:
    assert joined_problem(SHAPES[name], GPU_KERNELS) is None
    assert any(one.startswith("joined_attention") for one in kernels)


@needs_compiler
@pytest.mark.parametrize(
    ("dialect", "name"),
    [*(("metal", name) for name in PACKED), ("cuda", "qwen3, 8 bits"), ("cuda", "gemma 4, sliding, 8 bits")],
)
def test_packed_pages_give_what_numpy_gives(name: str, kernels: dict[str, HostKernel]) -> None:
    assert joined_problem(PACKED[name], GPU_KERNELS) is None
    assert any(one.startswith("joined_attention_packed") for one in kernels)


@needs_compiler
@pytest.mark.parametrize("dialect", ["cuda"])
@pytest.mark.parametrize("name", [name for name in ON_TENSOR_CORES if not name.startswith("f32")])
def test_tensor_cores_give_what_numpy_gives(
    name: str, kernels: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_attention, "tensor_cores", lambda: True)
    assert joined_problem(ON_TENSOR_CORES[name], GPU_KERNELS) is None
    assert any(one.startswith("joined_attention_mma") for one in kernels)


@needs_compiler
@pytest.mark.parametrize("dialect", ["metal"])
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("f[i + PAIRS] = b * cosines[i] + a * sines[i];", "f[i + PAIRS] = b * cosines[i] - a * sines[i];"),
        ("(kv_heads * GROUP + kv_head) * KEY_DIM", "(kv_heads * GROUP) * KEY_DIM"),
        ("scaled * gain[", "gain["),
        ("newest[(KEY_LOADS + v) * LANES + in_team] = raw;", ""),
    ],
)
def test_a_fault_in_the_text_is_found(
    right: str, wrong: str, kernels: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    body, header = module.joined_text(normed=True)
    assert right in body + header
    broken = body.replace(right, wrong), header.replace(right, wrong)
    monkeypatch.setattr(module, "joined_text", lambda **_how: broken)
    assert joined_problem(QWEN3, GPU_KERNELS) is not None


@needs_compiler
@pytest.mark.parametrize("dialect", ["metal"])
@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("gemma 4, sliding", "w[i] *= scaled;", ";"),
        ("gemma 4, sliding", "packed_vector<T>(&w[v * VEC])", "*(GLOBAL const uint4*)(new_value + COLUMN(v))"),
        ("gemma 4, full", "kv_heads * (1 - 1) * KEY_DIM", "kv_heads * KEY_DIM"),
        ("gemma 4, full", "kv_heads * (GROUP + 1) * KEY_DIM", "kv_heads * (GROUP + 2) * KEY_DIM"),
    ],
)
def test_a_fault_in_value_heads_is_found(
    name: str, right: str, wrong: str, kernels: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    body, header = module.joined_text(normed=True, value_heads=SHAPES[name].value_heads)
    assert right in body
    monkeypatch.setattr(module, "joined_text", lambda **_how: (body.replace(right, wrong), header))
    assert joined_problem(SHAPES[name], GPU_KERNELS) is not None


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("group", [1, 4, 8, 16])
@pytest.mark.parametrize("size", [2, 4])
def test_a_lane_holds_both_halves_of_its_pairs(dim: int, group: int, size: int) -> None:
    geometry = attention_geometry(dim, dim, group, size, rotates=True)
    assert module.rotates(dim, size)
    assert dim // (geometry.lanes * 16 // size) % 2 == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"joined": mx.zeros((2, 100))}, "do not hold"),
        ({"constants": module.HeadConstants(mx.zeros((9,)))}, "constants"),
        ({"constants": module.HeadConstants(mx.zeros((8,)), 1e-6)}, "constants"),
        ({"constants": module.HeadConstants(mx.zeros((8,)), None, "normalized")}, "value heads alone"),
        ({"constants": module.HeadConstants(mx.zeros((40,)), 1e-6, "normalized keys")}, "do not hold"),
        ({"joined": mx.zeros((2, 128), mx.float16)}, "rows and pages in"),
        ({"positions": mx.zeros((1,), mx.int32)}, "2 rows"),
    ],
)
def test_what_does_not_fit_together_is_refused(change: dict[str, Any], said: str) -> None:
    arrays: dict[str, Any] = {
        "joined": mx.zeros((2, 128)), "key_pages": mx.zeros((1, 2, 64, 16)), "value_pages": mx.zeros((1, 2, 64, 16)),
        "block_tables": mx.zeros((2, 4), mx.int32), "positions": mx.zeros((4,), mx.int32),
        "constants": module.HeadConstants(mx.zeros((8,))),
    }  # fmt: skip
    with pytest.raises(ValueError, match=said):
        module.joined_attention(**{**arrays, **change}, heads=4, scale=1.0, block_size=16)


def test_a_kernel_that_fails_is_a_line() -> None:
    class Broken:
        def joined_attention(self, *_args: object, **_how: object) -> mx.array:
            raise RuntimeError("error: expected ';'")

    assert "expected ';'" in str(joined_problem(replace(QWEN3, dtype=mx.float32), Broken()))  # type: ignore[arg-type]
