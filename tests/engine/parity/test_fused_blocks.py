"""Layers that compute a decode step in few launches, against mlx-lm: tokens, undoing, memory, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3

from engine.runner.kernels import fused_rows, one_row, split_k
from engine.runner.kernels.fused_rows import Norm
from engine.runner.kernels.handover import Handover
from engine.runner.kv.fused_block import FusedBlock, Rows
from engine.runner.kv.fused_blocks import FusedBlocks
from engine.runner.kv.joined_modules import OwnProducts
from engine.runner.kv.joined_weights import JoinedWeights
from tests.engine.parity.bare_engine import BLOCK_SIZE, BareEngine, greedy
from tests.engine.parity.oracle import mixed_prompts
from tests.engine.parity.tiny_architectures import VOCAB, build, config_of
from tests.engine.runner.kernels.cuda_on_host import HostKernel, kernels_on_host
from tests.engine.runner.kernels.host_kernels import HostKernels

NUM_TOKENS = 6
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64}  # fmt: skip
_SLIDING = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 24}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}), "llama of Llama 3's rotation": ("llama", {"rope_scaling": _LLAMA3}),
    "llama of linear rotation": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama with windows": ("llama", _SLIDING), "mistral": ("mistral", {}), "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}  # fmt: skip


def model_of(name: str, **changes: Any) -> Any:
    model_type, entries = FAMILIES[name]
    return build({**config_of(model_type), **entries, **changes})


def fused(model: Any, kernels: HostKernels | None = None, device: str = "cpu") -> FusedBlocks:
    blocks = FusedBlocks(model, device, kernels or HostKernels(), BLOCK_SIZE)  # type: ignore[arg-type]
    blocks.choose()
    return blocks


@pytest.mark.parametrize("name", FAMILIES)
def test_fused_layers_give_mlx_lms_tokens(name: str) -> None:
    kernels, model = HostKernels(), model_of(name)
    prompts = mixed_prompts(5, VOCAB, 90, seed=1)
    expected = [greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
    engine = BareEngine(model, kernels=kernels)
    blocks = fused(model, kernels)
    assert blocks.note == "fused layers: 4 of 4"
    blocks.install()
    kernels.calls = dict.fromkeys(kernels.calls, 0)
    for chunk in (512, 512, 16):  # at once, from the prefix cache, in chunks
        engine.start(chunk=chunk)
        assert [one.output_token_ids for one in engine.generate(prompts, NUM_TOKENS)] == expected
    assert kernels.calls["joined_attention"] > 0
    assert kernels.calls["paged_attention"] == 0
    blocks.remove()
    assert [one.output_token_ids for one in engine.start().generate(prompts, NUM_TOKENS)] == expected
    assert kernels.calls["paged_attention"] > 0
    engine.backend.close()


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "int4"])
def test_fused_layers_over_packed_pages_give_the_reference_paths_tokens(kv_cache_dtype: str) -> None:
    kernels, model = HostKernels(), model_of("qwen3", head_dim=32)
    prompts = mixed_prompts(5, VOCAB, 90, seed=1)
    reference = BareEngine(model, kv_cache_dtype=kv_cache_dtype)
    expected = [one.output_token_ids for one in reference.generate(prompts, NUM_TOKENS)]
    reference.backend.close()
    engine = BareEngine(model, kernels=kernels, kv_cache_dtype=kv_cache_dtype)
    blocks = FusedBlocks(model, "cpu", kernels, BLOCK_SIZE, kv_cache_dtype)
    blocks.choose()
    assert blocks.note == "fused layers: 4 of 4"
    blocks.install()
    kernels.calls = dict.fromkeys(kernels.calls, 0)
    assert [one.output_token_ids for one in engine.start().generate(prompts, NUM_TOKENS)] == expected
    assert kernels.calls["joined_attention"] > 0 == kernels.calls["paged_attention"]
    blocks.remove()
    engine.backend.close()


def test_packed_weights_are_joined_too() -> None:
    model = model_of("qwen3", hidden_size=128, intermediate_size=192)
    nn.quantize(model, group_size=64, bits=4)
    blocks = fused(model)
    assert blocks.note == "fused layers: 4 of 4"


@pytest.mark.parametrize("bits", [0, 4])
def test_weights_are_slices_of_joined_ones_with_the_same_values(bits: int) -> None:
    model = model_of("qwen2", hidden_size=128, intermediate_size=192)
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    before = [(name, np.array(value)) for name, value in tree_flatten(model.parameters())]
    used = mx.get_active_memory()
    blocks = fused(model)
    mx.clear_cache()
    assert mx.get_active_memory() - used < 20_000, "a second copy of the weights"
    attention = model.model.layers[1].self_attn
    keys, queries = (np.array(attention[name].weight, copy=False) for name in ("k_proj", "q_proj"))
    assert keys.ctypes.data == queries.ctypes.data + queries.nbytes
    blocks.install()
    for name, value in before:
        assert np.array_equal(dict(tree_flatten(model.parameters()))[name], value), name
    blocks.remove()
    assert [name for name, _ in tree_flatten(model.parameters())] == [name for name, _ in before]


def test_removing_leaves_the_models_classes_as_they_were() -> None:
    model = model_of("llama")
    kinds = [type(layer) for _, layer in model.named_modules()]
    blocks = fused(model)
    assert [type(layer) for _, layer in model.named_modules()] == kinds
    blocks.install()
    assert sum(type(layer) is not kind for (_, layer), kind in zip(model.named_modules(), kinds, strict=True)) == 4
    blocks.remove()
    blocks.remove()
    assert [type(layer) for _, layer in model.named_modules()] == kinds


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("llama", {"rope_traditional": True}, "a rotation of its own (RoPE of 16)"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "(DynamicNTKScalingRoPE of 16)"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "(YarnRoPE of 16)"),
        ("llama", {"attention_bias": True}, "biases behind its output or in its MLP"),
        ("llama", {"mlp_bias": True}, "biases behind its output or in its MLP"),
    ],
)
def test_what_the_kernels_do_not_cover_stays_mlx_lms(name: str, changes: dict[str, Any], why: str) -> None:
    blocks = fused(model_of(name, **changes))
    assert str(blocks.note).startswith("fused layers: 0 of 4; layers are not fused: ")
    assert why in str(blocks.note)


def test_weights_of_several_kinds_are_refused() -> None:
    model = model_of("qwen3", hidden_size=128, intermediate_size=192)
    for layer in model.model.layers:
        layer.self_attn.v_proj = layer.self_attn.v_proj.to_quantized(group_size=64, bits=8)
    assert "packed in several ways" in str(fused(model).note)
    model = model_of("qwen3")
    model.model.layers[2].mlp.down_proj.set_dtype(mx.float16)
    blocks = fused(model)
    assert blocks.note == "fused layers: 3 of 4; layers are not fused: weights of several element types"
    assert [type(layer.mlp).__name__ for layer in model.model.layers] == ["MLP"] * 4
    model = model_of("qwen3", hidden_size=128, intermediate_size=192)
    nn.quantize(model, group_size=64, bits=4)
    down = model.model.layers[0].mlp.down_proj
    down.biases = down.biases.astype(mx.float16)
    blocks = fused(model)
    assert blocks.note == "fused layers: 3 of 4; layers are not fused: weights of several element types"
    assert down.biases.dtype == mx.float16


def test_a_model_without_such_layers_is_left_alone() -> None:
    blocks = fused(build(config_of("gemma2")))
    blocks.install()
    assert blocks.note is None
    assert FusedBlocks(model_of("llama"), "cpu", None, BLOCK_SIZE).note is None


def test_kernels_that_attend_wrongly_fuse_nothing() -> None:
    class Wrong(HostKernels):
        def joined_attention(self, *args: mx.array, **how: Any) -> mx.array:
            return super().joined_attention(*args, **how) * 1.05

    class Broken(HostKernels):
        def joined_attention(self, *_args: mx.array, **_how: Any) -> mx.array:
            raise RuntimeError("error: expected ';'")

    assert "relative error 5.0e-02" in str(fused(model_of("qwen3"), Wrong()).note)
    assert "expected ';'" in str(fused(model_of("qwen3"), Broken()).note)


def test_a_block_that_computes_wrongly_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where each kernel is right: a norm that is left out."""
    own = FusedBlock.__call__

    def wrong(self: FusedBlock, x: Rows, cache: Any, next_norm: Any) -> Rows:
        return own(self, Rows(x.plain * 1.1), cache, next_norm)

    monkeypatch.setattr(FusedBlock, "__call__", wrong)
    model = model_of("qwen3")
    blocks = fused(model)
    assert "differs by" in str(blocks.note)
    assert "fused layers: 0 of 4" in str(blocks.note)


