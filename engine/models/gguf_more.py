"""Entries of ``config.json`` that take more than one key of a GGUF file's metadata, a function for each family."""

from typing import Any

from engine.models.gguf_fields import Fields
from engine.models.gguf_rope import ALL_SCALINGS, FREQUENCY_FACTORS, rope_scaling

Words = dict[str, Any]
_GEMMA2_27B_LAYERS = 46
_GEMMA3_27B_HIDDEN_SIZE = 5376
_GLM47_FLASH_LAYERS, _GLM47_FLASH_VOCAB_SIZE = (47, 48), 154880
"""Of files from before they said how experts are chosen."""
_SMALL_ROPE_BASE = 10000.0
_UNROTATED = 1e29
"""From this factor on a frequency of Gemma 4's full layers stands for none."""
_SOFTMAX, _SIGMOID = 1, 2


def experts(fields: Fields, _config: Words) -> Words:
    """Of layers that are all experts, chosen by a softmax over them."""
    fields.expect("expert_gating_func", _SOFTMAX)
    for key in ("expert_group_count", "expert_group_used_count"):
        fields.expect(key, 1)
    size = fields.get("expert_feed_forward_length") or fields.get("feed_forward_length")
    return {
        "intermediate_size": fields.get("feed_forward_length", size),
        "moe_intermediate_size": size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": fields.file.architecture != "olmoe",
    }


def shared_experts(fields: Fields, config: Words) -> Words:
    """Of layers with an expert for every token besides."""
    size = fields.get("expert_shared_feed_forward_length") or fields.rows("blk.0.ffn_gate_shexp.weight")
    return experts(fields, config) | {"shared_expert_intermediate_size": size}


def qwen3_next(fields: Fields, config: Words) -> Words:
    """Linear attention in all layers but every fourth, experts in all."""
    return shared_experts(fields, config) | _linear_attention(fields)


def qwen3_5(fields: Fields, config: Words) -> Words:
    """As Qwen3-Next, with or without experts."""
    scaling = rope_scaling(fields, config, frozenset(("linear", "yarn"))) or {"type": "default"}
    rope = {"rope_theta": config["rope_theta"], "partial_rotary_factor": config["partial_rotary_factor"]}
    more = shared_experts(fields, config) if fields.get("expert_count") else {}
    return more | _linear_attention(fields) | {"rope_parameters": scaling | rope}


def _linear_attention(fields: Fields) -> Words:
    heads = fields.need("ssm.time_step_rank")
    return {
        "linear_num_value_heads": heads,
        "linear_num_key_heads": fields.need("ssm.group_count"),
        "linear_key_head_dim": fields.need("ssm.state_size"),
        "linear_value_head_dim": fields.need("ssm.inner_size") // heads,
        "linear_conv_kernel_dim": fields.need("ssm.conv_kernel"),
        "full_attention_interval": fields.get("full_attention_interval", 4),
    }


def deepseek3(fields: Fields, config: Words) -> Words:
    """Latent attention; experts chosen by a sigmoid and a bias, in groups."""
    flash = config["num_hidden_layers"] in _GLM47_FLASH_LAYERS and config["vocab_size"] == _GLM47_FLASH_VOCAB_SIZE
    if fields.get("expert_gating_func", _SIGMOID if flash else _SOFTMAX) != _SIGMOID:
        raise fields.error("architecture 'deepseek2' with a softmax over experts (DeepSeek 2) is not supported")
    dims = fields.need("attention.key_length_mla"), fields.need("rope.dimension_count")
    fields.expect("attention.key_length", fields.need("attention.kv_lora_rank") + dims[1])
    fields.expect("attention.value_length", fields.need("attention.kv_lora_rank"))
    scaling = rope_scaling(fields, config, frozenset(("yarn",)))
    if scaling is not None:
        share = fields.get("rope.scaling.yarn_log_multiplier", 0.0) / 0.1
        scaling |= {"mscale": share or 1.0, "mscale_all_dim": share}
    return _sigmoid_experts(fields) | {
        "num_key_value_heads": config["num_attention_heads"],
        "q_lora_rank": fields.get("attention.q_lora_rank"),
        "kv_lora_rank": fields.need("attention.kv_lora_rank"),
        "qk_rope_head_dim": dims[1],
        "qk_nope_head_dim": dims[0] - dims[1],
        "v_head_dim": fields.need("attention.value_length_mla"),
        "rope_scaling": scaling,
    }


def glm4_moe(fields: Fields, config: Words) -> Words:
    """As GLM 4, with experts chosen by a sigmoid and a bias."""
    return _sigmoid_experts(fields) | {
        "use_qk_norm": "blk.0.attn_q_norm.weight" in fields.file.tensors,
        "rope_scaling": rope_scaling(fields, config, ALL_SCALINGS),
    }


