#!/usr/bin/env bash
# On a CPU MLX multiplies by chosen experts in bfloat16 only where their weights are packed.
#
# mlx 0.32.4 (CPU), mlx-lm 0.32.2, Python 3.11 or newer.
# One would guess: mx.gather_mm takes the element types that mx.matmul takes, so that a checkpoint in bfloat16 with
# routed experts runs on a CPU as a dense one does, and packing its weights only makes it smaller.
# Seen: mx.gather_mm of bfloat16 or float16 raises "Currently only supports float32" when it is evaluated, while
# mx.matmul of the same arrays and mx.gather_qmm of the same weights in 4 bits give bfloat16. mlx-lm's SwitchLinear
# fails so too, and works once it is quantized.
# Why it matters: the same model file loads, says nothing, and fails at the first token, unless it was quantized.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' 'mlx-lm==0.32.2'
"$work/venv/bin/python" - <<'PYTHON'
import mlx.core as mx
from mlx_lm.models.switch_layers import SwitchLinear

mx.set_default_device(mx.cpu)


def outcome(make):
    try:
        result = make()
        mx.eval(result)
        return str(result.dtype)
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"


chosen = mx.array([[0, 3], [2, 1]])
for dtype in (mx.float32, mx.bfloat16, mx.float16):
    rows = mx.random.normal((2, 1, 1, 64)).astype(dtype)
    experts = mx.random.normal((4, 32, 64)).astype(dtype)
    layer = SwitchLinear(64, 32, 4, bias=False)
    layer.weight = experts
    packed = layer.to_quantized(group_size=64, bits=4)
    found = {
        "matmul": outcome(lambda: rows[:, 0] @ experts[0].T),
        "gather_mm": outcome(lambda: mx.gather_mm(rows, experts.swapaxes(-1, -2), rhs_indices=chosen)),
        "SwitchLinear": outcome(lambda: layer(rows, chosen)),
        "SwitchLinear in 4 bits": outcome(lambda: packed(rows, chosen)),
    }
    print(dtype, found)
    assert found["matmul"] == found["SwitchLinear in 4 bits"] == str(dtype)
    for name in ("gather_mm", "SwitchLinear"):
        assert found[name] == str(dtype) if dtype == mx.float32 else "only supports float32" in found[name]
PYTHON
