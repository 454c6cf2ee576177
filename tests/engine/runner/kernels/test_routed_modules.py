"""Kernels of routed experts in mlx-lm's models, run on this machine by ``cuda_on_host``: swapped, checked, undone."""

import gc
import importlib
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU

from engine.runner.kernels import expert_layers, routed_blocks, routed_experts, routing
from engine.runner.kernels.expert_layers import expert_layer
from engine.runner.kernels.routed_modules import RoutedExperts
from engine.runner.kernels.swapped_modules import SwappedModules
from engine.runner.model_work import model_work
from tests.engine.runner.kernels.cuda_on_host import HostKernel, kernels_on_host

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
_BASE = {
    "hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 2, "head_dim": 64,
    "num_key_value_heads": 1, "vocab_size": 320, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
_AFFINE = {"bits": 4, "group_size": 64}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen3_moe": ({**_BASE, **_EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": []}, _AFFINE),
    "qwen3_next": ({
        **_BASE, **_EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": [], "shared_expert_intermediate_size": 64,
        "linear_num_value_heads": 2, "linear_num_key_heads": 1, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4, "partial_rotary_factor": 0.25, "full_attention_interval": 2,
    }, {"bits": 8, "group_size": 64}),
    "gemma4_text": ({
        **_BASE, "global_head_dim": 64, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 320, "sliding_window": 64, "sliding_window_pattern": 2,
        "enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 64,
    }, _AFFINE),
    "gpt_oss": ({
        **_BASE, "num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 64, "sliding_window": 32,
    }, {"bits": 4, "group_size": 32, "mode": "mxfp4"}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def host_kernels(monkeypatch: pytest.MonkeyPatch, kernel_folder: Path) -> dict[str, HostKernel]:
    return kernels_on_host(monkeypatch, kernel_folder, routed_experts, routing)


def build(name: str) -> Any:
    """A packed bfloat16 model with seeded weights."""
    config, packing = MODELS[name]
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(7)
    model = module.Model(module.ModelArgs.from_dict({"model_type": name, **config}))
    for one in model.modules():
        if isinstance(one, nn.Module) and isinstance(one.get("bias"), mx.array):
            one.bias = 0.3 * mx.random.normal(one.bias.shape)
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, **packing)
    mx.eval(model.parameters())
    return model


def classes(model: nn.Module) -> list[type[nn.Module]]:
    return [type(module) for _, module in sorted(model.named_modules())]


def steps(model: Any, tokens: list[list[int]]) -> list[mx.array]:
    """The last logits after each of the ``tokens`` that follow each other."""
    cache = make_prompt_cache(model)
    found = [model(mx.array([some]), cache=cache)[0, -1].astype(mx.float32) for some in tokens]
    mx.eval(found)
    return found


def apart(found: mx.array, exact: mx.array) -> float:
    return float(mx.linalg.norm(found - exact) / mx.linalg.norm(exact))


def alike(found: list[mx.array], usual: list[mx.array], exact: list[mx.array]) -> bool:
    """As near to float32 as mlx-lm's own are, and the same token first unless two are as good."""
    return all(
        apart(one, right) < 1.5 * apart(other, right) + 1e-3
        and other[mx.argmax(one)].item() > mx.max(other).item() - 4 * mx.max(mx.abs(other - right)).item()
        for one, other, right in zip(found, usual, exact, strict=True)
    )


def in_float32(name: str, tokens: list[list[int]]) -> list[mx.array]:
    model = build(name)
    model.set_dtype(mx.float32)
    return steps(model, tokens)


@pytest.mark.parametrize("name", MODELS)
def test_a_models_tokens_are_as_before_and_it_is_left_as_it_was(name: str, host_kernels: dict[str, HostKernel]) -> None:
    model = build(name)
    prompt = [list(range(3, 50)), [7], [11], [5, 6, 8]]
    usual, exact, were = steps(model, prompt), in_float32(name, prompt), classes(model)
    work = model_work(model, 320)
    experts = RoutedExperts(model, "cuda")
    experts.choose()
    experts.install()
    assert experts.note == "experts: own kernels for 2 of 2 layers, with their routing for 2"
    assert model_work(model, 320) == work
    before = {kernel: host_kernels[kernel].launches for kernel in host_kernels}
    assert alike(steps(model, prompt), usual, exact)
    grown = {kernel: host_kernels[kernel].launches - before.get(kernel, 0) for kernel in host_kernels}
    # A layer: experts chosen and listed, gate and up, down, the sum; four steps of two layers.
    assert sum(grown.values()) == 4 * 4 * 2
    experts.remove()
    assert classes(model) == were
    assert all(mx.array_equal(*both) for both in zip(steps(model, prompt), usual, strict=True))


