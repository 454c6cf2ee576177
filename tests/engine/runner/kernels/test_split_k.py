"""The CUDA texts of products that split K and of what follows them, on this machine by ``cuda_on_host``."""

import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from engine.runner.kernels import split_k as module
from engine.runner.kernels.fused_rows import Norm
from engine.runner.kernels.split_k import add_parts, silu_and_mul, split_k
from engine.runner.kv.layer_trial import distance
from tests.engine.runner.kernels.cuda_on_host import kernels_on_host

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
LIMIT = {mx.bfloat16: 4e-3, mx.float16: 5e-4}


@pytest.fixture(autouse=True)
def host_kernels(monkeypatch: pytest.MonkeyPatch, kernel_folder: Path) -> None:
    kernels_on_host(monkeypatch, kernel_folder, module)


def normal(*shape: int, dtype: mx.Dtype = mx.float32, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def difference(found: mx.array, wanted: mx.array) -> float:
    """Of the norm; NaN where anything was not written."""
    assert found.shape == wanted.shape
    return distance(found, wanted)


@pytest.mark.parametrize(
    ("rows", "width", "k", "dtype", "parts"),
    [
        (32, 64, 512, mx.bfloat16, 1),
        (17, 96, 1024, mx.bfloat16, 2),
        (24, 40, 1472, mx.float16, 3),
        (29, 33, 64, mx.bfloat16, 1),
        (25, 80, 608, mx.float16, 1),
        (2, 64 * 200, 1024, mx.bfloat16, 2),
        (18, 64 * 300, 1024, mx.bfloat16, 1),
    ],
)
def test_parts_of_a_product_add_up_to_it(rows: int, width: int, k: int, dtype: mx.Dtype, parts: int) -> None:
    x, weight = normal(rows, k, dtype=dtype), normal(width, k, dtype=dtype, seed=1)
    found = split_k(x, weight)
    assert found.shape == (parts, rows, width)
    assert difference(found.sum(axis=0), x.astype(mx.float32) @ weight.astype(mx.float32).T) < 1e-5


@pytest.mark.parametrize(("rows", "width", "dtype"), [(17, 64, mx.bfloat16), (32, 132, mx.float16)])
def test_a_gate_joins_its_up_projection(rows: int, width: int, dtype: mx.Dtype) -> None:
    joined = normal(rows, 2 * width, dtype=dtype)
    gate, up = mx.split(joined.astype(mx.float32), 2, axis=-1)
    assert difference(silu_and_mul(joined), gate * mx.sigmoid(gate) * up) < LIMIT[dtype]


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
