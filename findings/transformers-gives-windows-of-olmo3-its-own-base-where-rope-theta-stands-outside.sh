#!/usr/bin/env bash
# Of an OLMo 3 configuration with rope_theta, transformers takes that base for full layers and its own for windowed ones.
#
# transformers 5.24.0, Python 3.11 or newer, Linux x86-64.
# One would guess: an entry rope_theta, as configurations had it before rope_parameters, is the base of every layer.
# Seen: the class takes it out of the entries for the full layers, and so no longer finds it for those with a window,
# which get its default of 500000. The released models have that very base, so it shows in others only. Gemma 3, whose
# windows do have a base of their own, reads it from an entry of another name.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'transformers==5.24.0'
"$work/venv/bin/python" - <<'PYTHON'
from transformers import Olmo2Config, Olmo3Config

olmo3 = Olmo3Config(rope_theta=10000.0, num_hidden_layers=4).rope_parameters
bases = {kind: words["rope_theta"] for kind, words in olmo3.items()}
print("OLMo 3 with rope_theta 10000:", bases)
print("OLMo 2 with rope_theta 10000:", Olmo2Config(rope_theta=10000.0).rope_parameters["rope_theta"])

assert bases == {"sliding_attention": 500000.0, "full_attention": 10000.0}
assert Olmo2Config(rope_theta=10000.0).rope_parameters["rope_theta"] == 10000.0
PYTHON
