#!/usr/bin/env bash
# An MLX array made of a numpy view with gaps keeps the view's strides, where one would expect a copy without gaps.
#
# mlx 0.32.4 (CPU build), numpy 2.4.6, Python 3.11 or newer, Linux x86-64.
# One would guess: mx.array(view) copies values, and its result lies row after row like any fresh array.
# Seen: of a view [5, 4] with strides 68 and 17 (one byte of each block of 17) the array has strides 68 and 17, also after
# mx.eval. numpy.ascontiguousarray before, or an operation after, gives 4 and 1.
# Why it matters: one byte of each block is how the scales of GGUF's MXFP4 are read. With such scales MLX's CUDA (0.32.4,
# one H200) said "No implementation for problem shape", where scales of mx.quantize in the same shapes worked; the CPU
# computes both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' 'numpy==2.4.6'
"$work/venv/bin/python" - <<'PYTHON'
import mlx.core as mx
import numpy as np


def strides(array):
    mx.eval(array)
    return memoryview(array).strides


blocks = np.arange(5 * 4 * 17, dtype=np.uint16).astype(np.uint8).reshape(5, 4, 17)
view = blocks[..., :1].reshape(5, 4)
kept, dense = mx.array(view), mx.array(np.ascontiguousarray(view))
print("the view:", view.strides, "the array:", strides(kept), "of a contiguous copy:", strides(dense))
print("after an operation:", strides(kept | 0))

assert strides(kept) == (68, 17)
assert strides(dense) == (4, 1)
assert np.array_equal(np.array(kept), view)
PYTHON
