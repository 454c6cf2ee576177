#!/usr/bin/env bash
# MLX's arithmetic on a broadcast number gives an array that still holds one element, whatever its shape and nbytes say.
#
# mlx 0.32.4 (CPU build), numpy 2.4.6, Python 3.11 or newer, Linux x86-64.
# One would guess: broadcast_to(x, (8,)) only looks at x, but broadcast_to(x, (8,)) * 1 is the result of an operation: a
# fresh array of eight elements, as in NumPy and PyTorch.
# Seen: of float16 it is one element with stride 0, and so are exp() and where() of it, also after mx.eval; nbytes says
# 16, and a megabyte more of shape takes no more memory. full(), concatenate(), contiguous() and a sum with zeros((8,))
# have eight elements with stride 2; zeros((8,)) * 1 has too.
# Why it matters: "* 1" looks like the way to make a view real. A kernel that takes row-contiguous inputs has it copied
# at each launch, and on CUDA, where arrays of up to eight bytes lie in the host's memory, it is such an array.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' 'numpy==2.4.6'
"$work/venv/bin/python" - <<'PYTHON'
import mlx.core as mx

number = mx.array(0.5, mx.float16)
repeated = mx.broadcast_to(number, (8,))
one = {
    "broadcast_to": repeated, "times 1": repeated * 1, "exp": mx.exp(repeated),
    "where": mx.where(mx.array(True), repeated, number),
}
eight = {
    "full": mx.full((8,), number), "concatenate": mx.concatenate([number.reshape(1)] * 8),
    "contiguous": mx.contiguous(repeated), "plus zeros": repeated + mx.zeros((8,), mx.float16),
    "zeros times 1": mx.zeros((8,), mx.float16) * 1,
}
for arrays, stride in ((one, 0), (eight, 2)):
    for name, array in arrays.items():
        mx.eval(array)
        print(f"{name:14} shape {array.shape}, nbytes {array.nbytes}, strides {memoryview(array).strides}")
        assert (array.nbytes, memoryview(array).strides) == (16, (stride,)), name

mx.clear_cache()
before = mx.get_active_memory()
large = mx.broadcast_to(number, (1 << 20,)) * 1
mx.eval(large)
grown = mx.get_active_memory() - before
print(f"a million elements: nbytes {large.nbytes}, {grown} bytes more in use")
assert large.nbytes == 2 << 20
assert grown < 1 << 16
PYTHON
