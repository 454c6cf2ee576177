"""GGUF files of tiny mlx-lm models, as llama.cpp's converter would write them.

Names are gguf's own table's; what the converter does to numbers is done here from its side, so that reading the file
back undoes it. Seen to be the converter's: files that it wrote itself of the same architectures give the logits of
llama.cpp, transformers and mlx-lm.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType as Type
from mlx.utils import tree_flatten

from engine.models.model_config import ModelConfig
from engine.models.spelling import with_every_spelling
from engine.runner.load.rope_layers import honour_rope
from tests.engine.parity.tiny_architectures import CONFIGS, build, config_of

Array = npt.NDArray[np.float32]
Tensors = dict[str, Array]
Config = Mapping[str, Any]
_ARCHITECTURES = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
_WORDS = {
    "num_hidden_layers": "block_count", "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon", "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base", "num_experts": "expert_count", "num_local_experts": "expert_count",
    "n_routed_experts": "expert_count", "num_experts_per_tok": "expert_used_count", "sliding_window":
    "attention.sliding_window", "n_group": "expert_group_count", "topk_group": "expert_group_used_count",
}  # fmt: skip
"""Words of ``config.json`` that any converter writes, and their keys."""
_RENAMED = (
    ("language_model.", ""), ("switch_mlp.", "experts."), ("switch_glu.", ""), ("dt_bias", "dt_proj.bias"),
    ("block_sparse_moe.experts.gate_proj", "block_sparse_moe.experts.w1"),
    ("block_sparse_moe.experts.up_proj", "block_sparse_moe.experts.w3"),
    ("block_sparse_moe.experts.down_proj", "block_sparse_moe.experts.w2"),
    ("e_score_correction_bias", "e_score_correction.bias"), ("embed_q", "k_b_proj"), ("unembed_out", "v_b_proj"),
    ("feed_forward.expert_bias", "feed_forward.expert_bias.bias"),
    ("sinks", "sinks.weight"), ("layer_scalar", "layer_scalar.weight"),
)  # fmt: skip
"""mlx-lm's names to those of published folders, as far as gguf's table needs it."""


@dataclass(frozen=True)
class Case:
    """A model by its name among the tiny ones (or a ``config``), the file's architecture, and what is its own there."""

    model: str
    arch: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    stored: tuple[Callable[[Tensors, Config], Tensors], ...] = ()
    head_dim: bool = True

    @property
    def config(self) -> dict[str, Any]:
        """``config.json`` of the model."""
        known = config_of(self.model) if self.model in CONFIGS else {**config_of("llama"), "model_type": self.model}
        return {**known, **self.changes}


def write(path: Path, case: Case, kind: Type = Type.F32, other: Mapping[str, Type] = MappingProxyType({})) -> Any:
    """Write the file of ``case``; gives mlx-lm's model, turning as its configuration tells.

    Matrices are of type ``kind`` where their rows allow it, or of the ``other`` type that their name has there.
    """
    config = case.config
    model = build(config)
    text = {**config, **config.get("text_config", {})}
    writer = gguf.GGUFWriter(path, case.arch)
    for key, value in _metadata(case, text).items():
        _add(writer, f"{case.arch}.{key}", value)
    _add_vocabulary(writer, text["vocab_size"])
    for name, values in stored_tensors(case, model, text).items():
        own = other.get(name, kind)
        packs = values.ndim > 1 and values.shape[-1] % gguf.GGML_QUANT_SIZES[own][0] == 0 and "norm" not in name
        if not packs or own in (Type.F32, Type.F16) or "ssm_" in name or "shortconv.conv" in name:
            writer.add_tensor(name, values.astype(np.float16 if packs and own == Type.F16 else np.float32))
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    honour_rope(model, ModelConfig("tiny", path, with_every_spelling(config), {}, 0, 0, frozenset(), case.model))
    return model


