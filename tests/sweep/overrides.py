"""What a model file's ``ModelArgs`` does not tell by names and types: values that belong together."""

from typing import Any

_TYPES = ["sliding_attention", "full_attention"] * 2
_ROPE = {"rope_type": "default", "type": "default", "rope_theta": 10000.0}
_ROPES = {"sliding_attention": _ROPE, "full_attention": _ROPE}
_LINEAR = {"kda_layers": [1, 3], "full_attn_layers": [2, 4], "num_heads": 4, "head_dim": 16,
           "short_conv_kernel_size": 4}  # fmt: skip
_ATTENTION = {"n_heads_in_group": 2}
_LFM2 = {"full_attn_idxs": [1, 3], "block_multiple_of": 32, "block_ff_dim": 96}
_LLAMA4_ROPE = {"rope_theta": 10000.0, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 4096}

OVERRIDES: dict[str, dict[str, Any]] = {
    "afmoe": {"layer_types": _TYPES},
    "baichuan_m1": {"sliding_window_layers": [0, 2], "conv_window": 2},
    "dbrx": {"ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
             "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "deepseek_v2": {"rope_scaling": {"type": "yarn", "factor": 1.0, "mscale_all_dim": 0,
                                     "original_max_position_embeddings": 4096}},
    "exaone4": {"rope_scaling": {"rope_type": "default"}, "sliding_window_pattern": "LG"},
    "exaone_moe": {"layer_types": _TYPES, "is_moe_layer": [False, True] * 2},
    "falcon_h1": {"mamba_d_head": 16, "mamba_d_ssm": 128, "mamba_n_heads": 8},
    "gear": {"layer_types": _TYPES},
    "gemma3n": {"layer_types": [*_TYPES, "sliding_attention", "full_attention"], "num_hidden_layers": 6,
                "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 6, "laurel_rank": 16,
                "hidden_size_per_layer_input": 8, "altup_num_inputs": 2, "altup_active_idx": 0,
                "altup_coef_clip": 120.0},
    "gemma4_text": {"num_hidden_layers": 6, "num_key_value_heads": 1, "global_head_dim": 32, "num_kv_shared_layers": 2,
                    "hidden_size_per_layer_input": 8, "sliding_window_pattern": 3},
    "glm_moe_dsa": {"rope_parameters": _ROPE, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_d_conv": 4, "mamba_d_state": 16,
                         "mamba_n_groups": 1, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_conv_bias": True,
                         "mamba_proj_bias": False, "num_local_experts": 4, "num_experts_per_tok": 2,
                         "shared_intermediate_size": 48},
    "hunyuan": {"rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"}, "use_cla": True,
                "num_shared_expert": 1, "moe_topk": 2, "cla_share_factor": 2},
    "kimi_k3": {"linear_attn_config": _LINEAR, "kv_lora_rank": 32, "activation_situ_beta": 1.0},
    "kimi_linear": {"linear_attn_config": _LINEAR},
    "laguna": {"layer_types": _TYPES},
    "lfm2": _LFM2,
    "lfm2_moe": _LFM2,
    "llama4": {"num_experts_per_tok": 1, "interleave_moe_layer_step": 2},
    "llama4_text": {"no_rope_layers": [1, 1, 1, 0]},
    "longcat_flash": {"attention_method": "MLA", "zero_expert_type": "identity", "mla_scale_q_lora": True,
                      "mla_scale_kv_lora": True},
    "longcat_flash_ngram": {"zero_expert_type": "identity", "mla_scale_q_lora": True, "mla_scale_kv_lora": True},
    "mamba2": {"num_heads": 8, "head_dim": 16, "time_step_limit": [0.0, 1e9], "time_step_rank": "auto"},
    "mellum": {"layer_types": _TYPES, "rope_parameters": _ROPES},
    "mimo_v2_flash": {"hybrid_layer_pattern": [0, 1, 0, 1], "moe_layer_freq": [0, 1, 0, 1],
                      "partial_rotary_factor": 0.5, "n_group": 1, "topk_method": "noaux_tc",
                      "scoring_func": "sigmoid"},
    "minicpm3": {"dim_model_base": 64, "scale_depth": 1.4, "rope_scaling": {
        "type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4,
        "original_max_position_embeddings": 4096}},
    "ministral3": {"rope_parameters": _LLAMA4_ROPE},
    "mistral3": {"text_config": {"model_type": "ministral3", "rope_parameters": _LLAMA4_ROPE}},
    "mistral4": {"rope_parameters": {**_LLAMA4_ROPE, "type": "yarn", "factor": 1.0, "mscale_all_dim": 1.0}},
    "muse_glimmer": {"layer_types": _TYPES, "layer_rope_theta": [10000.0, 0] * 2, "rope_parameters": _ROPE},
    "muse_spark": {"layer_types": _TYPES, "layer_rope_theta": [10000.0, 0] * 2, "rope_parameters": _ROPE,
                   "num_shared_experts": 0, "mlp_layer_types": None, "moe_hidden_size": 32},
    "nemotron-nas": {"block_configs": [{"attention": _ATTENTION, "ffn": {"ffn_mult": 1.0}}] * 4},
    "nemotron_h": {"hybrid_override_pattern": ["M", "*", "-", "M"], "layer_norm_epsilon": 1e-5,
                   "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1},
    "openelm": {"num_query_heads": [4] * 4, "num_kv_heads": [2] * 4, "ffn_multipliers": [1.0] * 4,
                "ffn_dim_divisor": 8},
    "phi3small": {"vocab_size": 100352},
    "plamo": {"n_shared_head": 2},
    "qwen3": {"rope_theta": 10000.0},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "spark2_5": {"rope_parameters": _ROPES},
}  # fmt: skip
"""Model file -> entries. Of a model with a ``text_config``, what is known of its text model enters by itself.

phi3small writes to the ids of its own dummy tokens: with a smaller vocabulary that is outside its logits.
"""
