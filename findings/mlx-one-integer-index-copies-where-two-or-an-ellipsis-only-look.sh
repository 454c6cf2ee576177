#!/usr/bin/env bash
# In MLX w[0] copies what it gives; w[0, ...], w[0, 5], w[:1] and the same element from a loop over w do not.
#
# mlx 0.32.4 (CPU build), numpy 2.4.6, Python 3.11 or newer, Linux x86-64.
# One would guess: w[0], w[0, ...] and list(w)[0] are the same operation, and all of them only look at the memory of w,
# as in NumPy and PyTorch.
# Seen: w[0] and w[1] of float32 [2, 1024, 1024] take 4 MiB more; w[0, ...], w[1, 5], w[:, 5], w[:1], w[:1].squeeze(0),
# mx.split(w, 2)[0], mx.take(w, 0, axis=0) and list(w)[0] take nothing. Address by address: w[0, ...] begins where w
# does, w[0] elsewhere.
# Why it matters: one expert of stacked weights, one layer's half of joined scales and biases, one sequence's pages: kept
# as w[i] they are there twice, which no shape and no value shows.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' 'numpy==2.4.6'
"$work/venv/bin/python" - <<'PYTHON'
import mlx.core as mx
import numpy as np

SIZE = 1024
w = mx.random.normal((2, SIZE, SIZE))
mx.eval(w)


def address(array):
    return np.array(array, copy=False).ctypes.data


def look(give):
    """Bytes that are in use more once the result is there, and how far into w it begins (None: elsewhere)."""
    before = mx.get_active_memory()
    result = give()
    mx.eval(result)
    away = address(result) - address(w)
    return mx.get_active_memory() - before, away if 0 <= away < w.nbytes else None


ways = {
    "w[0]": lambda: w[0], "w[1]": lambda: w[1], "w[0, ...]": lambda: w[0, ...], "w[1, ...]": lambda: w[1, ...],
    "w[1, 5]": lambda: w[1, 5], "w[:1]": lambda: w[:1], "w[:1].squeeze(0)": lambda: w[:1].squeeze(0),
    "mx.split(w, 2)[0]": lambda: mx.split(w, 2)[0], "mx.take(w, 0, axis=0)": lambda: mx.take(w, 0, axis=0),
    "list(w)[0]": lambda: list(w)[0],
}  # fmt: skip
found = {name: look(give) for name, give in ways.items()}
for name, (taken, away) in found.items():
    print(f"{name:24s} {taken:8d} bytes more, {'elsewhere' if away is None else f'at byte {away} of w'}")

whole = SIZE * SIZE * 4
for name in ("w[0]", "w[1]"):
    assert found[name] == (whole, None), name
for name in ("w[0, ...]", "w[:1]", "w[:1].squeeze(0)", "mx.split(w, 2)[0]", "mx.take(w, 0, axis=0)", "list(w)[0]"):
    assert found[name] == (0, 0), name
assert found["w[1, ...]"] == (0, whole)
PYTHON