@pytest.fixture
def host_products(monkeypatch: pytest.MonkeyPatch, kernel_folder: Path) -> dict[str, HostKernel]:
    """Products of few rows compiled for this machine, by name."""
    return kernels_on_host(monkeypatch, kernel_folder, fused_rows, one_row, split_k)


def counted(model: Any, kernels: HostKernels, products: dict[str, HostKernel]) -> FusedBlocks:
    """Both layers fused as on CUDA and installed; launches are counted from now on."""
    blocks = fused(model, kernels, "cuda")
    assert blocks.note == "fused layers: 2 of 2"
    blocks.install()
    for kernel in products.values():
        kernel.launches = 0
    kernels.calls = dict.fromkeys(kernels.calls, 0)
    return blocks


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(
    ("name", "dtype", "bits"), [("qwen3", mx.bfloat16, 0), ("qwen2", mx.float16, 0), ("llama", mx.bfloat16, 4)]
)
def test_few_rows_take_four_products_a_layer(
    name: str, dtype: mx.Dtype, bits: int, host_products: dict[str, HostKernel]
) -> None:
    """With norms, residuals and the gate inside; and one launch of attention between them."""
    size = (
        {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 8} if bits else {"intermediate_size": 128}
    )
    model, kernels = model_of(name, num_hidden_layers=2, **size), HostKernels()
    model.set_dtype(dtype)
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    engine = BareEngine(model, kernels=kernels)
    counted(model, kernels, host_products)
    engine.generate([[5, 9, 11], [7, 3]], 3)
    assert kernels.calls["joined_attention"] > 0
    assert sum(kernel.launches for kernel in host_products.values()) == 4 * kernels.calls["joined_attention"]
    engine.backend.close()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_up_to_32_rows_narrow_products_split_k(host_products: dict[str, HostKernel]) -> None:
    """And what adds up their parts adds the residual and normalizes."""
    model, kernels = model_of("qwen3", num_hidden_layers=2, intermediate_size=1024), HostKernels()
    model.set_dtype(mx.bfloat16)
    rng = np.random.default_rng(4)
    prompts = [rng.integers(10, VOCAB, 3 + number % 5).tolist() for number in range(20)]
    engine = BareEngine(model, kernels=kernels)
    blocks = counted(model, kernels, host_products)
    tokens = [one.output_token_ids for one in engine.generate(prompts, 3)]
    launches = {name: kernel.launches for name, kernel in host_products.items() if kernel.launches}
    assert launches == {"split_k": 8, "add_parts_normed": 6, "silu_and_mul": 4, "add_parts": 2}, "two steps, two layers"
    blocks.remove()
    assert sum(a == b for a, b in zip(tokens, mlx_tokens(engine, prompts), strict=True)) >= 17, "bfloat16 ties at most"
    engine.backend.close()