def stored_tensors(case: Case, model: Any, config: Config) -> Tensors:
    """A model's parameters by GGUF's names, as the converter stores them."""
    tensors = {name: np.array(value.astype(mx.float32)) for name, value in tree_flatten(model.parameters())}
    for change in case.stored:
        tensors = change(tensors, config)
    table = gguf.get_tensor_name_map(_ARCHITECTURES[case.arch], config["num_hidden_layers"])
    return {_gguf_name(name, table): np.ascontiguousarray(values) for name, values in tensors.items()}


def _gguf_name(name: str, table: Any) -> str:
    if name.startswith(("blk.", "rope_")):
        return name
    for ours, theirs in _RENAMED:
        name = name.replace(ours, theirs)
    found = table.get_name(name, (".weight", ".bias"))
    assert found is not None, name
    leaf = re.sub(r"\.(ssm_a|ssm_d)\.weight$", r".\1", found)
    return str(leaf)


def _metadata(case: Case, config: Config) -> dict[str, Any]:
    keys = {key: config[word] for word, key in _WORDS.items() if config.get(word) is not None}
    if case.head_dim:
        keys |= {f"attention.{part}_length": config["head_dim"] for part in ("key", "value")}
    keys |= {key: value for key, value in case.keys.items() if value is not None}
    return {key: value for key, value in keys.items() if key not in case.keys or case.keys[key] is not None}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int) and not key.endswith(("rope.freq_base", "_scale", "scale")):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, float(value))


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_merges(["t 0"])
    first = ["<unk>", "<s>", "</s>", "<|endoftext|>"]
    writer.add_token_list(first + [f"t{number}" for number in range(len(first), size)])
    writer.add_token_types([1] * size)
    writer.add_eos_token_id(3)


def _heads_of(name: str, config: Config) -> int | None:
    kinds = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    found = next((word for part, word in kinds.items() if f"self_attn.{part}" in name), None)
    return None if found is None else config[found]


def in_pairs(tensors: Tensors, config: Config) -> Tensors:
    """Query and key rows with the two that RoPE rotates side by side."""

    def stored(name: str, values: Array) -> Array:
        if (heads := _heads_of(name, config)) is None:
            return values
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return halves.swapaxes(1, 2).reshape(values.shape)

    return {name: stored(name, values) for name, values in tensors.items()}


def norms_from_one(tensors: Tensors, _config: Config) -> Tensors:
    """Norms as 1 + w."""
    return {name: values + 1 if name.endswith("norm.weight") else values for name, values in tensors.items()}


def states(tensors: Tensors, _config: Config) -> Tensors:
    """Decays as -exp(w), and convolutions without MLX's last axis."""

    def stored(name: str, values: Array) -> Array:
        if name.endswith("A_log"):
            return -np.exp(values)
        return values[..., 0] if name.endswith(("conv1d.weight", "conv.conv.weight")) else values

    return {name: stored(name, values) for name, values in tensors.items()}