def test_experts_of_unknown_blocks_are_swapped_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routed_blocks, "_BLOCKS", {})
    model = build("qwen3_moe")
    tokens = [[1, 2, 3], [4]]
    usual = steps(model, tokens)
    experts = RoutedExperts(model, "cuda")
    experts.choose()
    experts.install()
    assert experts.note == "experts: own kernels for 2 of 2 layers"
    assert alike(steps(model, tokens), usual, in_float32("qwen3_moe", tokens))


def test_experts_in_a_form_that_no_kernel_covers_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "qwen3_moe", (MODELS["qwen3_moe"][0], {"bits": 5, "group_size": 64}))
    model = build("qwen3_moe")
    were, experts = classes(model), RoutedExperts(model, "cuda")
    experts.choose()
    experts.install()
    assert experts.note == "experts: own kernels for 0 of 2 layers; 2 in a form that no kernel covers"
    assert classes(model) == were
    assert RoutedExperts(model, "metal").note is None


def test_kernels_that_are_wrong_are_not_used_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen3_moe")
    were = classes(model)
    right = routed_experts.down
    monkeypatch.setattr(routed_experts, "down", lambda *args: right(*args) * 1.05)
    experts = RoutedExperts(model, "cuda")
    experts.choose()
    experts.install()
    assert classes(model) == were
    assert str(experts.note).startswith("experts: own kernels for 0 of 2 layers; 4-bit experts 6 x 128 x 64: results")


def test_kernels_that_do_not_compile_cost_nothing_but_their_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> mx.array:
        raise RuntimeError("no\nsuch kernel")

    monkeypatch.setattr(routed_experts, "make_kernel", fails)
    experts = RoutedExperts(build("qwen3_moe"), "cuda")
    experts.choose()
    assert "no such kernel" in str(experts.note)


def test_a_block_that_weighs_otherwise_keeps_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    known = routed_blocks._BLOCKS["qwen3_moe.Qwen3MoeSparseMoeBlock"]
    name = "qwen3_moe.Qwen3MoeSparseMoeBlock"
    other = routed_blocks.Block(known.router, known.experts, known.chosen, False)
    monkeypatch.setitem(routed_blocks._BLOCKS, name, other)
    experts = RoutedExperts(build("qwen3_moe"), "cuda")
    experts.choose()
    said = "experts: own kernels for 2 of 2 layers; routing: Qwen3MoeSparseMoeBlock gives other sums with 1 tokens"
    assert experts.note == said


@pytest.mark.parametrize("device", ["cpu", "metal"])
def test_other_devices_and_models_without_experts_are_left_alone(device: Any) -> None:
    assert RoutedExperts(build("qwen3_moe"), device).note is None
    assert RoutedExperts(nn.Linear(8, 8), "cuda").note is None


def test_rows_of_another_type_go_mlx_lms_way() -> None:
    glu = SwitchGLU(64, 64, 4)
    glu.set_dtype(mx.bfloat16)
    nn.quantize(glu, bits=4, group_size=64)
    experts = RoutedExperts(glu, "cuda")
    experts.choose()
    experts.install()
    x, indices = mx.random.normal((3, 64)), mx.array([[0, 1], [2, 3], [1, 2]], mx.uint32)
    found = glu(x, indices)
    experts.remove()
    assert found.dtype == mx.float32
    assert mx.array_equal(found, glu(x, indices))


@pytest.mark.parametrize(
    ("reason", "changed"),
    [
        ("3 bits", lambda glu: setattr(glu.up_proj, "bits", 3)),
        ("gate unlike up", lambda glu: setattr(glu.up_proj, "group_size", 32)),
        ("another activation", lambda glu: setattr(glu, "activation", nn.GELU())),
        ("a scale of all", lambda glu: setattr(glu.up_proj, "global_scale", mx.ones(4))),
    ],
)
def test_layers_that_kernels_do_not_cover_are_not_taken(reason: str, changed: Any) -> None:
    glu = SwitchGLU(128, 64, 4)
    glu.set_dtype(mx.bfloat16)
    nn.quantize(glu, bits=4, group_size=64)
    assert isinstance(glu.up_proj, QuantizedSwitchLinear)
    assert expert_layer(glu) is not None
    changed(glu)
    assert expert_layer(glu) is None, reason


def test_scales_beyond_what_is_unpacked_are_noticed_in_any_layer() -> None:
    model = build("gpt_oss")
    model.layers[1].mlp.experts.down_proj.scales[-1, -1, -1] = 129
    experts = RoutedExperts(model, "cuda")
    experts.choose()
    assert str(experts.note).endswith(
        "0 of 2 layers; mxfp4 experts 6 x 128 x 64: scales are beyond what kernels unpack"
    )


