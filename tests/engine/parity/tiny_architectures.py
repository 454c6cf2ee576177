"""Tiny random models of mlx-lm's architectures: a configuration each, weights made on the spot."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes

VOCAB = 199
_BASE: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-6, "vocab_size": VOCAB,
    "max_position_embeddings": 4096, "rope_theta": 10000.0, "tie_word_embeddings": True,
}  # fmt: skip
_GDN = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4, "full_attention_interval": 2,
}  # fmt: skip
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1,
        "norm_topk_prob": True, "mlp_only_layers": []}  # fmt: skip
_ROPE = {"rope_type": "default", "type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25,
         "mrope_section": [2, 1, 1]}  # fmt: skip
_GEMMA = {"rms_norm_eps": 1e-6, "query_pre_attn_scalar": 16, "sliding_window": 24}
_GEMMA4 = {"num_key_value_heads": 2, "global_head_dim": 32, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
           "sliding_window": 24, "sliding_window_pattern": 2}  # fmt: skip
_SLIDING_FULL = ["sliding_attention", "full_attention"] * 2
_MINISTRAL = {"rope_theta": 10000.0, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 4096}
_MLA = {"kv_lora_rank": 32, "q_lora_rank": 48, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}

_YARN = {"type": "yarn", "factor": 1.0, "mscale_all_dim": 0, "original_max_position_embeddings": 4096}
_MAMBA = {"mamba_d_conv": 4, "mamba_d_state": 16, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_conv_bias": True,
          "mamba_proj_bias": False}  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {}, "qwen": {"num_key_value_heads": 4, "kv_channels": 16, "intermediate_size": 192},
    "ministral3": {"rope_parameters": _MINISTRAL, "layer_types": _SLIDING_FULL, "sliding_window": 24},
    "mistral3": {"text_config": {"model_type": "ministral3", **_BASE, "rope_parameters": _MINISTRAL}},
    "qwen2": {}, "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 32},
    "qwen3": {}, "qwen3_moe": {**_MOE},
    "qwen3_next": {**_GDN, **_MOE, "shared_expert_intermediate_size": 32, "partial_rotary_factor": 0.25},
    "qwen3_5": {"text_config": {"model_type": "qwen3_5_text", **_BASE, **_GDN, "rope_parameters": _ROPE}},
    "qwen3_5_moe": {"text_config": {"model_type": "qwen3_5_moe_text", **_BASE, **_GDN, **_MOE,
                                    "shared_expert_intermediate_size": 32, "rope_parameters": _ROPE}},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0,
               "final_logit_softcapping": 30.0},
    "gemma3_text": {**_GEMMA, "sliding_window_pattern": 2, "rope_local_base_freq": 10000.0},
    "gemma4_text": {"num_hidden_layers": 6, "num_key_value_heads": 1, "global_head_dim": 32, "num_kv_shared_layers": 2,
                    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "sliding_window": 24,
                    "sliding_window_pattern": 3},
    "gemma4_text dense": {**_GEMMA4},
    "gemma4_text k_eq_v": {**_GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "gemma4_text moe": {**_GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
                        "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "gemma3n": {"text_config": {"model_type": "gemma3n_text", **_BASE, "num_hidden_layers": 6,
                                "layer_types": [*_SLIDING_FULL, *_SLIDING_FULL[:2]], "num_kv_shared_layers": 2,
                                "sliding_window": 24, "rope_local_base_freq": 10000.0,
                                "vocab_size_per_layer_input": VOCAB, "final_logit_softcapping": 30.0,
                                "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0, 0.0], "laurel_rank": 16,
                                "hidden_size_per_layer_input": 8, "altup_num_inputs": 2, "altup_active_idx": 0,
                                "altup_coef_clip": 120.0, "altup_correct_scale": True}},
    "llama4": {"text_config": {**_BASE, "attention_chunk_size": 24, "interleave_moe_layer_step": 2,
                               "intermediate_size_mlp": 96, "num_local_experts": 4, "num_experts_per_tok": 1,
                               "attention_bias": False, "use_qk_norm": True, "rope_scaling": None,
                               "model_type": "llama4_text"}},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 24,
                "layer_types": _SLIDING_FULL, "rope_scaling": None},
    "phi3": {}, "smollm3": {"no_rope_layer_interval": 4}, "olmo3": {"sliding_window": 24},
    "granite": {"logits_scaling": 8.0, "attention_multiplier": 0.25, "embedding_multiplier": 2.0,
                "residual_multiplier": 0.5, "attention_bias": False, "mlp_bias": False},
    "deepseek_v2": {**_MLA, "rope_scaling": _YARN,
                    "moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1,
                    "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v3": {**_MLA, "moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1,
                    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "deepseek_v32": {**_MLA, "moe_intermediate_size": 32, "n_routed_experts": 4, "n_shared_experts": 1,
                     "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
                     "index_topk": 16, "index_n_heads": 4, "index_head_dim": 16},
    "minicpm3": {**_MLA, "dim_model_base": 64, "scale_depth": 1.4, "scale_emb": 12,
                 "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4,
                                  "original_max_position_embeddings": 4096}},
    "lfm2": {"norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "block_dim": 64, "block_multiple_of": 32,
             "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": True, "block_ff_dim": 96,
             "full_attn_idxs": [1, 3]},
    "granitemoehybrid": {**_MAMBA, "mamba_n_heads": 8, "mamba_d_head": 16, "attention_bias": False,
                         "embedding_multiplier": 2.0, "attention_multiplier": 0.25, "logits_scaling": 2.0,
                         "residual_multiplier": 0.5, "num_local_experts": 4, "num_experts_per_tok": 2,
                         "shared_intermediate_size": 48, "layer_types": ["mamba", "attention"] * 2},
    "exaone4": {"rope_scaling": {"rope_type": "default"}, "sliding_window": 24, "sliding_window_pattern": "LG"},
    "glm4_moe": {**_MOE, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "n_routed_experts": 4,
                 "routed_scaling_factor": 1.0, "first_k_dense_replace": 1, "rope_scaling": None, "use_qk_norm": True,
                 "attention_bias": False, "partial_rotary_factor": 0.5},
    "falcon_h1": {**_MAMBA, "mamba_d_head": 16, "mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_chunk_size": 16},
    "nemotron_h": {"attention_bias": False, "mamba_num_heads": 8, "mamba_head_dim": 16, "mamba_proj_bias": False,
                   "ssm_state_size": 16, "conv_kernel": 4, "n_groups": 1, "mlp_bias": False,
                   "layer_norm_epsilon": 1e-5, "use_bias": False, "use_conv_bias": True,
                   "hybrid_override_pattern": ["M", "*", "-", "M"]},
    "jamba": {**_MAMBA, "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1,
              "expert_layer_period": 2, "num_experts": 4, "num_experts_per_tok": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "intermediate_size": 128, "state_size": 16, "num_hidden_layers": 2,
               "layer_norm_epsilon": 1e-5, "conv_kernel": 4, "n_groups": 1, "use_bias": False, "use_conv_bias": True,
               "time_step_limit": [0.0, 1e9], "time_step_rank": "auto"},
}  # fmt: skip
"""Model type (and a variant's name) -> entries over the common ones."""


def config_of(name: str) -> dict[str, Any]:
    """``config.json`` of a configuration above."""
    return {"model_type": name.split()[0], **_BASE, **CONFIGS[name]}


def tiny_model(name: str, seed: int = 0) -> Any:
    """The model of a configuration above."""
    return build(config_of(name), seed)


def build(config: dict[str, Any], seed: int = 0, limit: int = 1 << 25) -> Any:
    """mlx-lm's model of ``config`` with seeded float32 weights, large enough that greedy text varies.

    At most ``limit`` parameters: a size that the configuration leaves out is a real model's.
    """
    kind, arguments = _get_classes(dict(config))
    model = kind(arguments.from_dict(config))
    size = sum(value.size for _, value in tree_flatten(model.parameters()))
    if size > limit:
        raise ValueError(f"no tiny configuration: it has {size:,} parameters")
    key, weights = mx.random.key(seed), []
    for path, value in sorted(tree_flatten(model.parameters())):
        key, mine = mx.random.split(key)
        if not mx.issubdtype(value.dtype, mx.floating):
            weights.append((path, value))
            continue
        scale, shift = (0.1, 1.0) if "norm" in path and value.ndim == 1 else (0.2, 0.0)
        weights.append((path, shift + scale * mx.random.normal(value.shape, key=mine)))
    model.update(tree_unflatten(weights))
    model.eval()
    mx.eval(model.parameters())
    return model
