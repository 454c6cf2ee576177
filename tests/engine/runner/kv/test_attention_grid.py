"""Chunks' attention in few shapes, and nothing else changed by it."""

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.runner.kv import attention_grid
from engine.runner.kv.attention_grid import GRID, chunk_grid, fits_grid, is_planned, on_grid

HEADS, KV_HEADS, DIM = 4, 2, 16


class Attention:
    """MLX's, with the shapes that it was asked for."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []

    def __call__(self, queries: mx.array, keys: mx.array, values: mx.array, mask: Any) -> mx.array:
        self.shapes.append((queries.shape[2], keys.shape[2]))
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.25, mask=mask)


def rows(heads: int, length: int, seed: int) -> mx.array:
    return mx.random.normal((1, heads, length, DIM), key=mx.random.key(seed))


def chunk(num_rows: int, length: int) -> tuple[mx.array, mx.array, mx.array]:
    return rows(HEADS, num_rows, 1), rows(KV_HEADS, length, 2), rows(KV_HEADS, length, 3)


def seen(num_rows: int, length: int, window: int) -> mx.array:
    position, key = np.arange(length - num_rows, length)[:, None], np.arange(length)[None]
    return mx.array((key <= position) & (key > position - window))


@pytest.mark.parametrize("size", [(2, 2), (3, 700), (37, 512), (300, 300), (512, 1024), (500, 1030), (513, 515)])
@pytest.mark.parametrize("kind", ["causal", "window", "added"])
def test_padded_attention_is_the_same(size: tuple[int, int], kind: str) -> None:
    queries, keys, values = chunk(*size)
    mask: mx.array | str = "causal" if kind == "causal" else seen(*size, window=40)[None, None]
    if kind == "added":
        mask = mx.where(mask, 0.0, -mx.inf)
    attention = Attention()
    assert fits_grid(queries, keys, mask)
    found = on_grid(attention, queries, keys, values, mask=mask)
    expected = attention(queries, keys, values, mask)
    assert found.shape == expected.shape
    assert mx.allclose(found, expected, atol=1e-5)
    assert not any(length % GRID for length in attention.shapes[0])
    if kind == "causal":
        assert attention.shapes[0][0] <= attention.shapes[0][1], "cuDNN refuses more rows than keys"
    else:
        assert attention.shapes[0] == tuple(-(-number // GRID) * GRID for number in size), "no more than is needed"


def test_prompts_of_all_lengths_share_a_few_shapes() -> None:
    attention = Attention()
    for length in range(2, 2 * GRID + 1, 33):
        on_grid(attention, *chunk(length, length), mask="causal")
    assert set(attention.shapes) == {(GRID, GRID), (2 * GRID, 2 * GRID)}


def test_what_lies_on_the_grid_is_not_copied() -> None:
    queries, keys, values = chunk(GRID, 2 * GRID)
    given: list[mx.array] = []
    on_grid(lambda *arrays, **_: given.extend(arrays) or arrays[0], queries, keys, values, mask="causal")
    assert all(one is other for one, other in zip(given, (queries, keys, values), strict=True))


@pytest.mark.parametrize("mask", [None, mx.zeros((1, 8)), mx.zeros((3, 9))])
def test_masks_that_do_not_say_which_positions_the_rows_have_are_left_alone(mask: mx.array | None) -> None:
    queries, keys, _ = chunk(3, 8)
    assert not fits_grid(queries, keys, mask)


@pytest.mark.parametrize(
    ("gpu", "dtype", "num_rows", "dim", "planned"),
    [
        ("sm_90a", mx.bfloat16, 5, 128, True),
        ("sm_80", mx.float16, 2, 64, True),
        ("sm_75", mx.float16, 2, 64, False),
        ("", mx.float16, 2, 64, False),
        ("sm_90", mx.float32, 5, 128, False),
        ("sm_90", mx.bfloat16, 1, 128, False),
        ("sm_90", mx.bfloat16, 5, 256, False),
        ("sm_90", mx.bfloat16, 5, 100, False),
    ],
)
def test_plans_are_made_on_cuda_for_what_cudnn_covers(
    on_cuda: Callable[[str], None], gpu: str, dtype: mx.Dtype, num_rows: int, dim: int, planned: bool
) -> None:
    queries, values = mx.zeros((1, 2, num_rows, dim), dtype), mx.zeros((1, 2, 9, dim), dtype)
    assert not is_planned(queries, values)
    on_cuda(gpu)
    assert is_planned(queries, values) is planned


def test_chunks_end_anywhere_but_where_plans_are_made(on_cuda: Callable[[str], None]) -> None:
    on_cuda("sm_90")
    assert [chunk_grid(kind) for kind in ("cpu", "metal", "cuda")] == [1, 1, GRID]
    on_cuda("sm_70")
    assert chunk_grid("cuda") == 1


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    def pretend(architecture: str) -> None:
        monkeypatch.setattr(attention_grid.mx.cuda, "is_available", lambda: True)
        monkeypatch.setattr(attention_grid.mx, "device_info", lambda: {"architecture": architecture})
        attention_grid._has_plans.cache_clear()

    attention_grid._has_plans.cache_clear()
    yield pretend
    attention_grid._has_plans.cache_clear()
