"""GGUF's architectures as mlx-lm's models: to add one, add its line to :data:`ARCHITECTURES`.

A line says what differs from :data:`COMMON`: the names of its tensors, the entries of ``config.json`` that are its own,
and what llama.cpp's converter changed. What a file says beyond that is refused when it is read.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.models.gguf_fields import Fields
from engine.models.gguf_more import (
    cohere,
    deepseek3,
    ernie4_5,
    exaone4,
    experts,
    gemma2,
    gemma3,
    gemma4,
    glm4_moe,
    gpt_oss,
    granite,
    granite_hybrid,
    lfm2,
    lfm2_moe,
    minimax,
    ministral3,
    olmo3,
    phi3,
    qwen3_5,
    qwen3_next,
    shared_experts,
    starcoder2,
)
from engine.models.gguf_parts import (
    Change,
    Names,
    Part,
    as_kernel,
    as_row,
    flat,
    gate_rows,
    heads_with_gates,
    key_and_value_heads,
    key_rows,
    log_of_negative,
    one_less,
    query_rows,
    up_rows,
    value_heads,
    value_rows,
    wide_value_heads,
)
from engine.models.gguf_rope import ALL_SCALINGS

COMMON: Names = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": (
        Part("self_attn.q_proj", query_rows),
        Part("self_attn.k_proj", key_rows),
        Part("self_attn.v_proj", value_rows),
    ),
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Names in most architectures. Those of a layer are without ``blk.N.`` and ``model.layers.N.``."""


_NO_SCALINGS: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Architecture:
    """How files of an architecture are mlx-lm's ``model_type``.

    ``names`` come over :data:`COMMON`; ``fields`` are entries of ``config.json`` that one key of the metadata gives,
    ``more`` makes the others. ``norms`` undoes what the converter did to norms; ``pairs``: it put the pairs that RoPE
    rotates side by side. ``rope_scalings`` are those of which it is known what they do: where some layers have windows,
    llama.cpp has rules of its own. ``root`` comes before all names.
    ``derives_head_dim``: its heads divide the hidden size; ``own_heads``: ``more`` checks the sizes of its heads.
    """

    model_type: str
    names: Names = field(default_factory=dict)
    fields: Mapping[str, str] = field(default_factory=dict)
    more: Callable[[Fields, dict[str, Any]], dict[str, Any]] | None = None
    norms: Change | None = None
    pairs: bool = False
    rope_scalings: frozenset[str] = ALL_SCALINGS
    partial_rotary: bool = False
    derives_head_dim: bool = False
    own_heads: bool = False
    root: str = ""


def _expert_names(module: str, router: str) -> Names:
    return {
        "ffn_gate_inp": router,
        "ffn_gate_exps": f"{module}.gate_proj",
        "ffn_up_exps": f"{module}.up_proj",
        "ffn_down_exps": f"{module}.down_proj",
        "ffn_gate_up_exps": (Part(f"{module}.gate_proj", gate_rows), Part(f"{module}.up_proj", up_rows)),
    }


