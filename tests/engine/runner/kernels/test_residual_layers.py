"""Sums with their norms in one launch, and mlx-lm's layers that go by it, on this machine by ``cuda_on_host``."""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from engine.runner.kernels import add_normed, expert_layers, residual_layers, routed_experts, routing
from engine.runner.kernels.add_normed import Beside, ExpertRows
from engine.runner.kernels.residual_layers import ResidualLayers
from engine.runner.kernels.routed_modules import RoutedExperts
from engine.runner.kernels.swapped_modules import SwappedModules
from tests.engine.runner.kernels.cuda_on_host import HostKernel, kernels_on_host
from tests.engine.runner.kernels.test_routed_modules import alike, build, classes, in_float32, steps

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
EPS = 1e-5
PROMPT = [list(range(3, 50)), [7], [11], [5, 6, 8]]


@pytest.fixture(autouse=True)
def host_kernels(monkeypatch: pytest.MonkeyPatch, kernel_folder: Path) -> dict[str, HostKernel]:
    return kernels_on_host(monkeypatch, kernel_folder, routed_experts, routing, add_normed)


def rows(seed: int, *shape: int, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def norm(x: mx.array, gain: mx.array) -> mx.array:
    return mx.fast.rms_norm(x, gain, EPS)


def same(found: mx.array, wanted: mx.array) -> bool:
    return found.dtype == wanted.dtype and bool(
        mx.allclose(found.astype(mx.float32), wanted.reshape(found.shape).astype(mx.float32), rtol=1e-2, atol=1e-2)
    )


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("width", [72, 2816, 8200])
@pytest.mark.parametrize("norms", [0, 1, 3])
def test_rows_are_added_and_normalized_by_every_gain(dtype: mx.Dtype, width: int, norms: int) -> None:
    added, residual = rows(1, 3, 1, width, dtype=dtype), rows(2, 3, 1, width, dtype=dtype)
    gains = [rows(3 + i, width, dtype=dtype) for i in range(norms)]
    total, normed = add_normed.add_normed(added, residual, gains, EPS)
    assert total.shape == residual.shape
    assert mx.array_equal(total, added + residual)
    assert len(normed) == norms
    assert all(same(one, norm(added + residual, gain)) for one, gain in zip(normed, gains, strict=True))


def test_a_norm_comes_before_the_sum_and_a_scale_behind_it() -> None:
    added, residual, before, gain = rows(1, 5, 128), rows(2, 5, 128), rows(3, 128), rows(4, 128)
    scale = mx.full((8,), 0.37, mx.bfloat16)
    total, (normed,) = add_normed.add_normed(added, residual, [gain], EPS, before=before, scale=scale)
    wanted = (residual + norm(added, before)) * scale[0]
    assert same(total, wanted)
    assert same(normed, norm(wanted, gain))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("width", [72, 8200])
def test_experts_rows_are_summed_by_their_scores_first(shared: bool, width: int) -> None:
    residual, gain = rows(1, 4, 1, width), rows(2, width)
    experts, scores = rows(3, 12, width), mx.random.uniform(0, 1, (4, 3), key=mx.random.key(4))
    more, gate = rows(5, 4, 1, width), rows(6, 4, 1, 1)
    made = ExpertRows(experts, scores, more, gate) if shared else ExpertRows(experts, scores)
    total, (normed,) = add_normed.add_normed(made, residual, [gain], EPS)
    summed = (experts.astype(mx.float32).reshape(4, 3, width) * scores[..., None]).sum(1, keepdims=True)
    summed = summed + mx.sigmoid(gate.astype(mx.float32)) * more.astype(mx.float32) if shared else summed
    wanted = residual + summed.astype(mx.bfloat16)
    assert same(total, wanted)
    assert same(normed, norm(wanted, gain))


def test_an_mlp_beside_the_experts_is_normalized_apart() -> None:
    residual, gain, own, other, before = rows(1, 2, 256), *(rows(seed, 256) for seed in (2, 3, 4, 5))
    experts, scores = rows(6, 4, 256), mx.random.uniform(0, 1, (2, 2), key=mx.random.key(7))
    dense = rows(8, 2, 256)
    total, (normed,) = add_normed.add_normed(
        ExpertRows(experts, scores), residual, [gain], EPS, beside=Beside(dense, other, own), before=before
    )
    summed = (experts.astype(mx.float32).reshape(2, 2, 256) * scores[..., None]).sum(1).astype(mx.bfloat16)
    wanted = residual + norm(norm(summed, own) + norm(dense, other), before)
    assert same(total, wanted)
    assert same(normed, norm(wanted, gain))


def test_rows_that_vectors_do_not_divide_are_not_taken() -> None:
    assert add_normed.takes(2816, mx.bfloat16)
    assert not add_normed.takes(100, mx.bfloat16)
    assert not add_normed.takes(128, mx.float32)
    assert not add_normed.takes(1 << 20, mx.bfloat16)


def swapped(model: Any) -> tuple[RoutedExperts, ResidualLayers]:
    experts = RoutedExperts(model, "cuda")
    experts.choose()
    experts.install()
    layers = ResidualLayers(model, "cuda")
    layers.choose()
    layers.install()
    return experts, layers


LAUNCHES = {"qwen3_moe": 5, "qwen3_next": 5, "gemma4_text": 5, "gpt_oss": 5}
"""Of a layer with experts: between attention and MLP, experts chosen, gate and up, down, behind them."""


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_models_tokens_are_as_before_and_its_layers_are_left_as_they_were(
    name: str, host_kernels: dict[str, HostKernel]
) -> None:
    model = build(name)
    usual, exact, were = steps(model, PROMPT), in_float32(name, PROMPT), classes(model)
    experts, layers = swapped(model)
    assert layers.note == "sums with their norms: one launch in 2 of 2 layers"
    before = {kernel: host_kernels[kernel].launches for kernel in host_kernels}
    assert alike(steps(model, PROMPT), usual, exact)
    grown = {kernel: host_kernels[kernel].launches - before.get(kernel, 0) for kernel in host_kernels}
    assert sum(grown.values()) == 4 * 2 * LAUNCHES[name]
    layers.remove()
    experts.remove()
    assert classes(model) == were
    assert all(mx.array_equal(*both) for both in zip(steps(model, PROMPT), usual, strict=True))


@pytest.mark.parametrize("name", ["qwen3_moe", "gemma4_text"])
def test_a_layer_behind_another_does_not_normalize_its_rows_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    swapped(model)
    asked: list[int] = []
    kind = type(model.model.layers[0].input_layernorm)
    own = kind.__call__
    norms = {id(layer.input_layernorm): number for number, layer in enumerate(model.model.layers)}

    def counted(self: Any, x: mx.array) -> mx.array:
        asked.extend([norms[id(self)]] if id(self) in norms else [])
        return own(self, x)  # type: ignore[no-any-return]

    monkeypatch.setattr(kind, "__call__", counted)
    steps(model, PROMPT)
    assert asked == [0] * len(PROMPT)


def test_layers_without_experts_kernels_are_added_up_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen3_moe")
    usual, exact = steps(model, PROMPT), in_float32("qwen3_moe", PROMPT)
    layers = ResidualLayers(model, "cuda")
    layers.choose()
    layers.install()
    assert layers.note == "sums with their norms: one launch in 2 of 2 layers"
    assert alike(steps(model, PROMPT), usual, exact)


def test_gemmas_layers_whose_experts_no_kernel_computes_stay(host_kernels: dict[str, HostKernel]) -> None:
    model = build("gemma4_text")
    layers = ResidualLayers(model, "cuda")
    layers.choose()
    layers.install()
    assert layers.note == "sums with their norms: one launch in 0 of 2 layers: experts that no kernel computes"
    assert not host_kernels


def test_layers_are_left_alone_where_the_kernel_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen3_moe")
    were = classes(model)
    right = add_normed.add_normed

    def wrong(*given: Any, **more: Any) -> tuple[mx.array, list[mx.array]]:
        total, normed = right(*given, **more)
        return total, [one * 1.1 for one in normed]

    monkeypatch.setattr(residual_layers, "add_normed", wrong)
    layers = ResidualLayers(model, "cuda")
    layers.choose()
    layers.install()
    assert layers.note == ("sums with their norms: one launch in 0 of 2 layers: sum or norm 1 differs with 1 tokens")
    assert classes(model) == were


def test_nothing_is_swapped_off_cuda_or_in_float32() -> None:
    model = build("qwen3_moe")
    assert ResidualLayers(model, "cpu").note is None
    model.set_dtype(mx.float32)
    layers = ResidualLayers(model, "cuda")
    layers.choose()
    assert layers.note is not None
    assert "0 of 2 layers" in layers.note


@pytest.mark.parametrize(
    ("name", "part"),
    [("qwen3_moe", "self_attn"), ("gemma4_text", "self_attn"), ("gemma4_text", "mlp"), ("qwen3_next", "shared_expert")],
)
def test_rows_of_another_type_are_added_as_mlx_lm_adds_them(
    name: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one module's scales are of another type than the norms, its result is of a wider one."""
    monkeypatch.setattr(expert_layers, "_SHARED", ())  # a shared expert stays beside the others
    model = build(name)
    widened = SwappedModules()

    def wide(kind: Any) -> Any:
        def call(self: Any, *given: Any, **more: Any) -> Any:
            result = kind.__call__(self, *given, **more)
            whole = result if isinstance(result, tuple) else (result,)
            return (whole[0].astype(mx.float32), *whole[1:]) if isinstance(result, tuple) else result.astype(mx.float32)

        return call

    for layer in model.model.layers:
        module = layer.mlp.shared_expert if part == "shared_expert" else layer[part]
        widened.swap_method(module, "__call__", wide(type(module)))
    usual = steps(model, PROMPT)
    swapped(model)
    found = steps(model, PROMPT)
    assert all(mx.isfinite(one).all().item() for one in found)
    assert alike(found, usual, in_float32(name, PROMPT))


def test_a_layers_scale_is_more_than_one_element_in_memory() -> None:
    model = build("gemma4_text")
    model.set_dtype(mx.float16)
    parts = residual_layers.residual_layer(model.model.layers[0], None)
    assert parts.gemma is not None
    assert parts.gemma.scale is not None
    assert memoryview(parts.gemma.scale).strides == (2,)  # type: ignore[arg-type]


def test_a_router_of_another_type_in_one_layer_leaves_that_layers_experts_to_mlx_lm() -> None:
    model = build("gemma4_text")
    model.model.layers[1].router.proj.set_dtype(mx.float32)
    usual = steps(model, PROMPT)
    _, layers = swapped(model)
    assert layers.note == "sums with their norms: one launch in 2 of 2 layers"
    assert alike(steps(model, PROMPT), usual, in_float32("gemma4_text", PROMPT))


def test_what_is_checked_is_what_steps_launch(
    host_kernels: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("qwen3_next")
    templates: set[tuple[str, object]] = set()
    inner = HostKernel.__call__

    def noted(self: HostKernel, **launch: Any) -> list[mx.array]:
        templates.add((self._name, tuple(launch["template"])))
        return inner(self, **launch)

    monkeypatch.setattr(HostKernel, "__call__", noted)
    swapped(model)
    checked = {one for one in templates if one[0].startswith("add_normed")}
    templates.clear()
    steps(model, PROMPT)
    assert {one for one in templates if one[0].startswith("add_normed")} <= checked


def test_a_layer_that_stands_twice_hands_nothing_on() -> None:
    """What it would leave is normalized for one of its places alone."""
    model = build("qwen3_moe")
    model.model.layers[1] = model.model.layers[0]
    usual = steps(model, PROMPT)
    swapped(model)
    found = steps(model, PROMPT)
    assert all(
        float(mx.linalg.norm(one - other) / mx.linalg.norm(other)) < 0.05
        for one, other in zip(found, usual, strict=True)
    )