def value_heads_apart(tensors: Tensors, config: Config) -> Tensors:
    """The first value head of every key head, then their second ones (Qwen 3.5)."""
    keys, heads, dim = (config[f"linear_{word}"] for word in ("num_key_heads", "num_value_heads", "value_head_dim"))
    start = 2 * keys * config["linear_key_head_dim"]

    def apart(values: Array, width: int) -> Array:
        heads_of = values.reshape(keys, heads // keys, width, *values.shape[1:])
        return heads_of.swapaxes(0, 1).reshape(values.shape)

    def stored(name: str, values: Array) -> Array:
        if "linear_attn." not in name or "linear_attn.norm" in name:
            return values
        if "in_proj_qkv" in name or "conv1d" in name:
            return np.concatenate([values[:start], apart(values[start:], dim)])
        if "out_proj" in name:
            return apart(values.T, dim).T
        return apart(values, dim if "in_proj_z" in name else 1)

    return {name: stored(name, values) for name, values in tensors.items()}


def queries_apart_from_gates(tensors: Tensors, config: Config) -> Tensors:
    """Queries of all key heads, then their keys and values, and the gates in a matrix of their own (Qwen3-Next)."""
    keys, ratio = config["linear_num_key_heads"], config["linear_num_value_heads"] // config["linear_num_key_heads"]
    key, value = config["linear_key_head_dim"], config["linear_value_head_dim"] * ratio
    stored: Tensors = {}
    for name, values in tensors.items():
        if "in_proj_qkvz" not in name:
            stored[name] = values
            continue
        heads = values.reshape(keys, -1, values.shape[-1])
        parts = [part.reshape(-1, values.shape[-1]) for part in np.split(heads, np.cumsum([key, key, value]), axis=1)]
        layer = name.split("layers.")[1].split(".")[0]
        stored[f"blk.{layer}.attn_qkv.weight"] = np.concatenate(parts[:3])
        stored[f"blk.{layer}.attn_gate.weight"] = parts[3]
    return stored


def gemma4_experts(tensors: Tensors, config: Config) -> Tensors:
    """An expert's gate and up projection as one, the router's scales by names of their own."""
    stored = dict(tensors)
    for name in [name for name in tensors if "switch_glu.gate_proj" in name]:
        layer = name.split("layers.")[1].split(".")[0]
        parts = [stored.pop(name), stored.pop(name.replace("gate_proj", "up_proj"))]
        stored[f"blk.{layer}.ffn_gate_up_exps.weight"] = np.concatenate(parts, axis=1)
        router = f"model.layers.{layer}.router"
        stored[f"blk.{layer}.ffn_gate_inp.scale"] = stored.pop(f"{router}.scale")
        stored[f"blk.{layer}.ffn_down_exps.scale"] = stored.pop(f"{router}.per_expert_scale")
    return stored


def rotated_quarter(tensors: Tensors, config: Config) -> Tensors:
    """Gemma 4's full layers rotate a quarter of their heads."""
    half = config["global_head_dim"] // 2
    factors = np.where(np.arange(half) < half // 4, 1.0, 1e30).astype(np.float32)
    return {**tensors, "rope_freqs.weight": factors}


def mamba_columns(tensors: Tensors, _config: Config) -> Tensors:
    """Vectors of Mamba 2 with an axis more, and the shared expert's two matrices apart (Granite 4)."""
    stored: Tensors = {}
    for name, values in tensors.items():
        if "shared_mlp.input_linear" in name:
            layer = name.split("layers.")[1].split(".")[0]
            gate, up = np.split(values, 2)
            stored |= {f"blk.{layer}.ffn_gate_shexp.weight": gate, f"blk.{layer}.ffn_up_shexp.weight": up}
        else:
            deeper = name.endswith(("A_log", "mamba.D"))
            stored[name] = values[:, None] if deeper else values[None] if "mamba.norm" in name else values
    return stored


def factors(case_scaling: Mapping[str, Any], base: float, dims: int) -> Array:
    """By what Llama 3's scaling divides each frequency."""
    wavelengths = 2 * np.pi * base ** (np.arange(0, dims, 2) / dims)
    original, factor = case_scaling["original_max_position_embeddings"], case_scaling["factor"]
    low, high = case_scaling["low_freq_factor"], case_scaling["high_freq_factor"]
    smooth = (original / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    scaled = np.where(wavelengths > original / low, factor, between)
    return np.where(wavelengths < original / high, 1.0, scaled).astype(np.float32)


_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64}  # fmt: skip
_YARN: dict[str, Any] = {"type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_YARN_KEYS = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
_LONG = [1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]


def llama3_factors(tensors: Tensors, config: Config) -> Tensors:
    """The scaling as its result."""
    return {**tensors, "rope_freqs.weight": factors(_LLAMA3, config["rope_theta"], config["head_dim"])}


def long_factors(tensors: Tensors, _config: Config) -> Tensors:
    """The scaling of Phi 3, long and short."""
    values = np.array(_LONG, dtype=np.float32)
    return {**tensors, "rope_factors_long.weight": values, "rope_factors_short.weight": values}


def _sliding(count: int, period: int) -> list[bool]:
    return [(layer + 1) % period != 0 for layer in range(count)]


_STATE_KEYS = {"ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.group_count": 2, "ssm.time_step_rank": 4,
               "ssm.inner_size": 64, "full_attention_interval": 2, "rope.dimension_count": 4,
               "rope.dimension_sections": [2, 1, 1, 0]}  # fmt: skip
_EXPERT_KEYS = {"expert_feed_forward_length": 32}
_SHARED_KEYS = {**_EXPERT_KEYS, "expert_shared_feed_forward_length": 32}
_SCALES = {"attention.scale": 0.25, "embedding_scale": 2.0, "residual_scale": 0.5, "logit_scale": 8.0}
_GRANITE = {"logits_scaling": 8.0, "attention_multiplier": 0.25, "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5, "attention_bias": False}  # fmt: skip
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_GEMMA4_KEYS = {"attention.key_length": 32, "attention.value_length": 32, "attention.key_length_swa": 16,
                "attention.value_length_swa": 16, "rope.dimension_count": 32, "rope.dimension_count_swa": 16,
                "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4, "final_logit_softcapping": 30.0}  # fmt: skip
_SIGMOID_KEYS = {**_EXPERT_KEYS, "expert_gating_func": 2, "expert_shared_count": 1, "leading_dense_block_count": 1,
                 "expert_weights_scale": 1.5, "expert_weights_norm": True}  # fmt: skip
_LFM2_KEYS = {"attention.head_count_kv": [0, 2, 0, 2], "shortconv.l_cache": 3}
_LFM2_MOE = {"norm_eps": 1e-6, "conv_bias": False, "conv_L_cache": 3, "moe_intermediate_size": 32, "num_experts": 4,
             "num_experts_per_tok": 2, "norm_topk_prob": True, "num_dense_layers": 1, "use_expert_bias": True,
             "full_attn_idxs": [1, 3]}  # fmt: skip
_COHERE_KEYS = {"attention.layer_norm_epsilon": 1e-5, "attention.layer_norm_rms_epsilon": None, "logit_scale": 0.25}
_UNTIED = {"tie_word_embeddings": False}
_WINDOWS = {"attention.sliding_window": 24}

CASES: dict[str, Case] = {
    "llama": Case("llama", "llama", {"rope.dimension_count": 16}, stored=(in_pairs,), head_dim=False),
    "llama yarn": Case("llama", "llama", _YARN_KEYS, {"rope_scaling": _YARN}, (in_pairs,)),
    "llama llama3": Case("llama", "llama", {}, {"rope_scaling": _LLAMA3}, (in_pairs, llama3_factors)),
    "llama linear": Case("llama", "llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
                         {"rope_scaling": {"type": "linear", "factor": 4.0}, "tie_word_embeddings": False,
                          "attention_bias": True, "mlp_bias": True}, (in_pairs,)),
    "mixtral": Case("mixtral", "llama", {}, _EXPERTS, (in_pairs,)),
    "ministral3": Case(
        "ministral3", "mistral3",
        {**_YARN_KEYS, "rope.scaling.yarn_log_multiplier": 1.0, "attention.temperature_scale": 0.1,
         "attention.sliding_window": None},
        {"rope_parameters": {**_YARN, "rope_theta": 10000.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                             "llama_4_scaling_beta": 0.1}, "layer_types": None, "sliding_window": None}, (in_pairs,)),
    "mistral small": Case("llama", "mistral3", stored=(in_pairs,)),
    "qwen2": Case("qwen2", "qwen2", head_dim=False),
    "qwen2 moe": Case("qwen2_moe", "qwen2moe", _SHARED_KEYS),
    "qwen3": Case("qwen3", "qwen3"),
    "qwen3 moe": Case("qwen3_moe", "qwen3moe", _EXPERT_KEYS),
    "qwen3 next": Case("qwen3_next", "qwen3next", {**_STATE_KEYS, **_SHARED_KEYS},
                       stored=(states, queries_apart_from_gates)),
    "qwen3 next of old": Case("qwen3_next", "qwen3next", {**_STATE_KEYS, **_SHARED_KEYS}, stored=(states,)),
    "qwen3.5": Case("qwen3_5", "qwen35", _STATE_KEYS, stored=(states, value_heads_apart)),
    "qwen3.5 moe": Case("qwen3_5_moe", "qwen35moe", {**_STATE_KEYS, **_SHARED_KEYS, "feed_forward_length": None},
                        stored=(states, value_heads_apart)),
    "gemma": Case("gemma", "gemma", stored=(norms_from_one,)),
    "gemma2": Case("gemma2", "gemma2", {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, **_WINDOWS},
                   stored=(norms_from_one,)),
    "gemma3": Case("gemma3_text", "gemma3", {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
                   {"num_hidden_layers": 7, "sliding_window_pattern": 6,
                    "rope_scaling": {"type": "linear", "factor": 8.0}}, (norms_from_one,)),
    "gemma4": Case("gemma4_text", "gemma4",
                   {**_GEMMA4_KEYS, "attention.shared_kv_layers": 3, "embedding_length_per_layer_input": 8,
                    "attention.sliding_window_pattern": _sliding(6, 3),
                    "feed_forward_length": [96, 96, 96, 192, 192, 192]}, {"num_kv_shared_layers": 3},
                   (rotated_quarter,)),
    "gemma4 moe": Case("gemma4_text moe", "gemma4",
                       {**_GEMMA4_KEYS, **_EXPERT_KEYS, "attention.shared_kv_layers": 0, "expert_used_count": 2,
                        "embedding_length_per_layer_input": 0,
                        "attention.head_count_kv": [2, 1, 2, 1], "attention.sliding_window_pattern": _sliding(4, 2)},
                       stored=(gemma4_experts, rotated_quarter)),
    "gpt-oss": Case("gpt_oss", "gpt-oss", {**_YARN_KEYS, "expert_feed_forward_length": 96},
                    {"rope_scaling": {**_YARN, "truncate": False}}),
    "phi3": Case("phi3", "phi3", {"rope.scaling.original_context_length": 4096, "attention.sliding_window": 2047}),
    "phi3 longrope": Case(
        "phi3", "phi3", {"rope.scaling.original_context_length": 1024, "rope.scaling.attn_factor": (1.2) ** 0.5},
        {"original_max_position_embeddings": 1024,
         "rope_scaling": {"type": "longrope", "long_factor": _LONG, "short_factor": _LONG}}, (long_factors,)),
    "granite": Case("granite", "granite", _SCALES, stored=(in_pairs,), head_dim=False),
    "granite moe": Case("granitemoe", "granitemoe", _SCALES, {**_GRANITE, **_EXPERTS}, (in_pairs,), head_dim=False),
    "granite hybrid": Case(
        "granitemoehybrid", "granitehybrid",
        {**_SCALES, "logit_scale": 2.0, "attention.head_count_kv": [0, 2, 0, 2],
         "expert_shared_feed_forward_length": 48, "ssm.conv_kernel": 4, "ssm.state_size": 16,
         "ssm.group_count": 1, "ssm.time_step_rank": 8,
         "ssm.inner_size": 128, "rope.scaling.finetuned": False},
        {"position_embedding_type": "nope", "time_step_limit": [0.0, 1e9]}, (in_pairs, states, mamba_columns)),
    "granite hybrid dense": Case(
        "granitemoehybrid", "granitehybrid",
        {**_SCALES, "logit_scale": 2.0, "attention.head_count_kv": [0, 2, 0, 2], "expert_count": 0,
         "expert_used_count": 0, "expert_shared_feed_forward_length": 96, "ssm.conv_kernel": 4, "ssm.state_size": 16,
         "ssm.group_count": 1, "ssm.time_step_rank": 8, "ssm.inner_size": 128, "rope.scaling.finetuned": False},
        {"position_embedding_type": "nope", "time_step_limit": [0.0, 1e9], "num_local_experts": None,
         "num_experts_per_tok": None, "shared_intermediate_size": 96}, (in_pairs, states, mamba_columns)),
    "deepseek 3": Case(
        "deepseek_v3", "deepseek2",
        {**_SIGMOID_KEYS, **_YARN_KEYS, "rope.scaling.yarn_log_multiplier": 0.1, "attention.head_count_kv": 1,
         "attention.q_lora_rank": 48, "attention.kv_lora_rank": 32, "attention.key_length": 40,
         "attention.value_length": 32, "attention.key_length_mla": 24, "attention.value_length_mla": 16,
         "rope.dimension_count": 8},
        {"routed_scaling_factor": 1.5, "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    "glm4": Case("glm4", "glm4", {"rope.dimension_count": 8}, {"attention_bias": True, "partial_rotary_factor": 0.5}),
    "glm4 moe": Case("glm4_moe", "glm4moe", {**_SIGMOID_KEYS, "rope.dimension_count": 8},
                     {"routed_scaling_factor": 1.5}),
    "minimax m2": Case("minimax", "minimax-m2",
                       {"expert_feed_forward_length": 96, "expert_gating_func": 2, "rope.dimension_count": 8},
                       {**_EXPERTS, **_UNTIED, "shared_intermediate_size": 0, "rotary_dim": 8}),
    "ernie 4.5": Case("ernie4_5", "ernie4_5", {}, {"use_bias": False}),
    "olmo2": Case("olmo2", "olmo2", {}, _UNTIED),
    "olmo3": Case("olmo3", "olmo2", {"attention.sliding_window_pattern": _sliding(4, 4)}, _UNTIED),
    "olmoe": Case("olmoe", "olmoe", {},
                  {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4, **_UNTIED}),
    "smollm3": Case("smollm3", "smollm3", stored=(in_pairs,)),
    "seed oss": Case("seed_oss", "seed_oss", {}, {"attention_bias": True}),
    "lfm2": Case("lfm2", "lfm2", {**_LFM2_KEYS, "feed_forward_length": 64}, {"norm_eps": 1e-6}, (states,)),
    "lfm2 moe": Case("lfm2_moe", "lfm2moe",
                     {**_LFM2_KEYS, **_EXPERT_KEYS, "expert_gating_func": 2, "leading_dense_block_count": 1},
                     _LFM2_MOE, (states,)),
    "starcoder2": Case("starcoder2", "starcoder2",
                       {"attention.layer_norm_epsilon": 1e-5, "attention.layer_norm_rms_epsilon": None}),
    "command r": Case("cohere", "command-r", _COHERE_KEYS, {"logit_scale": 0.25}),
    "cohere2": Case("cohere2", "cohere2", {**_COHERE_KEYS, **_WINDOWS}, {"logit_scale": 0.25, "sliding_window": 24}),
    "exaone4": Case("exaone4", "exaone4", {}, {"sliding_window_pattern": "LLLG"}),
    "exaone4 small": Case("exaone4", "exaone4", {},
                          {"sliding_window": None, "sliding_window_pattern": None, "rope_scaling": _LLAMA3},
                          (llama3_factors,)),
}  # fmt: skip
"""By what they are, in a few words."""


ANSWERS: dict[str, str] = {
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q1_0", "TQ2_0", "MXFP4", "NVFP4"), "stays packed"),
    **dict.fromkeys(("F64", "F32", "F16", "BF16", "I8", "I16", "I32", "I64"), "converted"),
    **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "IQ4_NL", "IQ4_XS"), "dequantized"),
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), "dequantized"),
    **dict.fromkeys(("Q8_1", "Q8_K"), "refused"),
}
"""For each type of the installed gguf: a newer one's new type has to find its answer here."""


def answer_of(kind: Type) -> str:
    """What becomes of tensors of a type."""
    return ANSWERS.get(kind.name, "refused")
