"""Gemma 4's attention in few launches, against mlx-lm: tokens, kernels on this machine's CPU, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from engine.runner.kernels import fused_rows, one_row, paged_attention
from engine.runner.kernels.joined_attention import HeadConstants
from engine.runner.kernels.self_check import GPU_KERNELS
from engine.runner.kv.gemma_attention import GemmaAttention
from engine.runner.kv.gemma_attentions import AttentionTrial, GemmaAttentions
from engine.runner.kv.layer_trial import distance
from tests.engine.parity.bare_engine import BLOCK_SIZE, BareEngine, greedy
from tests.engine.parity.oracle import mixed_prompts
from tests.engine.parity.tiny_architectures import VOCAB, build, config_of
from tests.engine.runner.kernels import text_on_host
from tests.engine.runner.kernels.cuda_on_host import HostKernel, kernels_on_host
from tests.engine.runner.kernels.host_kernels import HostKernels
from tests.nightly import size

NUM_TOKENS = 6
NAMES = ("gemma4_text dense", "gemma4_text k_eq_v", "gemma4_text moe")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def model_of(name: str = "gemma4_text k_eq_v", **changes: Any) -> Any:
    """With norms of heads that have gains."""
    model = build({**config_of(name), **changes})
    for number, layer in enumerate(model.layers):
        attention = layer.self_attn
        for key, norm in enumerate([attention.q_norm, attention.get("k_norm", attention.q_norm)]):
            norm.weight = 1 + 0.3 * mx.random.normal(norm.weight.shape, key=mx.random.key(2 * number + key))
    return model


def attentions_of(model: Any, kernels: Any = None, device: Any = "cpu", dtype: str = "auto") -> GemmaAttentions:
    attentions = GemmaAttentions(model, device, kernels or HostKernels(), BLOCK_SIZE, dtype)
    attentions.choose()
    return attentions


def all_of(model: Any) -> str:
    number = len(model.layers)
    return f"fused attention: {number} of {number} layers"


@pytest.mark.parametrize("name", NAMES)
def test_attention_in_few_launches_gives_mlx_lms_tokens(name: str) -> None:
    """Also behind a window, which is shorter than some prompts."""
    kernels, model = HostKernels(), model_of(name)
    prompts = mixed_prompts(5, VOCAB, 90, seed=1)
    expected = [greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
    engine = BareEngine(model, kernels=kernels)
    attentions = attentions_of(model, kernels)
    assert attentions.note == all_of(model)
    attentions.install()
    kernels.calls = dict.fromkeys(kernels.calls, 0)
    for chunk in (512, 512, 16):  # at once, from the prefix cache, in chunks
        engine.start(chunk=chunk)
        assert [one.output_token_ids for one in engine.generate(prompts, NUM_TOKENS)] == expected
    assert kernels.calls["joined_attention"] > 0 == kernels.calls["paged_attention"]
    attentions.remove()
    assert [one.output_token_ids for one in engine.start().generate(prompts, NUM_TOKENS)] == expected
    assert kernels.calls["paged_attention"] > 0
    engine.backend.close()


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "int4"])
def test_over_packed_pages_it_gives_the_reference_paths_tokens(kv_cache_dtype: str) -> None:
    kernels, model = HostKernels(), model_of(head_dim=32, global_head_dim=64)
    prompts = mixed_prompts(4, VOCAB, 60, seed=1)
    reference = BareEngine(model, kv_cache_dtype=kv_cache_dtype)
    expected = [one.output_token_ids for one in reference.generate(prompts, NUM_TOKENS)]
    reference.backend.close()
    engine = BareEngine(model, kernels=kernels, kv_cache_dtype=kv_cache_dtype)
    attentions = attentions_of(model, kernels, dtype=kv_cache_dtype)
    assert attentions.note == all_of(model)
    attentions.install()
    kernels.calls = dict.fromkeys(kernels.calls, 0)
    assert [one.output_token_ids for one in engine.start().generate(prompts, NUM_TOKENS)] == expected
    assert kernels.calls["joined_attention"] > 0 == kernels.calls["paged_attention"]
    engine.backend.close()


@pytest.fixture
def gpu_kernels(monkeypatch: pytest.MonkeyPatch, kernel_folder: Path) -> dict[str, HostKernel]:
    """CUDA's attention and products of few rows, compiled for this machine; gives the products by name."""

    def make(name: str, inputs: Any, outputs: Any, source: str, header: str = "") -> text_on_host.HostKernel:
        return text_on_host.HostKernel("cuda", name, inputs, outputs, source, header, kernel_folder)

    monkeypatch.setattr(paged_attention, "make_kernel", make)
    monkeypatch.setattr(paged_attention, "joins_in_launch", lambda: True)
    return kernels_on_host(monkeypatch, kernel_folder, fused_rows, one_row)


