#!/usr/bin/env bash
# An array of MLX can be written through a numpy view of it, and lazy results that were built before see the new values.
#
# mlx 0.32.4 (CPU build), numpy 2.4.6, Python 3.11 or newer, Linux x86-64.
# One would guess: arrays of MLX are immutable, so numpy.array(a, copy=False) is read-only, or a copy-on-write view.
# Seen: the view of an evaluated array is writable and shares its memory. A sum that was built before the write and is
# evaluated after it counts the new value. An evaluated reshape and an evaluated slice a[1:2] share the memory and change
# too; a[1] does not, so one index makes a copy where a slice makes a view. bfloat16, which numpy lacks, goes through
# .view(mx.uint16), which shares the memory as well.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' 'numpy==2.4.6'
"$work/venv/bin/python" - <<'PYTHON'
import mlx.core as mx
import numpy as np

a = mx.zeros((2, 3))
shaped, part, one = a.reshape(3, 2), a[1:2], a[1]
mx.eval(a, shaped, part, one)
total = mx.sum(a)  # built now, evaluated below
view = np.array(a, copy=False)
print("writable:", view.flags.writeable)
view[1, 2] = 5.0
print("the array:", a.tolist())
print("a sum built before the write:", total.item())
print("a reshape and a slice evaluated before it:", shaped.tolist(), part.tolist())
print("one row by its index, evaluated before it:", one.tolist())

b = mx.zeros((4,), dtype=mx.bfloat16)
mx.eval(b)
np.array(b.view(mx.uint16), copy=False)[:] = 0x3F80  # 1.0
print("bfloat16 through uint16:", b.tolist())

assert view.flags.writeable
assert a.tolist() == [[0.0, 0.0, 0.0], [0.0, 0.0, 5.0]]
assert total.item() == 5.0
assert shaped.tolist()[2] == [0.0, 5.0]
assert part.tolist() == [[0.0, 0.0, 5.0]]
assert one.tolist() == [0.0, 0.0, 0.0]
assert b.tolist() == [1.0] * 4
PYTHON
