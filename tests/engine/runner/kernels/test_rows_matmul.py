"""The CUDA text of products of few rows, run on this machine by ``cuda_on_host``, against float32."""

import shutil
from typing import Any

import mlx.core as mx
import pytest

from engine.runner.kernels import rows_matmul
from engine.runner.kernels.rows_matmul import Packed
from tests.engine.runner.kernels.cuda_on_host import HostKernel

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
LIMIT = {mx.bfloat16: 4e-3, mx.float16: 5e-4}
"""Of the norm: rounding of the result, and of the unpacked weights."""


def _error(got: mx.array, x: mx.array, weight: mx.array) -> float:
    expected = x.astype(mx.float32) @ weight.astype(mx.float32).T
    assert got.shape == expected.shape
    return float(mx.linalg.norm(got.astype(mx.float32) - expected) / mx.linalg.norm(expected))


def _normal(*shape: int, dtype: mx.Dtype) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(sum(shape))).astype(dtype)


def launches(kernels: dict[str, HostKernel]) -> dict[str, int]:
    return {name: kernel.launches for name, kernel in kernels.items()}


def named(kind: str, num_weights: int) -> str:
    return kind if num_weights == 1 else f"{kind}_{num_weights}"


@needs_compiler
@pytest.mark.parametrize(
    ("lead", "widths", "k", "dtype"),
    [
        ((1,), (48,), 512, mx.bfloat16),
        ((3, 1), (40,), 64, mx.bfloat16),
        ((8,), (16,), 1088, mx.bfloat16),
        ((2, 8), (33,), 576, mx.bfloat16),
        ((5,), (40, 8, 24), 192, mx.bfloat16),
        ((1, 13), (24, 72), 128, mx.bfloat16),
        ((7,), (9,), 320, mx.float16),
        ((1,), (8200,), 64, mx.bfloat16),
        ((27, 1), (40, 8), 1088, mx.bfloat16),
        ((2,), (40, 24, 8, 5), 192, mx.bfloat16),
        ((20,), (8, 40, 72, 16), 64, mx.bfloat16),
    ],
)
def test_dense_weights_are_multiplied_right_whatever_the_rows_and_widths(
    lead: tuple[int, ...], widths: tuple[int, ...], k: int, dtype: mx.Dtype, host_products: dict[str, HostKernel]
) -> None:
    x = _normal(*lead, k, dtype=dtype)
    weights = [_normal(width, k, dtype=dtype) for width in widths]
    results = rows_matmul.dense(x, weights)
    assert launches(host_products) == {named("rows_dense", len(widths)): 1}
    for got, weight in zip(results, weights, strict=True):
        assert _error(got, x, weight) < LIMIT[dtype]