def test_a_layer_takes_what_the_one_before_it_left_and_nothing_else() -> None:
    handover, norm, other = Handover[Rows](), Norm(mx.ones((8,)), 1e-5), Norm(mx.ones((8,)), 1e-5)
    left = Rows(mx.ones((3, 8)), mx.full((3, 8), 2.0), norm)
    shaped = left.plain.reshape(3, 1, 8)
    assert handover.leave(shaped, left) is shaped
    assert handover.take(shaped) is left
    assert handover.take(shaped) is None, "taken once"
    handover.leave(shaped, left)
    assert handover.take(shaped + 0) is None, "of other rows"
    assert handover.take(shaped) is None, "another came between"
    handover.leave(shaped, None)
    assert handover.take(shaped) is None
    assert left.normalized(norm) is left.normed
    assert mx.allclose(left.normalized(other), mx.ones((3, 8)), atol=1e-4), "of another layer"


def test_a_model_that_changes_rows_between_layers_gets_its_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is handed over is then not what the next layer is given."""
    kernels, model = HostKernels(), model_of("qwen3", num_hidden_layers=2)

    def call(self: Any, inputs: mx.array, cache: Any, *_: Any) -> mx.array:
        h = self.embed_tokens(inputs)
        mask = qwen3.create_attention_mask(h, cache[0])
        for layer, c in zip(self.layers, cache, strict=True):
            h = layer(h, mask, c) * 1.5
        return self.norm(h)

    monkeypatch.setattr(qwen3.Qwen3Model, "__call__", call)
    prompts = mixed_prompts(3, VOCAB, 40, seed=2)
    expected = [greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
    engine, blocks = BareEngine(model, kernels=kernels), fused(model, kernels)
    blocks.install()
    assert [one.output_token_ids for one in engine.generate(prompts, NUM_TOKENS)] == expected
    engine.backend.close()


class InPlace(qwen3.Qwen3Model):
    """A model file's own: the array between two layers stays the same one."""

    def __call__(self, inputs: mx.array, cache: Any = None, *_: Any) -> mx.array:
        h = self.embed_tokens(inputs)
        mask = qwen3.create_attention_mask(h, cache[0])
        for layer, c in zip(self.layers, cache, strict=True):
            h = layer(h, mask, c)
            h *= 1.5
        return self.norm(h)  # type: ignore[no-any-return]


