#!/usr/bin/env bash
# A Llama 3.1 configuration that transformers 5 saved again is read by mlx-lm without its RoPE, and without a word.
#
# transformers 5.24.0, mlx-lm 0.32.2, mlx 0.32.4 (CPU build), Python 3.11 or newer, Linux x86-64.
# One would guess: reading config.json with transformers and saving it again changes nothing that a model computes, and
# a library that finds no rope_theta in it stops.
# Seen: transformers 5 writes base and scaling only in rope_parameters; the entries rope_theta and rope_scaling are gone.
# mlx-lm's llama asks for those two, finds neither, and takes base 10000 and no scaling, where the model was trained with
# base 500000 and stretched waves. Of 78 model types that both libraries have, 34 do so and 29 stop for an entry.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    'mlx[cpu]==0.32.4' 'mlx-lm==0.32.2' 'transformers==5.24.0'
"$work/venv/bin/python" - <<'PYTHON'
import json

from mlx_lm.models import llama
from transformers import LlamaConfig

before = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 96, "vocab_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}
after = json.loads(LlamaConfig(**before).to_json_string())
print("saved again:", {name: value for name, value in after.items() if "rope" in name})
ropes = [llama.Model(llama.ModelArgs.from_dict(config)).layers[0].self_attn.rope for config in (before, after)]
print("mlx-lm, as first written:", type(ropes[0]).__name__)
print("mlx-lm, as saved again:", type(ropes[1]).__name__, "base", ropes[1].base)

assert "rope_theta" not in after and "rope_scaling" not in after
assert after["rope_parameters"]["rope_theta"] == 500000.0
assert type(ropes[0]).__name__ == "Llama3RoPE"
assert (type(ropes[1]).__name__, ropes[1].base) == ("RoPE", 10000)
PYTHON