def moved(model: Any) -> list[mx.array]:
    """Copies of the shared experts' weights, as they were loaded."""
    return [mx.array(one["weight"]) for layer in model.model.layers for one in shared_projections(layer)]


def shared_projections(layer: Any) -> list[Any]:
    return [layer.mlp.shared_expert[name] for name in ("gate_proj", "up_proj", "down_proj")]


def test_a_shared_expert_like_the_others_is_one_of_them(host_kernels: dict[str, HostKernel]) -> None:
    model = build("qwen3_next")
    before = moved(model)
    mx.synchronize()
    gc.collect()
    mx.clear_cache()
    taken = mx.get_active_memory()
    experts = RoutedExperts(model, "cuda")
    experts.choose()
    experts.install()
    gc.collect()
    mx.clear_cache()
    assert mx.get_active_memory() - taken < 100_000, "no second copy"
    assert all(mx.array_equal(*both) for both in zip(before, moved(model), strict=True))
    names = set(host_kernels)
    assert "choose_experts_gated" in names
    assert not [name for name in names if "shared" in name], "its rows are summed with the others"
    asked: list[int] = []
    swapped = SwappedModules()
    for layer in model.model.layers:
        swapped.swap_method(layer.mlp.shared_expert, "__call__", lambda _self, x: asked.append(1) or x)
    steps(model, [[3, 4, 5], [6]])
    assert not asked


@pytest.mark.parametrize("change", ["width", "bits", "kind"])
def test_a_shared_expert_of_another_form_stays_beside_the_others(
    change: str, monkeypatch: pytest.MonkeyPatch, host_kernels: dict[str, HostKernel]
) -> None:
    config, packing = MODELS["qwen3_next"]
    if change == "width":
        monkeypatch.setitem(MODELS, "qwen3_next", ({**config, "shared_expert_intermediate_size": 128}, packing))
    if change == "kind":
        monkeypatch.setattr(expert_layers, "_SHARED", ())
    model = build("qwen3_next")
    if change == "bits":
        for layer in model.model.layers:
            mlp = layer.mlp.shared_expert
            for name in ("gate_proj", "up_proj", "down_proj"):
                mlp[name] = nn.QuantizedLinear(128, 64, bias=False, bits=4) if name != "down_proj" else mlp[name]
            mlp.set_dtype(mx.bfloat16)
    usual = steps(model, [list(range(3, 20)), [7]])
    experts = RoutedExperts(model, "cuda")
    experts.choose()
    experts.install()
    assert "sum_experts_shared" in host_kernels
    assert "choose_experts_gated" not in host_kernels
    found = steps(model, [list(range(3, 20)), [7]])
    assert all(apart(one, other) < 0.05 for one, other in zip(found, usual, strict=True))


def test_scales_beyond_the_kernels_are_found_in_joined_experts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = MODELS["qwen3_next"]
    monkeypatch.setitem(MODELS, "qwen3_next", (config, {"bits": 4, "group_size": 32, "mode": "mxfp4"}))
    model = build("qwen3_next")
    scales = model.model.layers[1].mlp.shared_expert.up_proj["scales"]
    scales[3, 1] = 140
    experts = RoutedExperts(model, "cuda")
    experts.choose()
    assert experts.note is not None
    assert "scales are beyond what kernels unpack" in experts.note
    assert "with their routing" not in experts.note


def test_experts_stay_as_they_were_where_there_is_no_memory_to_join_them(
    monkeypatch: pytest.MonkeyPatch, host_kernels: dict[str, HostKernel]
) -> None:
    model = build("qwen3_next")
    usual = steps(model, [list(range(3, 20)), [7]])
    joined, calls = expert_layers._joined, iter(range(100))

    def joins(experts: Any, one: Any) -> dict[str, mx.array]:
        if next(calls) >= 2:
            raise RuntimeError("out of memory")
        return joined(experts, one)

    monkeypatch.setattr(expert_layers, "_joined", joins)
    experts = RoutedExperts(model, "cuda")
    experts.choose()
    experts.install()
    assert experts.note is not None
    assert experts.note.endswith("with their routing for 2; shared experts: RuntimeError: out of memory")
    tried = host_kernels["choose_experts_gated"].launches
    found = steps(model, [list(range(3, 20)), [7]])
    assert host_kernels["choose_experts_gated"].launches == tried
    assert all(apart(one, other) < 0.05 for one, other in zip(found, usual, strict=True))
