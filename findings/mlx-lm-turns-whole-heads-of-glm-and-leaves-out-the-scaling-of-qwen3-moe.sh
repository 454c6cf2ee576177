#!/usr/bin/env bash
# Two model files of mlx-lm take no notice of what a configuration says of RoPE: GLM's part of a head, Qwen 3 MoE's yarn.
#
# mlx-lm 0.32.2, mlx 0.32.4 (CPU build), transformers 5.24.0 (as the other reader), Python 3.11 or newer, Linux x86-64.
# One would guess: partial_rotary_factor 0.5 turns half of each head in every model that has it; rope_scaling, which both
# Qwen 3 files of mlx-lm take as an argument, scales in both.
# Seen: mlx-lm's glm has no such entry and turns whole heads (transformers turns a half, its default for the type); its
# glm4 and phi turn a part. qwen3 scales; qwen3_moe takes rope_scaling, keeps it, and turns unscaled.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    'mlx[cpu]==0.32.4' 'mlx-lm==0.32.2' 'transformers==5.24.0'
"$work/venv/bin/python" - <<'PYTHON'
from mlx_lm.models import glm, glm4, qwen3, qwen3_moe
from transformers import GlmConfig

base = {
    "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 96, "vocab_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "rope_theta": 1e4,
    "partial_rotary_factor": 0.5, "attention_bias": False, "tie_word_embeddings": False,
}
turned = {module.__name__.rpartition(".")[2]: module.Model(
    module.ModelArgs.from_dict({"model_type": "glm", **base})).layers[0].self_attn.rope.dims for module in (glm, glm4)}
told = GlmConfig(hidden_size=64, num_attention_heads=4, head_dim=16).rope_parameters["partial_rotary_factor"]
print("elements of a head of 16 that turn:", turned, "; transformers turns a part of", told)
scaling = {"rope_type": "yarn", "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1,
           "mlp_only_layers": [], "norm_topk_prob": True}
kinds = {module.__name__.rpartition(".")[2]: type(module.Model(module.ModelArgs.from_dict(
    {"model_type": "qwen3", **base, **experts, "rope_scaling": scaling})).layers[0].self_attn.rope).__name__
    for module in (qwen3, qwen3_moe)}
print("with rope_scaling of type yarn:", kinds)

assert turned == {"glm": 16, "glm4": 8} and told == 0.5
assert kinds == {"qwen3": "YarnRoPE", "qwen3_moe": "RoPE"}
PYTHON