_EXPERTS = _expert_names("mlp.switch_mlp", "mlp.gate")
_BLOCK_EXPERTS = _expert_names("block_sparse_moe.switch_mlp", "block_sparse_moe.gate")
_SHARED_EXPERT: Names = {
    "ffn_gate_inp_shexp": Part("mlp.shared_expert_gate", change=as_row),
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_NORMS_AFTER: Names = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA: Names = {**_NORMS_AFTER, "ffn_norm": "pre_feedforward_layernorm"}
_GEMMA4: Names = {
    **_GEMMA,
    **_expert_names("experts.switch_glu", "router.proj"),
    "ffn_gate_inp.scale": Part("router.scale"),
    "ffn_down_exps.scale": Part("router.per_expert_scale"),
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "layer_output_scale.weight": Part("layer_scalar"),
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}
_GPT_OSS: Names = {
    **_expert_names("mlp.experts", "mlp.router"),
    "post_attention_norm": "post_attention_layernorm",
    "attn_sinks.weight": Part("self_attn.sinks"),
}
_STATE_SPACE: Names = {
    "post_attention_norm": "post_attention_layernorm",
    "ssm_norm": "linear_attn.norm",
}
_QWEN3_NEXT: Names = {
    **_STATE_SPACE,
    **_EXPERTS,
    **_SHARED_EXPERT,
    "attn_qkv": Part("linear_attn.in_proj_qkvz", heads_with_gates, beside=("attn_gate",)),
    "ssm_in": "linear_attn.in_proj_qkvz",
    "ssm_ba": "linear_attn.in_proj_ba",
    "ssm_a": Part("linear_attn.A_log", change=log_of_negative),
    "ssm_dt.bias": Part("linear_attn.dt_bias"),
    "ssm_conv1d": Part("linear_attn.conv1d", change=as_kernel),
    "ssm_out": "linear_attn.out_proj",
}
_QWEN3_5: Names = {
    **_STATE_SPACE,
    "attn_qkv": Part("linear_attn.in_proj_qkv", key_and_value_heads),
    "attn_gate": Part("linear_attn.in_proj_z", wide_value_heads),
    "ssm_alpha": Part("linear_attn.in_proj_a", value_heads),
    "ssm_beta": Part("linear_attn.in_proj_b", value_heads),
    "ssm_a": Part("linear_attn.A_log", value_heads, change=log_of_negative),
    "ssm_dt.bias": Part("linear_attn.dt_bias", value_heads),
    "ssm_conv1d": Part("linear_attn.conv1d", key_and_value_heads, change=as_kernel),
    "ssm_out": Part("linear_attn.out_proj", columns=wide_value_heads),
}
_LFM2: Names = {
    "token_embd_norm": "model.embedding_norm",
    "attn_norm": "operator_norm",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "attn_output": "self_attn.out_proj",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
    "shortconv.conv": Part("conv.conv", change=as_kernel),
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
}
_PHI3: Names = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
_GLM4: Names = {
    "ffn_up": "mlp.gate_up_proj",
    "post_attention_norm": "post_self_attn_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
}
_SIGMOID_EXPERTS: Names = {
    **_EXPERTS,
    "exp_probs_b.bias": Part("mlp.gate.e_score_correction_bias"),
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
_DEEPSEEK3: Names = {
    **_SIGMOID_EXPERTS,
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_k_b": "self_attn.embed_q",
    "attn_v_b": "self_attn.unembed_out",
}
_LFM2_MOE: Names = {
    **_LFM2,
    **_expert_names("feed_forward.switch_mlp", "feed_forward.gate"),
    "ffn_gate": "feed_forward.gate_proj",
    "ffn_up": "feed_forward.up_proj",
    "ffn_down": "feed_forward.down_proj",
    "exp_probs_b.bias": Part("feed_forward.expert_bias"),
}
_GRANITE_MOE = _expert_names("block_sparse_moe.switch_mlp", "block_sparse_moe.router.layer")
_GRANITE_HYBRID: Names = {
    **_GRANITE_MOE,
    "ffn_gate_shexp": Part("shared_mlp.input_linear", beside=("ffn_up_shexp",)),
    "ffn_down_shexp": "shared_mlp.output_linear",
    "ssm_in": "mamba.in_proj",
    "ssm_conv1d.weight": Part("mamba.conv1d.weight", change=as_kernel),
    "ssm_conv1d.bias": Part("mamba.conv1d.bias"),
    "ssm_dt.bias": Part("mamba.dt_bias"),
    "ssm_a": Part("mamba.A_log", change=log_of_negative),
    "ssm_d": Part("mamba.D", change=flat),
    "ssm_norm": Part("mamba.norm", change=flat),
    "ssm_out": "mamba.out_proj",
}
_FEED_FORWARD_IS_EXPERTS = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
_NUM_EXPERTS = {"num_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
_LLAMA = Architecture("llama", pairs=True)
_MIXTRAL = Architecture("mixtral", _BLOCK_EXPERTS, _FEED_FORWARD_IS_EXPERTS, experts, pairs=True, derives_head_dim=True)
_MINISTRAL3 = Architecture("ministral3", more=ministral3, pairs=True, rope_scalings=_NO_SCALINGS)
_OLMO2 = Architecture("olmo2", _NORMS_AFTER)
_OLMO3 = Architecture("olmo3", _NORMS_AFTER, more=olmo3, rope_scalings=frozenset(("linear", "yarn")))


def _llama(fields: Fields) -> Architecture:
    """Mixtral is llama with experts."""
    return _MIXTRAL if fields.get("expert_count", 0) else _LLAMA


def _mistral3(fields: Fields) -> Architecture:
    """Mistral Small 3 is llama; Ministral 3 scales its queries with the position."""
    return _MINISTRAL3 if fields.get("attention.temperature_scale") else _llama(fields)


def _olmo2(fields: Fields) -> Architecture:
    """OLMo 3 is OLMo 2 with windows."""
    return _OLMO3 if fields.get("attention.sliding_window") else _OLMO2


ARCHITECTURES: Mapping[str, Architecture | Callable[[Fields], Architecture]] = {
    "llama": _llama,
    "mistral3": _mistral3,
    "qwen2": Architecture("qwen2"),
    "qwen2moe": Architecture("qwen2_moe", {**_EXPERTS, **_SHARED_EXPERT}, _NUM_EXPERTS, shared_experts),
    "qwen3": Architecture("qwen3"),
    "qwen3moe": Architecture("qwen3_moe", _EXPERTS, _NUM_EXPERTS, experts),
    "qwen3next": Architecture("qwen3_next", _QWEN3_NEXT, _NUM_EXPERTS, qwen3_next, partial_rotary=True),
    "qwen35": Architecture("qwen3_5", _QWEN3_5, more=qwen3_5, partial_rotary=True, root="language_model."),
    "qwen35moe": Architecture(
        "qwen3_5_moe",
        {**_QWEN3_5, **_EXPERTS, **_SHARED_EXPERT},
        _NUM_EXPERTS,
        qwen3_5,
        partial_rotary=True,
        root="language_model.",
    ),
    "gemma": Architecture("gemma", norms=one_less),
    "gemma2": Architecture("gemma2", _GEMMA, more=gemma2, norms=one_less, rope_scalings=_NO_SCALINGS),
    "gemma3": Architecture("gemma3_text", _GEMMA, more=gemma3, norms=one_less, rope_scalings=frozenset(("linear",))),
    "gemma4": Architecture("gemma4_text", _GEMMA4, more=gemma4, rope_scalings=_NO_SCALINGS),
    "gpt-oss": Architecture("gpt_oss", _GPT_OSS, _FEED_FORWARD_IS_EXPERTS, gpt_oss),
    "phi3": Architecture(
        "phi3",
        _PHI3,
        more=phi3,
        rope_scalings=frozenset(("linear", "longrope")),
        partial_rotary=True,
        derives_head_dim=True,
    ),
    "granite": Architecture("granite", more=granite, pairs=True, derives_head_dim=True),
    "granitemoe": Architecture(
        "granitemoe",
        _GRANITE_MOE,
        _FEED_FORWARD_IS_EXPERTS,
        granite,
        pairs=True,
        derives_head_dim=True,
    ),
    "granitehybrid": Architecture(
        "granitemoehybrid", _GRANITE_HYBRID, more=granite_hybrid, pairs=True, derives_head_dim=True
    ),
    "deepseek2": Architecture("deepseek_v3", _DEEPSEEK3, more=deepseek3, own_heads=True),
    "glm4moe": Architecture(
        "glm4_moe",
        {**_SIGMOID_EXPERTS, "post_attention_norm": "post_attention_layernorm"},
        more=glm4_moe,
        partial_rotary=True,
    ),
    "minimax-m2": Architecture(
        "minimax",
        {**_BLOCK_EXPERTS, "exp_probs_b.bias": Part("block_sparse_moe.e_score_correction_bias")},
        _FEED_FORWARD_IS_EXPERTS,
        minimax,
        partial_rotary=True,
    ),
    "ernie4_5": Architecture("ernie4_5", more=ernie4_5),
    "olmo2": _olmo2,
    "olmoe": Architecture("olmoe", _EXPERTS, _NUM_EXPERTS, experts),
    "smollm3": Architecture("smollm3", pairs=True),
    "seed_oss": Architecture(
        "seed_oss",
        {"post_attention_norm": "post_attention_layernorm"},
    ),
    "lfm2": Architecture("lfm2", _LFM2, more=lfm2),
    "lfm2moe": Architecture("lfm2_moe", _LFM2_MOE, more=lfm2_moe),
    "glm4": Architecture("glm4", _GLM4, partial_rotary=True),
    "starcoder2": Architecture(
        "starcoder2", {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}, more=starcoder2, derives_head_dim=True
    ),
    "command-r": Architecture("cohere", fields={"logit_scale": "logit_scale"}, more=cohere, derives_head_dim=True),
    "cohere2": Architecture("cohere2", fields={"logit_scale": "logit_scale"}, more=cohere, rope_scalings=_NO_SCALINGS),
    "exaone4": Architecture("exaone4", _NORMS_AFTER, more=exaone4),
}
"""By ``general.architecture``; a function where the model type depends on more."""
