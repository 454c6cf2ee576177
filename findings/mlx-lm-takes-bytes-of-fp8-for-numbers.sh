#!/usr/bin/env bash
# mlx-lm loads FP8 weights as the integers that their bytes are, where a model file does not decode them, also with strict.
#
# mlx-lm 0.32.2, mlx 0.32.4 (CPU build), numpy 2.4.6, Python 3.11 or newer, Linux x86-64.
# One would guess: a checkpoint in an element type that a model file cannot read is an error; a model file that reads the
# scales of FP8 weights decodes the weights.
# Seen: MLX has no FP8 type, and mx.load gives uint8. llama takes such weights as they are: 1.0, the byte 0x38, becomes 56.
# ministral3 looks for weight_scale_inv and multiplies the bytes with it: 1.0 with a scale of 2 becomes 112.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' 'mlx-lm==0.32.2' 'numpy==2.4.6'
"$work/venv/bin/python" - "$work" <<'PYTHON'
import json
import struct
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import llama, ministral3
from mlx_lm.utils import load_model

BASE = {
    "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 16, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
ROPE = {"rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}
PROJECTION = "model.layers.0.self_attn.q_proj.weight"


def loaded(module, name, prefix, **entries):
    """The projection of a model whose every weight in it is FP8's 1.0, with a scale of 2."""
    config = {"model_type": name, **BASE, **entries}
    shapes = {key: value.shape for key, value in tree_flatten(module.Model(module.ModelArgs.from_dict(config)).parameters())}
    header, data = {}, b""
    for key, shape in {**shapes, **({prefix + "_scale_inv": ()} if prefix else {})}.items():
        fp8 = key == PROJECTION
        values = b"\x38" * 4096 if fp8 else np.full(shape, 2.0 if "scale" in key else 1.0, np.float32).tobytes()
        header[key] = {"dtype": "F8_E4M3" if fp8 else "F32", "shape": list(shape), "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    folder = Path(sys.argv[1], name)
    folder.mkdir()
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = load_model(folder, strict=True)
    weight = dict(tree_flatten(model.parameters()))[PROJECTION]
    return str(weight.dtype), float(weight[0, 0].item())


found = {
    "llama": loaded(llama, "llama", ""),
    "ministral3": loaded(ministral3, "ministral3", PROJECTION, rope_parameters=ROPE),
}
print("FP8's 1.0, with a scale of 2 in ministral3:", found)

assert found["llama"] == ("mlx.core.uint8", 56.0)
assert found["ministral3"][1] == 112.0
PYTHON
