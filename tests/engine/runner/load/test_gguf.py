import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type

from engine.errors import ModelLoadError
from engine.models.gguf_config import MODEL_TYPES, gguf_config
from engine.models.gguf_file import open_gguf
from engine.models.local import ResolvedModel
from engine.params.engine_args import EngineArgs
from engine.runner.load.gguf import PACKED_BITS, load_gguf
from engine.runner.load.loader import load_model

mx = pytest.importorskip("mlx.core")

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 256, 4, 2, 64, 64
ROPE_BASE = 50000.0
LAYERS = {"llama": 2, "qwen2": 2, "qwen3": 2, "gemma3": 6}  # Gemma: five sliding layers, then a full one
KINDS = [
    *(Type.F32, Type.F16, Type.BF16, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0),
    *(Type.Q2_K, Type.Q3_K, Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_NL, Type.IQ4_XS),
]
_PLAIN = (Type.F32, Type.F16)
_SCALE_BYTES: dict[Type, tuple[int, ...]] = {
    Type.Q2_K: (80, 82),
    Type.Q3_K: (108,),
    Type.Q4_K: (0, 2),
    Type.Q5_K: (0, 2),
    Type.Q6_K: (208,),
    Type.IQ4_NL: (0,),
    Type.IQ4_XS: (0,),
}
"""Where a block holds its float16 scales: random bytes would make NaN of them."""


def random_blocks(kind: Type, shape: tuple[int, int], rng: np.random.Generator) -> npt.NDArray[Any]:
    """Random weights of about 0.05, in the file's form."""
    if kind not in _SCALE_BYTES:
        values = rng.normal(0, 0.05, shape).astype(np.float32)
        if kind in _PLAIN:
            return values.astype(np.float16 if kind == Type.F16 else np.float32)
        return gguf.quants.quantize(values, kind)  # type: ignore[no-any-return]
    block, size = GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (shape[0], shape[1] // block, size), dtype=np.uint8)
    for at in _SCALE_BYTES[kind]:
        scales = (rng.uniform(0.5, 1.5, data.shape[:2]) * 1e-3).astype(np.float16)
        data[..., at : at + 2] = scales[..., None].view(np.uint8)
    return data.reshape(shape[0], -1)


def matrices(arch: str, tied: bool) -> dict[str, tuple[int, int]]:
    sizes = {
        "attn_q": (HEADS * HEAD_DIM, HIDDEN),
        "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
        "attn_output": (HIDDEN, HEADS * HEAD_DIM),
        "ffn_gate": (512, HIDDEN),
        "ffn_up": (512, HIDDEN),
        "ffn_down": (HIDDEN, 512),
    }
    layers = {f"blk.{i}.{name}.weight": shape for i in range(LAYERS[arch]) for name, shape in sizes.items()}
    return {"token_embd.weight": (VOCAB, HIDDEN), **layers, **({} if tied else {"output.weight": (VOCAB, HIDDEN)})}


def vectors(arch: str) -> dict[str, int]:
    sizes = {"attn_norm": HIDDEN, "ffn_norm": HIDDEN}
    if arch in ("qwen3", "gemma3"):
        sizes |= {"attn_q_norm": HEAD_DIM, "attn_k_norm": HEAD_DIM}
    if arch == "gemma3":
        sizes |= {"post_attention_norm": HIDDEN, "post_ffw_norm": HIDDEN}
    found = {f"blk.{i}.{name}.weight": size for i in range(LAYERS[arch]) for name, size in sizes.items()}
    if arch == "qwen2":
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS, "attn_v": KV_HEADS}
        found |= {f"blk.{i}.{name}.bias": n * HEAD_DIM for i in range(LAYERS[arch]) for name, n in heads.items()}
    return {"output_norm.weight": HIDDEN, **found}


def write_gguf(
    path: Path,
    arch: str,
    kind: Type,
    *,
    tied: bool = True,
    extra: dict[str, npt.NDArray[np.float32]] | None = None,
    more: Callable[[gguf.GGUFWriter], None] = lambda _: None,
) -> Path:
    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(LAYERS[arch])
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(512)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(ROPE_BASE)
    if arch == "gemma3":
        writer.add_sliding_window(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(VOCAB)])
    writer.add_token_types([1] * VOCAB)
    writer.add_eos_token_id(3)
    more(writer)
    for name, shape in matrices(arch, tied).items():
        data = random_blocks(kind, shape, rng)
        writer.add_tensor(name, data, raw_dtype=None if kind in _PLAIN else kind)
    for name, size in vectors(arch).items():
        shift = 1.0 if name.endswith("norm.weight") else 0.0
        writer.add_tensor(name, (shift + rng.normal(0, 0.1, size)).astype(np.float32))
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


