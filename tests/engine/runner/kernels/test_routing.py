"""The CUDA texts of a choice of experts and of the sum of their rows, on this machine by ``cuda_on_host``."""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from engine.runner.kernels import routed_experts, routing
from engine.runner.kernels.routed_blocks import launched_tokens
from engine.runner.kernels.routing import choose, weighted_sum
from tests.engine.runner.kernels.cuda_on_host import HostKernel, kernels_on_host

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture(autouse=True)
def host_kernels(monkeypatch: pytest.MonkeyPatch, kernel_folder: Path) -> dict[str, HostKernel]:
    return kernels_on_host(monkeypatch, kernel_folder, routing, routed_experts)


def some_logits(tokens: int, experts: int, dtype: mx.Dtype) -> mx.array:
    return (3 * mx.random.normal((tokens, experts), key=mx.random.key(tokens))).astype(dtype)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "chosen"), [(1, 256, 8), (5, 40, 3), (37, 20, 4), (150, 6, 2)])
def test_the_largest_logits_are_chosen_and_their_softmax_weighs(
    tokens: int, experts: int, chosen: int, normalized: bool, dtype: mx.Dtype
) -> None:
    logits = some_logits(tokens, experts, dtype)
    scale = mx.random.uniform(0.5, 2, (experts,)).astype(dtype) if normalized else None
    routes, scores = choose(logits, chosen, normalized=normalized, scale=scale)
    exact = np.array(logits.astype(mx.float32))
    indices = np.array(routes.indices).reshape(tokens, chosen)
    expected = -np.sort(-exact, axis=1)[:, :chosen]
    assert np.array_equal(np.take_along_axis(exact, indices, 1), expected)
    assert all(len(set(row)) == chosen for row in indices.tolist())
    over = expected if normalized else exact
    weights = np.exp(expected - expected[:, :1]) / np.exp(over - expected[:, :1]).sum(1, keepdims=True)
    weights *= 1 if scale is None else np.array(scale.astype(mx.float32))[indices]
    assert np.allclose(np.array(scores), weights, rtol=1e-5)


@pytest.mark.parametrize(("tokens", "launches"), [(2, 1), (60, 1), (140, 2)])
def test_tiles_hold_every_pair_once_under_its_expert(
    tokens: int, launches: int, host_kernels: dict[str, HostKernel]
) -> None:
    experts, chosen = 40, 5
    routes, _ = choose(some_logits(tokens, experts, mx.bfloat16), chosen, normalized=True)
    assert sum(kernel.launches for kernel in host_kernels.values()) == launches
    if routes.tiles is None or routes.order is None:
        assert tokens * chosen <= 64
        return
    indices, order = np.array(routes.indices), np.array(routes.order)
    seen = []
    for (expert, rows), pairs in zip(np.array(routes.tiles).tolist(), order.tolist(), strict=True):
        assert {indices[pair] for pair in pairs[:rows]} <= {expert}
        assert not rows or set(pairs[rows:]) <= {pairs[rows - 1]}
        seen += pairs[:rows]
    assert sorted(seen) == list(range(tokens * chosen))


def test_equal_logits_give_the_first_experts() -> None:
    routes, scores = choose(mx.zeros((1, 9), mx.bfloat16), 3, normalized=True)
    assert routes.indices.tolist() == [0, 1, 2]
    assert np.allclose(np.array(scores), 1 / 3)


@pytest.mark.parametrize(("tokens", "experts"), [(1, 40), (7, 40), (19, 6), (60, 6), (140, 40)])
def test_a_shared_expert_is_every_tokens_last_by_the_sigmoid_of_its_gate(tokens: int, experts: int) -> None:
    chosen = 4
    logits, gate = some_logits(tokens, experts, mx.bfloat16), some_logits(tokens, 1, mx.bfloat16)
    routes, scores = choose(logits, chosen, normalized=True, gate=gate)
    usual = choose(logits, chosen, normalized=True)
    indices = np.array(routes.indices).reshape(tokens, chosen + 1)
    assert (indices[:, -1] == experts).all()
    assert np.array_equal(indices[:, :-1], np.array(usual.routes.indices).reshape(tokens, chosen))
    assert np.array_equal(np.array(scores)[:, :-1], np.array(usual.scores))
    assert np.allclose(np.array(scores)[:, -1:], np.array(mx.sigmoid(gate.astype(mx.float32))), rtol=1e-5)
    if routes.tiles is not None and routes.order is not None:
        pairs = zip(np.array(routes.tiles).tolist(), np.array(routes.order).tolist(), strict=True)
        seen = [(pair, expert) for (expert, rows), order in pairs for pair in order[:rows]]
        assert sorted(seen) == list(enumerate(indices.reshape(-1).tolist()))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("tokens", [1, 19])
def test_rows_are_summed_by_their_scores_with_a_shared_experts_part(tokens: int, shared: bool) -> None:
    chosen, width = 3, 72
    rows = mx.random.normal((tokens * chosen, width)).astype(mx.bfloat16)
    scores = mx.random.uniform(0, 1, (tokens, chosen))
    more, gate = (mx.random.normal((tokens, wide)).astype(mx.bfloat16) for wide in (width, 1))
    found = weighted_sum(rows, scores, *((more, gate) if shared else ()))
    expected = (rows.astype(mx.float32).reshape(tokens, chosen, width) * scores[..., None]).sum(1)
    if shared:
        expected = expected + mx.sigmoid(gate.astype(mx.float32)) * more.astype(mx.float32)
    assert found.dtype == mx.bfloat16
    assert mx.allclose(found.astype(mx.float32), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("experts", "chosen"), [(256, 8), (128, 4), (64, 8), (60, 4), (32, 4), (8, 2), (6, 6)])
def test_what_is_compiled_at_load_is_all_that_any_number_of_tokens_launches(
    experts: int, chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: set[tuple[str, tuple[tuple[str, object], ...]]] = set()

    class Collected:
        def __init__(self, name: str) -> None:
            self._name = name

        def __call__(
            self, *, template: list[tuple[str, object]], output_shapes: list[tuple[int, ...]],
            output_dtypes: list[mx.Dtype], **_launch: object,
        ) -> list[mx.array]:  # fmt: skip
            launched.add((self._name, tuple(template)))
            return [mx.zeros(*both) for both in zip(output_shapes, output_dtypes, strict=True)]

    monkeypatch.setattr(routing, "make_kernel", lambda name, *_text: Collected(name))
    monkeypatch.setattr(routed_experts, "make_kernel", lambda name, *_text: Collected(f"checked {name}"))

    def names(numbers: list[int]) -> set[tuple[str, tuple[tuple[str, object], ...]]]:
        launched.clear()
        for tokens in numbers:
            choose(mx.zeros((tokens, experts), mx.bfloat16), chosen, normalized=True)
        return {one for one in launched if not one[0].startswith("checked")}

    at_load = launched_tokens(experts, chosen)
    assert len(at_load) < 8
    assert names(at_load) == names(list(range(1, 400)))