def test_a_model_that_changes_rows_in_place_between_layers_gets_its_own_tokens() -> None:
    kernels, model = HostKernels(), model_of("qwen3")
    model.model.__class__ = InPlace
    prompts = mixed_prompts(3, VOCAB, 40, seed=2)
    expected = [greedy(model, prompt, NUM_TOKENS) for prompt in prompts]
    engine, blocks = BareEngine(model, kernels=kernels), fused(model, kernels)
    blocks.install()
    assert [one.output_token_ids for one in engine.generate(prompts, NUM_TOKENS)] == expected
    assert kernels.calls["joined_attention"] > 0
    engine.backend.close()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_every_layer_behind_the_first_gets_its_rows_normalized_by_its_own_norm(
    host_products: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    came: list[tuple[Any, bool]] = []
    usual = Rows.normalized

    def normalized(self: Rows, norm: Norm) -> mx.array:
        came.append((norm.gain, self.norm is norm))
        return usual(self, norm)

    model, kernels = model_of("qwen3", num_hidden_layers=3, intermediate_size=1024), HostKernels()
    model.set_dtype(mx.bfloat16)
    engine = BareEngine(model, kernels=kernels)
    blocks = fused(model, kernels, "cuda")
    blocks.install()
    monkeypatch.setattr(Rows, "normalized", normalized)
    engine.generate([[5 + number, 9, 11] for number in range(20)], 2)
    gains = [layer.input_layernorm.weight for layer in model.model.layers]
    assert [(next(i for i, gain in enumerate(gains) if gain is one), ready) for one, ready in came] == [
        (0, False), (1, True), (2, True),
    ]  # fmt: skip
    engine.backend.close()


def mlx_tokens(engine: BareEngine, prompts: list[list[int]]) -> list[list[int]]:
    return [one.output_token_ids for one in engine.start().generate(prompts, 3)]


@pytest.mark.parametrize(
    ("rows", "bits", "own", "way"),
    [
        (16, 0, "all", "few"), (17, 0, "all", "split"), (32, 0, "all", "split"), (33, 0, "all", "many"),
        (16, 0, "few", "few"), (17, 0, "few", "many"), (1, 0, "none", "many"),
        (32, 4, "all", "few"), (33, 4, "all", "many"),
    ],
)  # fmt: skip
def test_the_number_of_rows_decides_which_products_are_used(
    rows: int, bits: int, own: OwnProducts, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("llama", hidden_size=128, intermediate_size=128, num_attention_heads=8)
    model.set_dtype(mx.bfloat16)
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    block = FusedBlock.of(model.model.layers[0], own)
    for name in ("few", "split", "many"):
        monkeypatch.setattr(FusedBlock, f"_{name}", lambda *_given, name=name: name)
    assert block(Rows(mx.zeros((rows, 128), mx.bfloat16)), None) == way  # type: ignore[arg-type, comparison-overlap]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_wrong_products_that_split_k_leave_those_of_few_rows(
    host_products: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split_k, "PARTS", split_k.PARTS.replace("= c[m][i];", "= 2.0f * c[m][i];"))
    model, kernels = model_of("qwen3", num_hidden_layers=2, intermediate_size=128), HostKernels()
    model.set_dtype(mx.bfloat16)
    engine = BareEngine(model, kernels=kernels)
    blocks = fused(model, kernels, "cuda")
    assert str(blocks.note).startswith("fused layers: 2 of 2; narrow products do not split K: its result differs by")
    blocks.install()
    for kernel in host_products.values():
        kernel.launches = 0
    engine.generate([[5, 9, 11], [7, 3]], 2)
    assert {name for name, kernel in host_products.items() if kernel.launches} == {
        "fused_rows_dense_normed_plain", "fused_rows_dense_residual", "fused_rows_dense_normed_silu",
    }  # fmt: skip
    engine.backend.close()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_without_right_kernels_for_few_rows_layers_are_fused_over_mlxs_products(
    host_products: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = fused_rows.fused_text

    def wrong(**how: Any) -> tuple[str, str]:
        body, header = own(**how)
        return body.replace("+ float(added[at])", ""), header

    monkeypatch.setattr(fused_rows, "fused_text", wrong)
    model = model_of("qwen3", num_hidden_layers=2, intermediate_size=128)
    model.set_dtype(mx.bfloat16)
    blocks = fused(model, device="cuda")
    assert str(blocks.note).startswith("fused layers: 2 of 2; few rows are not fused: its result differs by")


def test_many_rows_are_multiplied_by_unpacked_weights_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(128, 64, bias=False)
    packed = nn.QuantizedLinear.from_linear(layer, group_size=64, bits=4)
    weights = [JoinedWeights.of([packed], on_cuda=on_cuda) for on_cuda in (True, False)]
    unpacked: list[int] = []
    own = mx.dequantize
    monkeypatch.setattr(mx, "dequantize", lambda *given, **how: unpacked.append(1) or own(*given, **how))
    for rows, times in ((32, 0), (33, 1)):
        x, residual = mx.random.normal((rows, 128)), mx.random.normal((rows, 64))
        found = [some.many(x, residual) for some in weights]
        assert len(unpacked) == times
        assert mx.allclose(found[0], found[1], atol=1e-4)
        assert mx.allclose(found[1], packed(x) + residual, atol=1e-4)


def test_a_layer_whose_weights_find_no_room_together_stays_mlx_lms(monkeypatch: pytest.MonkeyPatch) -> None:
    own, joined = FusedBlock.of.__func__, []  # type: ignore[attr-defined]

    def of(cls: type[FusedBlock], layer: Any, own_products: OwnProducts) -> FusedBlock:
        joined.append(layer)
        if len(joined) == 4:  # the first is joined for its trial too
            raise RuntimeError("[malloc] Unable to allocate 1 bytes")
        return own(cls, layer, own_products)  # type: ignore[no-any-return]

    monkeypatch.setattr(FusedBlock, "of", classmethod(of))
    assert fused(model_of("llama")).note == (
        "fused layers: 3 of 4; a layer is not fused: [malloc] Unable to allocate 1 bytes"
    )