def ernie4_5(fields: Fields, _config: Words) -> Words:
    """One word for all biases."""
    return {"use_bias": "blk.0.attn_q.bias" in fields.file.tensors}


def minimax(fields: Fields, config: Words) -> Words:
    """As Mixtral, with experts chosen by a sigmoid and a bias, and a part of each head that rotates."""
    fields.expect("expert_gating_func", _SIGMOID)
    size = fields.need("expert_feed_forward_length")
    return {
        "intermediate_size": size,
        "moe_intermediate_size": size,
        "shared_intermediate_size": 0,
        "rotary_dim": round(config["partial_rotary_factor"] * config["head_dim"]),
        "use_qk_norm": "blk.0.attn_q_norm.weight" in fields.file.tensors,
    }


def _sigmoid_experts(fields: Fields) -> Words:
    fields.expect("expert_gating_func", _SIGMOID)
    return {
        "moe_intermediate_size": fields.need("expert_feed_forward_length"),
        "n_routed_experts": fields.need("expert_count"),
        "num_experts_per_tok": fields.need("expert_used_count"),
        "n_shared_experts": fields.get("expert_shared_count"),
        "first_k_dense_replace": fields.get("leading_dense_block_count", 0),
        "routed_scaling_factor": fields.get("expert_weights_scale", 1.0),
        "norm_topk_prob": bool(fields.get("expert_weights_norm", False)),
        "n_group": fields.get("expert_group_count", 1),
        "topk_group": fields.get("expert_group_used_count", 1),
    }


def gemma2(fields: Fields, config: Words) -> Words:
    """Its windows are not computed by mlx-lm, and its scale of attention is not in the file."""
    fields.get("attention.sliding_window")
    wide = config["num_hidden_layers"] == _GEMMA2_27B_LAYERS
    return {
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"] if wide else config["head_dim"],
        "attn_logit_softcapping": fields.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": fields.get("final_logit_softcapping", 30.0),
    }


def gemma3(fields: Fields, config: Words) -> Words:
    """Its pattern of windows and their RoPE base are mostly constants of the architecture."""
    wide = config["hidden_size"] == _GEMMA3_27B_HIDDEN_SIZE
    return {
        "sliding_window": fields.need("attention.sliding_window"),
        "sliding_window_pattern": _period(fields, config, 6),
        "rope_local_base_freq": fields.get("rope.freq_base_swa", _SMALL_ROPE_BASE),
        "query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"] if wide else config["head_dim"],
    }


def gemma4(fields: Fields, config: Words) -> Words:
    """Two sizes of heads, layers that share keys and values, inputs of each layer, experts."""
    layer_types = _layer_types(fields, config, 6)
    shared = fields.get("attention.shared_kv_layers", 0)
    return {
        "layer_types": layer_types,
        "sliding_window": fields.need("attention.sliding_window"),
        "num_kv_shared_layers": shared,
        "final_logit_softcapping": fields.get("final_logit_softcapping", 30.0),
        "hidden_size_per_layer_input": fields.get("embedding_length_per_layer_input", 0),
        "vocab_size_per_layer_input": fields.rows("per_layer_token_embd.weight") or config["vocab_size"],
        **_gemma4_heads(fields, config, layer_types, shared),
        **_gemma4_feed_forward(fields, config, shared),
    }


def _gemma4_heads(fields: Fields, config: Words, layer_types: list[str], shared: int) -> Words:
    full, sliding = config["head_dim"], fields.need("attention.key_length_swa")
    fields.expect("attention.value_length_swa", sliding)
    fields.expect("rope.dimension_count_swa", sliding)
    counts = fields.layers("attention.head_count_kv", config["num_hidden_layers"])
    kinds = {kind: {n for n, one in zip(counts, layer_types, strict=True) if one == kind} for kind in set(layer_types)}
    if any(len(numbers) > 1 for numbers in kinds.values()):
        raise fields.error(f"{fields.name('attention.head_count_kv')} differs between layers of one kind")
    by_kind = {kind: numbers.pop() for kind, numbers in kinds.items()}
    own = [i for i, kind in enumerate(layer_types[: len(layer_types) - shared]) if kind == "full_attention"]
    without = [i for i in own if f"blk.{i}.attn_v.weight" not in fields.file.tensors]
    if without and without != own:
        raise fields.error("some of its full layers have no attn_v, some have one")
    few, many = by_kind.get("full_attention"), by_kind.get("sliding_attention", config["num_key_value_heads"])
    if not without and few not in (None, many):
        raise fields.error(f"{fields.name('attention.head_count_kv')} differs between layers with attn_v")
    rope: Words = {"rope_type": "proportional", "partial_rotary_factor": _rotated_share(fields)}
    local = {"rope_type": "default", "rope_theta": fields.get("rope.freq_base_swa", _SMALL_ROPE_BASE)}
    return {
        "head_dim": sliding,
        "global_head_dim": full,
        "num_key_value_heads": many,
        "num_global_key_value_heads": few if without else None,
        "attention_k_eq_v": bool(without),
        "rope_parameters": {
            "full_attention": rope | {"rope_theta": config["rope_theta"]},
            "sliding_attention": local,
        },
    }