@needs_compiler
@pytest.mark.parametrize(
    ("lead", "widths", "k", "bits", "group_size", "dtype"),
    [
        ((1,), (48,), 512, 4, 64, mx.bfloat16),
        ((6, 1), (40, 8, 24), 384, 4, 64, mx.bfloat16),
        ((11,), (56,), 256, 4, 64, mx.bfloat16),
        ((31, 1), (33,), 640, 4, 64, mx.bfloat16),
        ((3,), (24,), 384, 4, 64, mx.float16),
        ((2,), (24,), 384, 4, 32, mx.bfloat16),
        ((2,), (24,), 384, 4, 128, mx.bfloat16),
        ((4,), (24, 16), 448, 8, 64, mx.bfloat16),
        ((17,), (24,), 192, 8, 32, mx.float16),
        ((3,), (40, 8, 9), 704, 4, 64, mx.bfloat16),
        ((1, 1), (72, 40, 8, 8), 256, 4, 64, mx.bfloat16),
        ((18,), (40, 24, 8, 1), 192, 8, 64, mx.bfloat16),
        ((19,), (24,), 2112, 4, 64, mx.bfloat16),
        ((2,), (24,), 96, 4, 32, mx.float16),
        ((2,), (24,), 96, 8, 32, mx.bfloat16),
        ((2,), (24,), 64, 4, 64, mx.bfloat16),
    ],
)
def test_packed_weights_are_multiplied_right_whatever_the_rows_and_widths(
    lead: tuple[int, ...],
    widths: tuple[int, ...],
    k: int,
    bits: int,
    group_size: int,
    dtype: mx.Dtype,
    host_products: dict[str, HostKernel],
) -> None:
    x = _normal(*lead, k, dtype=dtype)
    weights = [
        Packed(*mx.quantize(_normal(width, k, dtype=dtype), group_size=group_size, bits=bits)) for width in widths
    ]
    results = rows_matmul.quantized(x, weights, bits=bits, group_size=group_size)
    assert launches(host_products) == {named("rows_quantized", len(widths)): 1}
    for got, (words, scales, biases) in zip(results, weights, strict=True):
        exact = [array.astype(mx.float32) for array in (scales, biases)]
        assert _error(got, x, mx.dequantize(words, *exact, group_size=group_size, bits=bits)) < LIMIT[dtype]


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("num_weights", range(1, rows_matmul.MAX_SIBLINGS + 1))
def test_a_launch_has_no_more_arrays_than_there_are_weights_and_parts_of_them(
    num_weights: int, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, tuple[str, ...]] = {}
    given: list[list[mx.array]] = []

    def make(name: str, inputs: tuple[str, ...], *_: Any) -> Any:
        seen[name] = inputs

        def launch(inputs: list[mx.array], output_shapes: list[tuple[int, ...]], **_: Any) -> list[mx.array]:
            given.append(inputs)
            return [mx.zeros(shape) for shape in output_shapes]

        return launch

    monkeypatch.setattr(rows_matmul, "make_kernel", make)
    x, weights = mx.zeros((2, 128)), [mx.zeros((8 * (place + 1), 128)) for place in range(num_weights)]
    if bits:
        packed = [Packed(*mx.quantize(weight, group_size=64, bits=bits)) for weight in weights]
        results = rows_matmul.quantized(x, packed, bits=bits, group_size=64)
        arrays = [array for part in zip(*packed, strict=True) for array in part]
    else:
        results, arrays = rows_matmul.dense(x, weights), weights
    parts = "wsb" if bits else "w"
    expected = ("x", *(f"{part}{place}" for part in parts for place in range(num_weights)))
    assert seen == {named("rows_quantized" if bits else "rows_dense", num_weights): expected}
    assert [result.shape for result in results] == [(2, 8 * (place + 1)) for place in range(num_weights)]
    (launched,) = given
    assert all(got is array for got, array in zip(launched[1:], arrays, strict=True))


@pytest.mark.parametrize(
    ("taken", "k", "settings"),
    [
        (True, 2560, {}),
        (False, 2560 + 32, {}),
        (True, 2560, {"bits": 4, "group_size": 64}),
        (True, 2560 + 64, {"bits": 4, "group_size": 64}),
        (False, 2560 + 64, {"bits": 4, "group_size": 128}),
        (True, 2560 + 32, {"bits": 4, "group_size": 32}),
        (False, 2560 + 32, {"bits": 4, "group_size": 64}),
        (True, 2560 + 64, {"bits": 8, "group_size": 64}),
        (False, 2560, {"bits": 6, "group_size": 64}),
        (False, 2560, {"bits": 4, "group_size": 16}),
    ],
)
def test_only_weights_that_the_kernel_covers_are_taken(taken: bool, k: int, settings: dict[str, Any]) -> None:
    asks = rows_matmul.takes_quantized if settings else rows_matmul.takes_dense
    assert asks(k, mx.bfloat16, **settings) is taken
    assert not asks(k, mx.float32, **settings)


def test_blocks_that_would_not_fill_the_chip_share_k_among_more_warps() -> None:
    assert [rows_matmul.dense_geometry(1, columns).warps for columns in (2560, 6144, 19456)] == [16, 8, 4]
    assert rows_matmul.dense_geometry(32, 2560) == (4, 2, 8)
    assert rows_matmul.quantized_geometry(1, 1024, steps=3).warps == 3
