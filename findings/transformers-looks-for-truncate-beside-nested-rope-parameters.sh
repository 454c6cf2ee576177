#!/usr/bin/env bash
# transformers' yarn takes "truncate" from rope_parameters itself, also where these are nested by kind of layer.
#
# transformers 5.24.0, numpy 2.4.6, Python 3.11 or newer, Linux x86-64.
# One would guess: where rope_parameters hold one dictionary for each kind of layer, everything that yarn needs is read
# from the dictionary of the kind that is asked for.
# Seen: factor, beta_fast and the others are; truncate is looked for one level up, and so a nested "truncate": false has
# no effect: the bounds of the ramp are rounded. Written one level up, beside the kinds, it works.
# The functions want PyTorch, of which this one uses three names: NumPy stands in for it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'transformers==5.24.0' 'numpy==2.4.6'
"$work/venv/bin/python" - <<'PYTHON'
from types import SimpleNamespace

import numpy as np
from transformers import Olmo3Config, modeling_rope_utils


class Tensor(np.ndarray):
    def to(self, **_):
        return self.astype(np.float64).view(Tensor)


modeling_rope_utils.torch = SimpleNamespace(
    float=float, float32=float,
    arange=lambda *bounds, **_: np.arange(*bounds).astype(np.float64).view(Tensor),
    clamp=lambda values, low, high: np.clip(values, low, high).view(Tensor),
)


def frequencies(nested, beside):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 1e4, **nested}
    plain = {"rope_type": "default", "rope_theta": 1e4}
    config = Olmo3Config(hidden_size=64, num_attention_heads=1, num_hidden_layers=4, max_position_embeddings=4096,
                         rope_parameters={"full_attention": yarn, "sliding_attention": plain, **beside})
    config.head_dim = 64
    function = modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"]
    return np.asarray(function(config, None, layer_type="full_attention")[0])


rounded, nested, beside = frequencies({}, {}), frequencies({"truncate": False}, {}), frequencies({}, {"truncate": False})
print("nested truncate changes anything:", not np.array_equal(rounded, nested))
print("truncate one level up changes", int((rounded != beside).sum()), "of", len(rounded), "frequencies")

assert np.array_equal(rounded, nested)
assert not np.array_equal(rounded, beside)
PYTHON