def _rotated_share(fields: Fields) -> float:
    """How much of a full layer's head rotates: the file has it as factors of 1, then of 1e30."""
    if FREQUENCY_FACTORS not in fields.file.tensors:
        return 1.0
    factors = fields.file.values(FREQUENCY_FACTORS)
    rotated = int((factors == 1.0).sum())
    if not ((factors[:rotated] == 1.0).all() and (factors[rotated:] > _UNROTATED).all()):
        raise fields.error(f"{FREQUENCY_FACTORS} are not of a part of the head that rotates")
    return rotated / len(factors)


def _gemma4_feed_forward(fields: Fields, config: Words, shared: int) -> Words:
    count = config["num_hidden_layers"]
    sizes = fields.layers("feed_forward_length", count)
    first = sizes[0]
    double = [first if layer < count - shared else 2 * first for layer in range(count)]
    if sizes not in ([first] * count, double):
        raise fields.error(f"{fields.name('feed_forward_length')} differs between layers")
    num_experts = fields.get("expert_count", 0)
    words = {"intermediate_size": first, "use_double_wide_mlp": bool(shared) and sizes == double}
    if not num_experts:
        return words
    return words | {
        "enable_moe_block": True,
        "num_experts": num_experts,
        "top_k_experts": fields.need("expert_used_count"),
        "moe_intermediate_size": fields.need("expert_feed_forward_length"),
    }


def gpt_oss(fields: Fields, config: Words) -> Words:
    """Windows in every other layer; the size of an expert is its own. Its yarn rounds no bounds, as it was trained."""
    scaling = rope_scaling(fields, config, frozenset(("linear", "yarn")))
    size = fields.need("expert_feed_forward_length")
    fields.expect("expert_gating_func", _SOFTMAX)
    return {
        "intermediate_size": size,
        "moe_intermediate_size": size,
        "sliding_window": fields.need("attention.sliding_window"),
        "layer_types": _layer_types(fields, config, 2),
        "rope_scaling": None if scaling is None else {**scaling, "truncate": False},
    }


def phi3(fields: Fields, config: Words) -> Words:
    """Windows are not computed by mlx-lm."""
    fields.get("attention.sliding_window")
    original = fields.get("rope.scaling.original_context_length", config["max_position_embeddings"])
    return {"original_max_position_embeddings": original}


def granite(fields: Fields, config: Words) -> Words:
    """Scales everywhere, and experts."""
    words = {
        "logits_scaling": fields.need("logit_scale"),
        "attention_multiplier": fields.get("attention.scale", config["head_dim"] ** -0.5),
        "embedding_multiplier": fields.get("embedding_scale", 1.0),
        "residual_multiplier": fields.get("residual_scale", 1.0),
    }
    return words | (experts(fields, config) if fields.get("expert_count") else {})


def ministral3(fields: Fields, config: Words) -> Words:
    """Queries grow with the position, in steps of the length before scaling."""
    rope = rope_scaling(fields, config, frozenset(("yarn",)))
    if rope is None:
        raise fields.error(f"{fields.name('rope.scaling.factor')} is missing")
    fields.expect("attention.temperature_length", rope["original_max_position_embeddings"])
    multiplier = fields.get("rope.scaling.yarn_log_multiplier", 0.0)
    own = {
        "rope_theta": config["rope_theta"],
        "mscale": 1.0,
        "mscale_all_dim": multiplier,
        "llama_4_scaling_beta": fields.need("attention.temperature_scale"),
    }
    return {"rope_parameters": rope | own}


def olmo3(fields: Fields, config: Words) -> Words:
    """Windows in three of four layers."""
    fields.expect("rope.freq_base_swa", config["rope_theta"])
    window = fields.need("attention.sliding_window")
    return {"sliding_window": window, "layer_types": _layer_types(fields, config, 4)}


