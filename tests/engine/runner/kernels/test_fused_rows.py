"""The CUDA text of products with what stands before and behind them, on this machine by ``cuda_on_host``."""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from engine.runner.kernels import fused_rows as module
from engine.runner.kernels.fused_rows import Norm, fused_rows, takes_norm
from tests.engine.runner.kernels.cuda_on_host import HostKernel, kernels_on_host

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
LIMIT = {mx.bfloat16: 6e-3, mx.float16: 1e-3}
"""Of the norm: rows times gains and the result are rounded, and so are unpacked weights."""
WIDTH = 40


@pytest.fixture(autouse=True)
def host_kernels(monkeypatch: pytest.MonkeyPatch, kernel_folder: Path) -> dict[str, HostKernel]:
    return kernels_on_host(monkeypatch, kernel_folder, module)


def normal(*shape: int, dtype: mx.Dtype, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def weights(k: int, dtype: mx.Dtype, bits: int, width: int = WIDTH) -> tuple[mx.array, mx.array]:
    """As they are given, and in float32."""
    weight = normal(width, k, dtype=dtype, seed=1)
    if not bits:
        return weight, weight.astype(mx.float32)
    words, scales, biases = mx.quantize(weight, group_size=64, bits=bits)
    exact = mx.dequantize(
        words, scales.astype(mx.float32), biases.astype(mx.float32), group_size=64, bits=bits
    )  # fmt: skip
    scaling = mx.stack([scales, biases]).flatten().view(mx.uint32)
    return mx.concatenate([words.flatten(), scaling]).reshape(width, -1), exact


def wanted(x: mx.array, weight: mx.array, norm: Norm | None, ending: dict[str, Any]) -> mx.array:
    rows = x.astype(mx.float32)
    if norm is not None:
        rows = mx.fast.rms_norm(rows, norm.gain.astype(mx.float32), norm.eps)
    result = rows @ weight.T
    if activation := ending.get("gated"):
        gate, up = mx.split(result, 2, axis=-1)
        return (nn.silu if activation == "silu" else nn.gelu_approx)(gate) * up
    return result + sum(added.astype(mx.float32) for added in ending.values())


def error_of(
    rows: int, k: int, dtype: mx.Dtype, bits: int, normed: bool, ending: str, width: int = WIDTH, shift: float = 0.0
) -> float:
    """How far a product with its surroundings is off, as a part of the norm; ``shift`` is added to its rows."""
    x, (weight, exact) = (normal(rows, k, dtype=dtype) + shift).astype(dtype), weights(k, dtype, bits, width)
    norm = Norm((1 + 0.2 * normal(k, dtype=dtype, seed=2)).astype(dtype), 1e-2) if normed else None
    endings: dict[str, dict[str, Any]] = {
        "plain": {}, "silu": {"gated": "silu"}, "gelu": {"gated": "gelu"},
        "bias": {"bias": normal(width, dtype=dtype, seed=3)},
        "residual": {"residual": normal(rows, width, dtype=dtype, seed=4)},
    }  # fmt: skip
    found = fused_rows(x, weight, bits=bits, group_size=64 if bits else 0, norm=norm, **endings[ending])
    expected = wanted(x, exact, norm, endings[ending])
    assert found.shape == expected.shape
    error = mx.linalg.norm(found.astype(mx.float32) - expected) / mx.linalg.norm(expected)
    return float(error.item())


@pytest.mark.parametrize(
    ("rows", "k", "dtype", "bits", "normed", "ending"),
    [
        (1, 128, mx.bfloat16, 0, True, "plain"),
        (5, 192, mx.bfloat16, 0, True, "silu"),
        (13, 128, mx.bfloat16, 0, True, "silu"),
        (13, 576, mx.bfloat16, 0, False, "residual"),
        (3, 64, mx.bfloat16, 0, True, "bias"),
        (3, 64, mx.float16, 0, False, "silu"),
        (1, 128, mx.bfloat16, 0, False, "gelu"),
        (13, 192, mx.float16, 0, False, "gelu"),
        (3, 256, mx.bfloat16, 4, True, "plain"),
        (11, 128, mx.bfloat16, 4, True, "silu"),
        (31, 256, mx.bfloat16, 4, True, "silu"),
        (5, 256, mx.bfloat16, 4, False, "gelu"),
        (19, 128, mx.bfloat16, 8, True, "gelu"),
        (31, 320, mx.float16, 4, False, "gelu"),
        (31, 128, mx.bfloat16, 4, False, "residual"),
        (2, 128, mx.bfloat16, 8, True, "bias"),
        (3, 320, mx.bfloat16, 4, True, "silu"),
        (19, 64, mx.bfloat16, 4, True, "residual"),
    ],
)
def test_a_product_with_its_surroundings_is_right(
    rows: int, k: int, dtype: mx.Dtype, bits: int, normed: bool, ending: str
) -> None:
    assert error_of(rows, k, dtype, bits, normed, ending) < LIMIT[dtype]


def test_what_is_not_asked_for_is_not_in_the_text(host_kernels: dict[str, HostKernel]) -> None:
    """MLX hashes a kernel's text at every launch."""
    lengths = {
        (normed, ending): sum(map(len, module.fused_text(packed=False, normed=normed, ending=ending)))
        for normed in (False, True)
        for ending in ("plain", "silu", "gelu")
    }  # fmt: skip
    assert lengths[False, "plain"] < lengths[False, "silu"] < lengths[True, "silu"]
    assert lengths[False, "plain"] < lengths[False, "gelu"] < lengths[True, "gelu"]
    assert "gain" not in "".join(module.fused_text(packed=True, normed=False, ending="residual"))


def test_rows_that_float16_might_not_hold_are_normalized_before_the_product() -> None:
    assert [takes_norm(dtype) for dtype in (mx.bfloat16, mx.float16)] == [True, False]
