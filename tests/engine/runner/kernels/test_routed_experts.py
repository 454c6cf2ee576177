"""The CUDA texts of products over routed experts, run on this machine by ``cuda_on_host``, against float32."""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from engine.runner.kernels import routed_experts as module
from engine.runner.kernels.routed_experts import Activation, ExpertWeights, Geometry, Packing, down, gate_up, route
from tests.engine.runner.kernels.cuda_on_host import HostKernel, kernels_on_host

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
LIMIT = {mx.bfloat16: 6e-3, mx.float16: 1e-3}
"""Of the norm: results are rounded, and so are unpacked weights."""
EXPERTS, WIDTH, OUT = 5, 24, 40
FORMATS = {
    "dense": Packing("dense"), "4 bits": Packing("affine", 4, 64), "8 bits": Packing("affine", 8, 32),
    "4 bits in groups of 128": Packing("affine", 4, 128), "mxfp4": Packing("mxfp4", 4, 32),
}  # fmt: skip


@pytest.fixture(autouse=True)
def host_kernels(monkeypatch: pytest.MonkeyPatch, kernel_folder: Path) -> dict[str, HostKernel]:
    return kernels_on_host(monkeypatch, kernel_folder, module)


def normal(*shape: int, dtype: mx.Dtype, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def weights(
    packing: Packing, width: int, k: int, dtype: mx.Dtype, seed: int, biased: bool = False
) -> tuple[ExpertWeights, mx.array, mx.array]:
    """As they are given, and in float32; with the biases that are added."""
    weight = normal(EXPERTS, width, k, dtype=dtype, seed=seed) * k**-0.5
    added = normal(EXPERTS, width, dtype=dtype, seed=seed + 50) if biased else None
    known = mx.zeros((EXPERTS, width)) if added is None else added.astype(mx.float32)
    if packing.kind == "dense":
        return ExpertWeights(weight, added=added), weight.astype(mx.float32), known
    how = {"group_size": packing.group_size, "bits": packing.bits, "mode": packing.kind}
    words, scales, *biases = mx.quantize(weight, **how)  # type: ignore[arg-type]
    exact = (array.astype(mx.float32) if biases else array for array in (scales, *biases))
    return (
        ExpertWeights(words, scales, biases[0] if biases else None, added),
        mx.dequantize(words, *exact, **how).astype(mx.float32),  # type: ignore[arg-type]
        known,
    )


def activated(gate: mx.array, up: mx.array, kind: str) -> mx.array:
    if kind == "silu":
        return gate * mx.sigmoid(gate) * up
    if kind == "gelu":
        return 0.5 * gate * (1 + mx.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * up
    gate, up = mx.minimum(gate, 0.75), mx.clip(up, -0.75, 0.75)
    return gate * mx.sigmoid(1.702 * gate) * (up + 1)


def product(x: mx.array, weight: mx.array, added: mx.array, experts: mx.array) -> mx.array:
    """Of each row with its expert, in float32."""
    return mx.einsum("pk,pnk->pn", x.astype(mx.float32), weight[experts]) + added[experts]


def error(found: mx.array, expected: mx.array) -> float:
    assert found.shape == expected.shape
    return float(mx.linalg.norm(found.astype(mx.float32) - expected) / mx.linalg.norm(expected))


def some_indices(tokens: int, per_token: int, *, spread: bool = True) -> mx.array:
    """Experts [T, k] of which one has nothing; or all tokens have the same."""
    rng = np.random.default_rng(tokens)
    rows = [rng.permutation(EXPERTS - 1)[:per_token] if spread else np.arange(per_token) for _ in range(tokens)]
    return mx.array(np.array(rows, np.uint32))


@pytest.mark.parametrize(
    ("tokens", "per_token", "spread"), [(1, 3, True), (21, 3, True), (13, 2, False), (64, 1, True)]
)
def test_few_pairs_need_no_list_of_tiles(
    tokens: int, per_token: int, spread: bool, host_kernels: dict[str, HostKernel]
) -> None:
    x, indices = normal(tokens, 192, dtype=mx.bfloat16), some_indices(tokens, per_token, spread=spread)
    routes = route(indices, EXPERTS, rows=8)
    assert routes.tiles is None
    last, exact, none = weights(FORMATS["4 bits"], OUT, 192, mx.bfloat16, 3)
    first, exact_first, _ = weights(FORMATS["4 bits"], OUT, 192, mx.bfloat16, 4)
    experts, rows = indices.flatten(), mx.repeat(x, per_token, axis=0)
    expected = product(rows, exact, none, experts)
    assert error(down(rows, routes, last, FORMATS["4 bits"]), expected) < LIMIT[mx.bfloat16]
    expected = activated(expected, product(rows, exact_first, none, experts), "silu")
    found = gate_up(x, routes, last, first, FORMATS["4 bits"], Activation("silu"))
    assert error(found, expected) < LIMIT[mx.bfloat16]
    assert sum(kernel.launches for kernel in host_kernels.values()) == 2


@pytest.mark.parametrize(("kind", "alpha", "limit"), [("gelu", 0.0, 0.0), ("oai", 1.702, 0.75)])
@pytest.mark.parametrize("geometry", [Geometry(False, 1, 1, 2, 2), Geometry(True, 2, 1, 2)], ids=str)
def test_activations_and_biases_are_part_of_the_product(
    kind: str, alpha: float, limit: float, geometry: Geometry
) -> None:
    packing, indices = FORMATS["mxfp4"], some_indices(37, 3)
    x, experts = normal(37, 96, dtype=mx.bfloat16), indices.flatten()
    (gate, exact_gate, one), (up, exact_up, two) = (
        weights(packing, WIDTH, 96, mx.bfloat16, seed, biased=True) for seed in (1, 2)
    )
    rows = mx.repeat(x, 3, axis=0)
    expected = activated(product(rows, exact_gate, one, experts), product(rows, exact_up, two, experts), kind)
    routes = route(indices, EXPERTS, rows=geometry.rows)
    activation = Activation(kind, alpha, limit)  # type: ignore[arg-type]
    assert error(gate_up(x, routes, gate, up, packing, activation, geometry), expected) < LIMIT[mx.bfloat16]
    last, exact, added = weights(packing, OUT, 96, mx.bfloat16, 3, biased=True)
    expected = product(rows, exact, added, experts)
    assert error(down(rows, routes, last, packing, geometry), expected) < LIMIT[mx.bfloat16]


@pytest.mark.parametrize("name", ["dense", "4 bits"])
def test_float16_is_multiplied_as_bfloat16_is(name: str) -> None:
    packing, indices = FORMATS[name], some_indices(37, 3)
    rows, experts = normal(111, 192, dtype=mx.float16), indices.flatten()
    last, exact, none = weights(packing, OUT, 192, mx.float16, 3)
    for tile in (8, 32):
        found = down(rows, route(indices, EXPERTS, rows=tile), last, packing)
        assert error(found, product(rows, exact, none, experts)) < LIMIT[mx.float16]


def test_tiles_suit_the_rows_that_experts_get() -> None:
    assert [module.tile_rows(8 * tokens, 256) for tokens in (1, 32, 80, 128, 400, 2048)] == [8, 8, 8, 16, 32, 32]
    assert module.tile_rows(8, 1) == 8
    few, many = (route(mx.zeros((count,), mx.uint32), EXPERTS) for count in (4, 500))
    assert not module.geometry_of(few, 2048, FORMATS["4 bits"]).many
    assert module.geometry_of(many, 2048, FORMATS["4 bits"]).many


@pytest.mark.parametrize(
    ("taken", "k", "width", "dtype", "packing"),
    [
        (True, 704, 2816, mx.bfloat16, Packing("affine", 4, 64)),
        (True, 2880, 2880, mx.bfloat16, Packing("mxfp4", 4, 32)),
        (True, 96, 8, mx.float16, Packing("dense")),
        (False, 704, 2816, mx.bfloat16, Packing("affine", 4, 128)),
        (False, 704, 2816, mx.bfloat16, Packing("affine", 6, 64)),
        (False, 704, 2812, mx.bfloat16, Packing("affine", 4, 64)),
        (False, 704, 2816, mx.float32, Packing("affine", 4, 64)),
        (False, 2880, 2880, mx.float16, Packing("mxfp4", 4, 32)),
        (False, 72, 8, mx.bfloat16, Packing("dense")),
    ],
)
def test_only_shapes_that_kernels_cover_are_taken(
    taken: bool, k: int, width: int, dtype: mx.Dtype, packing: Packing
) -> None:
    assert module.takes(k, width, dtype, packing) is taken


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("geometry", [
    Geometry(False, 1, 1, 2, 2), Geometry(False, 1, 2, 1, 4, 4), Geometry(False, 2, 1, 4, 1),
    Geometry(True, 2, 1, 4), Geometry(True, 4, 2, 2, depth=4), Geometry(True, 8, 2, 4),
], ids=str)  # fmt: skip
def test_products_are_right_in_every_format_however_they_are_cut(name: str, geometry: Geometry) -> None:
    packing = FORMATS[name]
    tokens, per_token = 37, 3
    k = {128: 384, 64: 320, 32: 224, 0: 224}[packing.group_size]
    x, indices = normal(tokens, k, dtype=mx.bfloat16), some_indices(tokens, per_token)
    routes = route(indices, EXPERTS, rows=geometry.rows)
    gate, exact_gate, _ = weights(packing, WIDTH, k, mx.bfloat16, 1)
    up, exact_up, none = weights(packing, WIDTH, k, mx.bfloat16, 2)
    experts = indices.flatten()
    rows = mx.repeat(x, per_token, axis=0)
    expected = activated(product(rows, exact_gate, none, experts), product(rows, exact_up, none, experts), "silu")
    found = gate_up(x, routes, gate, up, packing, Activation("silu"), geometry)
    assert error(found, expected) < LIMIT[mx.bfloat16]
    rows = normal(indices.size, k, dtype=mx.bfloat16, seed=9)
    last, exact, none = weights(packing, OUT, k, mx.bfloat16, 3)
    expected = product(rows, exact, none, experts)
    assert error(down(rows, routes, last, packing, geometry), expected) < LIMIT[mx.bfloat16]