def lfm2(fields: Fields, config: Words) -> Words:
    """Convolutions where a layer has no keys."""
    counts = fields.layers("attention.head_count_kv", config["num_hidden_layers"])
    return {
        "norm_eps": config["rms_norm_eps"],
        "conv_bias": "blk.0.shortconv.conv.bias" in fields.file.tensors,
        "conv_L_cache": fields.need("shortconv.l_cache"),
        "full_attn_idxs": [layer for layer, count in enumerate(counts) if count],
        "block_dim": config["hidden_size"],
        "block_ff_dim": fields.need("feed_forward_length"),
        "block_auto_adjust_ff_dim": False,
        "block_multiple_of": 1,
        "block_ffn_dim_multiplier": 1.0,
    }


def lfm2_moe(fields: Fields, config: Words) -> Words:
    """As LFM2, with experts chosen by a sigmoid and a bias after the first layers."""
    fields.expect("expert_gating_func", _SIGMOID)
    return lfm2(fields, config) | {
        "moe_intermediate_size": fields.need("expert_feed_forward_length"),
        "num_experts": fields.need("expert_count"),
        "num_experts_per_tok": fields.need("expert_used_count"),
        "num_dense_layers": fields.get("leading_dense_block_count", 0),
        "routed_scaling_factor": fields.get("expert_weights_scale", 1.0),
        "norm_topk_prob": True,
        "use_expert_bias": any(name.endswith("exp_probs_b.bias") for name in fields.file.tensors),
    }


def granite_hybrid(fields: Fields, config: Words) -> Words:
    """States where a layer has no keys; mostly without RoPE."""
    counts = fields.layers("attention.head_count_kv", config["num_hidden_layers"])
    heads, inner = fields.need("ssm.time_step_rank"), fields.need("ssm.inner_size")
    has_rope = fields.file.metadata.get(fields.name("rope.scaling.finetuned"), True)
    words = granite(fields, config) | {
        "layer_types": ["attention" if count else "mamba" for count in counts],
        "shared_intermediate_size": fields.get("expert_shared_feed_forward_length"),
        "num_local_experts": fields.get("expert_count") or None,
        "num_experts_per_tok": fields.get("expert_used_count") or None,
        "position_embedding_type": "rope" if has_rope else "nope",
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_d_state": fields.need("ssm.state_size"),
        "mamba_d_conv": fields.need("ssm.conv_kernel"),
        "mamba_n_groups": fields.need("ssm.group_count"),
        "mamba_conv_bias": any(name.endswith("ssm_conv1d.bias") for name in fields.file.tensors),
        "mamba_proj_bias": any(name.endswith("ssm_in.bias") for name in fields.file.tensors),
    }
    return {**words, "time_step_limit": [0.0, 1e9]}


def starcoder2(fields: Fields, _config: Words) -> Words:
    """Layer norms, not of the root mean square."""
    return {"norm_epsilon": fields.need("attention.layer_norm_epsilon")}


def cohere(fields: Fields, config: Words) -> Words:
    """Layer norms, one for attention and feed-forward; windows in three of four layers of the second version."""
    words = {
        "layer_norm_eps": fields.need("attention.layer_norm_epsilon"),
        "use_qk_norm": "blk.0.attn_q_norm.weight" in fields.file.tensors,
    }
    if (window := fields.get("attention.sliding_window")) is None:
        return words
    return words | {"sliding_window": window, "sliding_window_pattern": _period(fields, config, 4)}


def exaone4(fields: Fields, config: Words) -> Words:
    """Of the large one, windows in three of four layers."""
    window = fields.get("attention.sliding_window")
    period = _period(fields, config, 4)
    return {
        "sliding_window": window,
        "sliding_window_pattern": None if window is None else "L" * (period - 1) + "G",
        "rope_scaling": rope_scaling(fields, config, ALL_SCALINGS) or {"rope_type": "default"},
    }


def _layer_types(fields: Fields, config: Words, period: int) -> list[str]:
    """The kind of each layer: as the file says, or full attention in every ``period``-th."""
    count = config["num_hidden_layers"]
    key = "attention.sliding_window_pattern"
    said = fields.layers(key, count)
    if said and not isinstance(said[0], bool):
        period = int(said[0])
    sliding = said if said and isinstance(said[0], bool) else [(layer + 1) % period != 0 for layer in range(count)]
    return ["sliding_attention" if one else "full_attention" for one in sliding]


def _period(fields: Fields, config: Words, period: int) -> int:
    """After how many layers full attention comes again."""
    kinds = _layer_types(fields, config, period)
    if "full_attention" not in kinds:
        return max(period, len(kinds) + 1)
    found = kinds.index("full_attention") + 1
    if kinds != _every(found, len(kinds)):
        raise fields.error(f"{fields.name('attention.sliding_window_pattern')} is not a period")
    return found


def _every(period: int, count: int) -> list[str]:
    return ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(count)]