HF_NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip


def write_folder(folder: Path, path: Path, arch: str) -> Path:
    """The same weights as a Hugging Face folder, made with gguf's own reader and llama.cpp's rules, not with ours."""
    reader = gguf.GGUFReader(path)
    weights = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name = tensor.name
        if arch == "llama" and ("attn_q." in name or "attn_k." in name):
            rows = values.shape[0] // HEAD_DIM
            order = [h * HEAD_DIM + i // 2 + (i % 2) * HEAD_DIM // 2 for h in range(rows) for i in range(HEAD_DIM)]
            straight = np.empty_like(values)
            straight[order] = values
            values = straight
        if arch == "gemma3" and "norm" in name:
            values = values - 1
        if name.startswith("blk."):
            _, layer, part, leaf = name.split(".")
            after = "pre_feedforward_layernorm" if arch == "gemma3" else "post_attention_layernorm"
            name = f"model.layers.{layer}.{after if part == 'ffn_norm' else HF_NAMES[part]}.{leaf}"
        else:
            ends = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
            name = ends[name.split(".")[0]] + ".weight"
        weights[name] = mx.array(values)
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    config = {
        "model_type": MODEL_TYPES[arch], "hidden_size": HIDDEN, "num_hidden_layers": LAYERS[arch],
        "intermediate_size": 512, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "rms_norm_eps": 1e-6,
        "vocab_size": VOCAB, "max_position_embeddings": 512, "rope_theta": ROPE_BASE, "sliding_window": 8,
        "sliding_window_pattern": 6, "query_pre_attn_scalar": HEAD_DIM, "rope_local_base_freq": 10000.0,
        "tie_word_embeddings": "lm_head.weight" not in weights,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


IDS = [[1, 5, 9, 2, 33, 60, 7, 7, 12, 50, 21, 4]]


def logits(model: Any) -> npt.NDArray[np.float32]:
    return np.array(model(mx.array(IDS)).astype(mx.float32))


def resolved(path: Path) -> ResolvedModel:
    return ResolvedModel(path.name, path, "gguf" if path.suffix == ".gguf" else "folder")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_weight_equals_what_gguf_itself_dequantizes(tmp_path: Path, kind: Type) -> None:
    path = write_gguf(tmp_path / "m.gguf", "qwen3", kind)
    loaded = load_model(resolved(path), EngineArgs("m", dtype="float32"))
    layer = loaded.model.model.layers[1]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    pairs = {
        "blk.1.attn_q.weight": layer.self_attn.q_proj.weight,
        "blk.1.ffn_down.weight": layer.mlp.down_proj.weight,
        "token_embd.weight": loaded.model.model.embed_tokens.weight,
    }
    for name, weight in pairs.items():
        expected = gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
        np.testing.assert_array_equal(np.array(weight), expected.astype(np.float32))


@pytest.mark.parametrize("arch", MODEL_TYPES)
@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0, Type.Q4_K], ids=lambda kind: kind.name)
def test_a_file_and_the_same_weights_as_a_folder_give_equal_logits(tmp_path: Path, arch: str, kind: Type) -> None:
    path = write_gguf(tmp_path / "m.gguf", arch, kind)
    folder = write_folder(tmp_path / "folder", path, arch)
    args = EngineArgs("m", dtype="float32")
    from_file, from_folder = load_model(resolved(path), args), load_model(resolved(folder), args)
    assert np.abs(logits(from_folder.model)).max() > 0.01
    np.testing.assert_allclose(logits(from_file.model), logits(from_folder.model), atol=1e-5)


def test_an_output_matrix_of_its_own_is_used(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", Type.Q4_0, tied=False)
    folder = write_folder(tmp_path / "folder", path, "llama")
    args = EngineArgs("m", dtype="float32")
    np.testing.assert_allclose(
        logits(load_model(resolved(path), args).model), logits(load_model(resolved(folder), args).model), atol=1e-5
    )


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", PACKED_BITS, ids=lambda kind: kind.name)
def test_packed_weights_hold_the_files_values_bit_for_bit(tmp_path: Path, arch: str, kind: Type) -> None:
    file = open_gguf(write_gguf(tmp_path / "m.gguf", arch, kind))
    options: dict[str, Any] = {"dtype": mx.float32, "report": lambda *_: None}
    packed = load_gguf(file, gguf_config(file), keep_packed=True, **options)
    plain = load_gguf(file, gguf_config(file), keep_packed=False, **options)
    for ours, exact in zip(packed.model.layers, plain.model.layers, strict=True):
        for one, other in ((ours.self_attn.q_proj, exact.self_attn.q_proj), (ours.mlp.up_proj, exact.mlp.up_proj)):
            values = mx.dequantize(one.weight, one.scales, one.biases, one.group_size, one.bits)
            # d * q - 8 d is rounded once more than d * (q - 8): the same number but for the last bit.
            np.testing.assert_allclose(np.array(values), np.array(other.weight), rtol=0, atol=1e-8)
    np.testing.assert_allclose(logits(packed), logits(plain), atol=1e-4)


def test_packed_scales_are_exact_in_float16(tmp_path: Path) -> None:
    file = open_gguf(write_gguf(tmp_path / "m.gguf", "qwen3", Type.Q4_0))
    model = load_gguf(file, gguf_config(file), dtype=mx.float16, keep_packed=True, report=lambda *_: None)
    projection = model.model.layers[0].mlp.up_proj
    blocks = file.blocks("blk.0.ffn_up.weight").reshape(512, -1, 18)
    stored = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0]
    np.testing.assert_array_equal(np.array(projection.scales), stored)
    np.testing.assert_array_equal(np.array(projection.biases), -8 * stored)


