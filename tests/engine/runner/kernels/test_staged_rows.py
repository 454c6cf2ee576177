"""The CUDA text of products of 17 to 32 rows and of the sums behind them, on this machine by ``cuda_on_host``."""

import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from engine.runner.kernels import staged_rows as module
from engine.runner.kernels.fused_rows import Norm
from engine.runner.kernels.staged_rows import add_parts, staged_parts, staged_rows
from tests.engine.runner.kernels.cuda_on_host import HostKernel

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
LIMIT = {mx.bfloat16: 4e-3, mx.float16: 5e-4}


@pytest.fixture(autouse=True)
def host_kernels(monkeypatch: pytest.MonkeyPatch, kernel_folder: Path) -> None:
    made: dict[str, HostKernel] = {}

    def make(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str, header: str) -> HostKernel:
        return made.setdefault(name, HostKernel(name, inputs, outputs, source, header, kernel_folder))

    monkeypatch.setattr(module, "make_kernel", make)


def normal(*shape: int, dtype: mx.Dtype = mx.float32, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def difference(found: mx.array, wanted: mx.array) -> float:
    """Of the norm; NaN where anything was not written."""
    assert found.shape == wanted.shape
    return float((mx.linalg.norm(found.astype(mx.float32) - wanted) / mx.linalg.norm(wanted)).item())


@pytest.mark.parametrize(
    ("rows", "width", "k", "dtype", "ending"),
    [
        (32, 96, 256, mx.bfloat16, "plain"),
        (17, 40, 64, mx.bfloat16, "plain"),
        (24, 33, 704, mx.bfloat16, "bias"),
        (29, 64, 320, mx.float16, "bias"),
        (25, 80, 192, mx.bfloat16, "gated"),
        (18, 200, 512, mx.float16, "gated"),
        (2, 32, 128, mx.bfloat16, "plain"),
    ],
)
@pytest.mark.parametrize("full", [528, 2], ids=["warps share K", "wide tiles"])
def test_a_product_is_right(
    rows: int, width: int, k: int, dtype: mx.Dtype, ending: str, full: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FULL", full)
    x, weight = normal(rows, k, dtype=dtype), normal(width, k, dtype=dtype, seed=1)
    bias = normal(width, dtype=dtype, seed=2) if ending == "bias" else None
    wanted = x.astype(mx.float32) @ weight.astype(mx.float32).T
    if bias is not None:
        wanted += bias.astype(mx.float32)
    if ending == "gated":
        gate, up = mx.split(wanted, 2, axis=-1)
        wanted = gate * mx.sigmoid(gate) * up
    assert difference(staged_rows(x, weight, bias=bias, gated=ending == "gated"), wanted) < LIMIT[dtype]


@pytest.mark.parametrize(
    ("width", "k", "parts"), [(64, 512, 1), (96, 1024, 2), (40, 1472, 3), (64 * 200, 1024, 2), (64 * 300, 1024, 1)]
)
def test_parts_of_a_product_add_up_to_it(width: int, k: int, parts: int) -> None:
    x, weight = normal(20, k, dtype=mx.bfloat16), normal(width, k, dtype=mx.bfloat16, seed=1)
    found = staged_parts(x, weight)
    assert found.shape == (parts, 20, width)
    assert difference(found.sum(axis=0), x.astype(mx.float32) @ weight.astype(mx.float32).T) < 1e-5


@pytest.mark.parametrize(("parts", "rows", "width"), [(1, 3, 64), (5, 32, 192), (13, 17, 2560), (2, 1, 8192)])
def test_parts_and_a_residual_are_added_and_normalized(parts: int, rows: int, width: int) -> None:
    some, residual = normal(parts, rows, width), normal(rows, width, dtype=mx.bfloat16, seed=1)
    norm = Norm((1 + 0.2 * normal(width, seed=2)).astype(mx.bfloat16), 1e-2)
    wanted = some.sum(axis=0) + residual.astype(mx.float32)
    total, normed = add_parts(some, residual, norm)
    assert difference(total, wanted) < LIMIT[mx.bfloat16]
    assert difference(normed, mx.fast.rms_norm(wanted, norm.gain.astype(mx.float32), norm.eps)) < LIMIT[mx.bfloat16]
    (alone, same) = add_parts(some, residual)
    assert alone is same
    assert mx.array_equal(alone, total)
