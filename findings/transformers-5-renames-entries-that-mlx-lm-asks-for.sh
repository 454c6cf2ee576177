#!/usr/bin/env bash
# Some configurations cannot be read by mlx-lm after transformers 5 saved them: entries and kinds of layers have new names.
#
# transformers 5.24.0, mlx-lm 0.32.2, mlx 0.32.4 (CPU build), Python 3.11 or newer, Linux x86-64.
# One would guess: a name under which a configuration can be read is the name under which it is written.
# Seen: transformers reads num_experts of Qwen 3 MoE and writes num_local_experts; of Granite 4 hybrid it reads the kinds
# of layers mamba and attention and writes linear_attention and full_attention; of Gemma 4 it reads global_head_dim and
# writes the head of each such layer in per_layer_config. mlx-lm stops for the first two, and takes its own default (512)
# for the third.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    'mlx[cpu]==0.32.4' 'mlx-lm==0.32.2' 'transformers==5.24.0'
"$work/venv/bin/python" - <<'PYTHON'
import json

from mlx_lm.models import gemma4_text, granitemoehybrid, qwen3_moe
from transformers import CONFIG_MAPPING


def saved(model_type, **entries):
    return json.loads(CONFIG_MAPPING[model_type](**entries).to_json_string())


def read(module, config):
    try:
        return module.Model(module.ModelArgs.from_dict(config)).args
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


qwen = saved("qwen3_moe", num_experts=4, num_hidden_layers=2, hidden_size=64, moe_intermediate_size=32)
missing = read(qwen3_moe, {**qwen, "rope_theta": 1e6, "head_dim": 16})
print("Qwen 3 MoE:", {name: qwen[name] for name in qwen if name.endswith("_experts")}, "->", missing)
granite = saved("granitemoehybrid", layer_types=["mamba", "attention"], num_hidden_layers=2, hidden_size=64,
                num_attention_heads=4, num_key_value_heads=2, mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1,
                mamba_d_state=16, num_local_experts=4, num_experts_per_tok=2, vocab_size=128)
said = read(granitemoehybrid, granite)
print("Granite 4 hybrid:", granite["layer_types"], "->", said)
gemma = saved("gemma4_text", num_hidden_layers=6, hidden_size=64, head_dim=16, global_head_dim=32)
default = gemma4_text.ModelArgs.from_dict(gemma).global_head_dim
print("Gemma 4:", gemma["per_layer_config"], "->", default)

assert "num_experts" not in qwen and qwen["num_local_experts"] == 4 and missing.endswith("'num_experts'")
assert granite["layer_types"] == ["linear_attention", "full_attention"] and "Unknown layer type" in said
assert "global_head_dim" not in gemma and gemma["per_layer_config"] == {"5": {"head_dim": 32}} and default == 512
PYTHON