@needs_compiler
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("dtype", "bits", "on_tensor_cores"),
    [
        (mx.bfloat16, 0, True),
        (mx.float16, 4, False),
        *size([], [(mx.bfloat16, 0, False), (mx.float16, 4, True)]),
    ],
)
def test_cudas_kernels_give_what_mlx_lms_attention_gives(
    dtype: mx.Dtype, bits: int, on_tensor_cores: bool, gpu_kernels: dict[str, HostKernel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A layer with a window and one whose values are its keys, of heads as wide as Gemma's, eight to a key."""
    monkeypatch.setattr(paged_attention, "tensor_cores", lambda: on_tensor_cores)
    model = model_of(
        num_hidden_layers=3, hidden_size=128, intermediate_size=128, num_attention_heads=8, num_key_value_heads=4,
        head_dim=256, global_head_dim=512, num_global_key_value_heads=1,
    )  # fmt: skip
    model.set_dtype(dtype)
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    attentions = GemmaAttentions(model, "cuda", GPU_KERNELS, 16)
    attentions.choose()
    assert attentions.note == all_of(model)
    assert {name for name, kernel in gpu_kernels.items() if kernel.launches} == (
        {"one_row_plain", "fused_rows_quantized_plain"} if bits else {"fused_rows_dense_plain"}
    )


def test_mlx_lms_module_gives_the_same_output_and_no_keys() -> None:
    model, kernels = model_of(), HostKernels()
    attentions = attentions_of(model, kernels)
    layer = model.layers[0].self_attn
    trial = AttentionTrial(layer, kernels, BLOCK_SIZE)
    x, context = trial.inputs(5)
    wanted = layer.o_proj(trial.own(layer, x, context)[0])
    attentions.install()
    cache, _ = trial.begun(context)
    output, shared, offset = layer(x, None, cache)
    assert output.shape == x.shape
    assert distance(output, wanted) < 1e-5
    assert shared is None
    assert np.array_equal(offset, [context.offset] * 5)
    cache.finish()
    assert layer(x, None, None)[1] is not None, "without pages it is mlx-lm's own"


@pytest.mark.parametrize("bits", [0, 4])
def test_weights_are_slices_of_joined_ones_with_the_same_values(bits: int) -> None:
    model = model_of(hidden_size=128, intermediate_size=128)
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    before = [(name, np.array(value)) for name, value in tree_flatten(model.parameters())]
    used = mx.get_active_memory()
    attentions = attentions_of(model)
    assert attentions.note == all_of(model)
    mx.clear_cache()
    assert mx.get_active_memory() - used < 20_000, "a second copy of the weights"
    attentions.install()
    assert len(attentions.products) == (0 if bits else sum(3 - layer.self_attn.use_k_eq_v for layer in model.layers))
    for name, value in before:
        assert np.array_equal(dict(tree_flatten(model.parameters()))[name], value), name


def test_removing_leaves_the_models_classes_as_they_were() -> None:
    model = model_of()
    kinds = [type(layer) for _, layer in model.named_modules()]
    attentions = attentions_of(model)
    attentions.install()
    assert [type(layer) for _, layer in model.named_modules()] != kinds
    attentions.remove()
    attentions.remove()
    assert [type(layer) for _, layer in model.named_modules()] == kinds


def test_a_model_whose_layers_share_keys_is_left_alone() -> None:
    assert attentions_of(model_of("gemma4_text")).note is None
    assert attentions_of(build(config_of("qwen3"))).note is None
    assert GemmaAttentions(model_of(), "cpu", None, BLOCK_SIZE).note is None


def test_what_the_kernels_do_not_cover_stays_mlx_lms() -> None:
    assert "a rotation of its own (RoPE of 16)" in str(attentions_of(model_of(rope_traditional=True)).note)
    model = model_of(hidden_size=128, intermediate_size=128)
    for layer in model.layers:
        layer.self_attn.k_proj = layer.self_attn.k_proj.to_quantized(group_size=64, bits=8)
    assert "0 of" in str(attentions_of(model).note)
    assert "packed in several ways" in str(attentions_of(model).note)
    model = model_of()
    model.layers[0].self_attn.q_norm.set_dtype(mx.float16)
    model.layers[1].self_attn.v_norm.eps = 1e-3
    note = str(attentions_of(model).note)
    number = len(model.layers)
    assert note.startswith(f"fused attention: {number - 2} of {number} layers; attention is mlx-lm's own: ")
    assert "weights of several element types" in note


@pytest.mark.parametrize(("right", "wrong"), [("normalized", "given"), ("normalized keys", "normalized")])
def test_attention_that_computes_wrongly_is_not_installed(
    right: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the kernel is right: constants that say something else of value heads."""
    own = HeadConstants.of.__func__  # type: ignore[attr-defined]

    def of(cls: Any, frequencies: Any, norms: Any = None, value_heads: Any = "given") -> HeadConstants:
        given: HeadConstants = own(cls, frequencies, norms, wrong if value_heads == right else value_heads)
        return given

    monkeypatch.setattr(HeadConstants, "of", classmethod(of))
    model = model_of()
    note = str(attentions_of(model).note)
    assert "attention is mlx-lm's own" in note
    assert not note.startswith(all_of(model))


def test_products_that_are_wrong_leave_attention_over_mlxs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And kernels that attend wrongly leave all to mlx-lm."""

    class Wrong(HostKernels):
        def joined_attention(self, *args: mx.array, **how: Any) -> mx.array:
            return super().joined_attention(*args, **how) * 1.05

    assert "relative error 5.0e-02" in str(attentions_of(model_of(), Wrong()).note)
    own = GemmaAttention.__call__

    def wrong(self: GemmaAttention, x: mx.array, cache: Any) -> mx.array:
        return own(self, x + 0.5 if self.few_rows else x, cache)

    monkeypatch.setattr(GemmaAttention, "__call__", wrong)
    monkeypatch.setattr("engine.runner.kv.joined_weights.fused_rows", lambda x, weight, *_given, **_how: x @ weight.T)
    model = model_of(attention_k_eq_v=False)
    model.set_dtype(mx.bfloat16)
    note = str(attentions_of(model, device="cuda").note)
    assert note.startswith(f"{all_of(model)}; few rows are multiplied by MLX: ")
