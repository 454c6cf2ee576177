#!/usr/bin/env bash
# Where there is no Metal, mlx-lm computes a gated delta net's prompt token by token, each as operations of its own.
#
# mlx 0.32.4 (CPU), mlx-lm 0.32.2, Python 3.11 or newer.
# One would guess: a prompt of n tokens is one call of each layer, as for attention, so that the number of operations
# of a layer does not depend on n; "use_kernel" suggests that it is only a matter of which kernel runs.
# Seen: the kernel is Metal's alone. Elsewhere (CPU, and CUDA, where it was noticed: 217 to 262 tokens of a prompt a
# second on an H100) gated_delta_update builds 34 operations for every token (with mx.compile off, so that all are seen),
# also with use_kernel=True; a prompt four times as long has four times as many operations.
# Why it matters: Qwen3-Next and Qwen3.5 read a prompt of 2,000 tokens no faster than they write 2,000 tokens.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' 'mlx-lm==0.32.2'
"$work/venv/bin/python" - "$work" <<'PYTHON'
import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.models.gated_delta import gated_delta_update

mx.set_default_device(mx.cpu)
mx.disable_compile()  # so that every operation is seen
heads, dim = 2, 32


def operations(tokens):
    """Nodes of the graph of one layer's recurrence over a prompt."""
    q, k, v = (mx.random.normal((1, tokens, heads, dim)) for _ in range(3))
    a, b = (mx.random.normal((1, tokens, heads)) for _ in range(2))
    decays, bias = mx.zeros((heads,)), mx.zeros((heads,))
    mx.eval(q, k, v, a, b, decays, bias)
    out, state = gated_delta_update(q, k, v, a, b, decays, bias, use_kernel=True)
    path = Path(sys.argv[1]) / "graph.dot"
    mx.export_to_dot(str(path), out, state)
    return path.read_text().count("shape=rectangle")


counts = {tokens: operations(tokens) for tokens in (16, 64, 256)}
print(counts, "operations of one layer, by the number of tokens")
assert counts[64] > 30 * 64
assert 3.5 < counts[64] / counts[16] < 4.5
assert 3.5 < counts[256] / counts[64] < 4.5
PYTHON
