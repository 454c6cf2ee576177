#!/usr/bin/env bash
# The strides of an MLX result depend on which of its inputs is still in use, and contiguous() does not settle them.
#
# mlx 0.32.4 (CPU build), numpy 2.4.6, Python 3.11 or newer, Linux x86-64.
# One would guess: a sum of two arrays [8, 1, 16] is a fresh array whose strides follow from its shape, 16, 16, 1; and
# mx.contiguous gives such an array in any case.
# Seen: where the left side is still in use, the sum lies in the memory of the right side and keeps its strides. If that
# is b[indices] with an axis inserted by expand_dims, they are 16, 1, 1: an inserted axis has stride 1. reshape to the
# same shape and mx.contiguous keep them, since an axis of one counts for nothing in "row contiguous". Two reshapes, by
# way of [8, 16], give 16, 16, 1.
# Why it matters: this is how mlx-lm's SwitchLinear adds a bias, and what a kernel may take for the distance between
# rows. MLX's sorted gather_mm did on Metal until 0.32.1, and its CUDA source still reads the stride of that axis.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' 'numpy==2.4.6'
"$work/venv/bin/python" - <<'PYTHON'
import mlx.core as mx

ROWS, WIDTH, EXPERTS = 8, 16, 4


def strides(array):
    mx.eval(array)
    return tuple(one // array.itemsize for one in memoryview(array).strides)


bias, indices = mx.random.normal((EXPERTS, WIDTH)), mx.arange(ROWS) % EXPERTS
used = mx.random.normal((ROWS, 1, WIDTH))
mx.eval(used, bias)
plain, other = used * 1, used + 1
alone = plain + other
with_bias = used + mx.expand_dims(bias[indices], -2)
print("a sum of two plain arrays:", strides(alone))
print("a sum with a bias, the left side still in use:", strides(with_bias))
print("reshaped to its own shape by way of another:", strides(with_bias.reshape(ROWS, WIDTH).reshape(ROWS, 1, WIDTH)))
print("contiguous():", strides(mx.contiguous(with_bias)))

assert strides(alone) == (WIDTH, WIDTH, 1)
assert strides(with_bias) == (WIDTH, 1, 1)
assert strides(mx.contiguous(with_bias)) == (WIDTH, 1, 1)
assert strides(with_bias.reshape(ROWS, WIDTH).reshape(ROWS, 1, WIDTH)) == (WIDTH, WIDTH, 1)
PYTHON