def test_progress_counts_the_files_bytes_up_to_all_of_them(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", Type.Q8_0)
    seen: list[tuple[str, int, int]] = []
    load_model(resolved(path), EngineArgs("m"), lambda *at: seen.append(at))
    assert all(stage == "load" for stage, _, _ in seen)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1] == seen[-1][2] == sum(info.num_bytes for info in open_gguf(path).tensors.values())


def test_rope_factors_of_the_file_are_used_as_they_are(tmp_path: Path) -> None:
    factors = np.linspace(1.0, 8.0, HEAD_DIM // 2, dtype=np.float32)
    path = write_gguf(tmp_path / "m.gguf", "llama", Type.F32, extra={"rope_freqs.weight": factors})
    model = load_model(resolved(path), EngineArgs("m", dtype="float32")).model
    expected = ROPE_BASE ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM) * factors
    for layer in model.model.layers:
        np.testing.assert_allclose(np.array(layer.self_attn.rope._freqs), expected, rtol=1e-5)


def test_the_config_carries_length_scaling_end_tokens_and_vocabulary(tmp_path: Path) -> None:
    def scaling(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    path = write_gguf(tmp_path / "m.gguf", "qwen2", Type.F16, more=scaling)
    config = load_model(resolved(path), EngineArgs("m")).config
    assert config.context_length == 2048
    assert config.hf_config["rope_scaling"] == {"type": "linear", "rope_type": "linear", "factor": 4.0}
    assert (config.vocab_size, config.eos_token_ids, config.model_type) == (VOCAB, {3}, "qwen2")


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(other, "phi3")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelLoadError, match=r"architecture 'phi3' is not supported \(llama, qwen2, qwen3, gemma3"):
        load_model(resolved(other), EngineArgs("m"))


def test_an_unknown_tensor_is_named_not_dropped(tmp_path: Path) -> None:
    extra = {"blk.0.attn_sinks.weight": np.ones(4, dtype=np.float32)}
    path = write_gguf(tmp_path / "m.gguf", "llama", Type.F32, extra=extra)
    with pytest.raises(ModelLoadError, match=r"blk\.0\.attn_sinks\.weight is not known"):
        load_model(resolved(path), EngineArgs("m"))


@pytest.mark.parametrize("keep", [3, 100, 4000, -10])
def test_a_file_cut_short_is_one_line_at_any_cut(tmp_path: Path, keep: int) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", Type.F32)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelLoadError, match=r"not a GGUF file|cut short") as caught:
        open_gguf(path)
    assert "\n" not in str(caught.value)


def test_a_missing_tensor_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = matrices("llama", True)
    monkeypatch.setitem(
        write_gguf.__globals__, "matrices", lambda *_: {k: v for k, v in whole.items() if k != "blk.1.ffn_up.weight"}
    )
    path = write_gguf(tmp_path / "m.gguf", "llama", Type.F32)
    with pytest.raises(ModelLoadError, match=r"layers\.1\.mlp\.up_proj\.weight") as caught:
        load_model(resolved(path), EngineArgs("m"))
    assert "\n" not in str(caught.value)


def test_the_header_reader_agrees_with_ggufs_own_reader(smollm2_gguf: Path) -> None:
    reader, file = gguf.GGUFReader(smollm2_gguf), open_gguf(smollm2_gguf)
    theirs = {key: value.contents() for key, value in reader.fields.items() if not key.startswith("GGUF.")}
    assert theirs == dict(file.metadata)
    assert {tensor.name: tensor.data_offset for tensor in reader.tensors} == {
        name: info.offset for name, info in file.tensors.items()
    }
