"""CUDA kernels of products of few rows, compiled by g++ against ``cuda_on_host.h`` and run on this machine."""

import ctypes
import hashlib
import mmap
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.runner.kernels.dialect import compact
from engine.runner.kernels.rows_matmul_text import TENSOR_CORES
from engine.runner.kernels.split_k_text import COPIES
from tests.engine.runner.kernels.text_on_host import library_of

_ALIGNED = 16
"""Bytes of the widest loads."""
_mprotect = ctypes.CDLL(None, use_errno=True).mprotect
_TYPES = {
    mx.bfloat16: "__nv_bfloat16", mx.float16: "__half", mx.uint32: "unsigned", mx.float32: "float", mx.int32: "int",
    mx.uint8: "unsigned char",
}  # fmt: skip


class HostKernel:
    """What :func:`engine.runner.kernels.dialect.make_kernel` gives on a GPU, run on this machine's CPU."""

    def __init__(
        self, name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str, header: str, folder: Path
    ) -> None:
        self._name, self._inputs, self._outputs, self._folder = name, inputs, outputs, folder
        self._source = compact(source)
        self._header = compact(header.replace(TENSOR_CORES, "").replace(COPIES, ""))
        self.launches = 0

    def __call__(
        self,
        *,
        inputs: list[mx.array],
        template: list[tuple[str, Any]],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        output_shapes: list[tuple[int, ...]],
        output_dtypes: list[mx.Dtype],
    ) -> list[mx.array]:
        """Compute the outputs; all elements that the kernel does not write are NaN."""
        self.launches += 1
        run = self._compiled(inputs, template, output_dtypes)
        held = [_guarded(np.array(mx.contiguous(value).view(_bits(value.dtype)))) for value in inputs]
        outs = [
            np.full(shape, 0x7FFF if dtype.size == 2 else 0x7FFFFFFF, dtype=f"uint{8 * dtype.size}")
            for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
        ]
        shapes = np.zeros((len(inputs), 8), dtype=np.int32)
        for row, value in zip(shapes, inputs, strict=True):
            row[: value.ndim] = value.shape
        arrays = [array.ctypes.data for array in [*held, *outs]]
        pointers = (ctypes.c_void_p * len(arrays))(*arrays)
        run(pointers, ctypes.c_void_p(shapes.ctypes.data), grid[0] // threadgroup[0], threadgroup[0])
        return [mx.array(out).view(dtype) for out, dtype in zip(outs, output_dtypes, strict=True)]

    def _compiled(
        self, inputs: list[mx.array], template: list[tuple[str, Any]], outputs: list[mx.Dtype]
    ) -> Callable[..., Any]:
        text = self._text([_TYPES[value.dtype] for value in inputs], template, [_TYPES[dtype] for dtype in outputs])
        name = f"{self._name}_{hashlib.sha256(text.encode()).hexdigest()[:16]}.cpp"
        return library_of(text, self._folder / name).run

    def _text(self, types: list[str], template: list[tuple[str, Any]], outputs: list[str]) -> str:
        named = list(zip(self._inputs, types, strict=True))
        written = list(zip(self._outputs, outputs, strict=True))
        shaped = [name for name in self._inputs if re.search(rf"\b{name}_shape\b", self._source)]
        constants = [
            f"using {name} = {_TYPES[value]};" if isinstance(value, mx.Dtype) else f"constexpr int {name} = {value};"
            for name, value in template
        ]
        return "\n".join(
            [
                '#include "cuda_on_host.h"',
                self._header,
                *(f"static const {kind}* {name};" for name, kind in named),
                *(f"static Shape {name}_shape;" for name in shaped),
                *(f"static {kind}* {name};" for name, kind in written),
                "static void kernel() {",
                *constants,
                self._source,
                '}\nextern "C" void run(void** arrays, const Shape* shapes, int blocks, int threads) {',
                *(f"{name} = (const {kind}*)arrays[{i}];" for i, (name, kind) in enumerate(named)),
                *(f"{name}_shape = shapes[{self._inputs.index(name)}];" for name in shaped),
                *(f"{name} = ({kind}*)arrays[{i}];" for i, (name, kind) in enumerate(written, len(named))),
                "gridDim.x = blocks;",
                "for (int i = 0; i < blocks; ++i) { blockIdx.x = i; run_block(threads, kernel); }\n}\n",
            ]
        )


def kernels_on_host(monkeypatch: pytest.MonkeyPatch, folder: Path, *modules: ModuleType) -> dict[str, HostKernel]:
    """Kernels of this machine's CPU in place of the GPU's that ``modules`` make; gives them by name."""
    made: dict[str, HostKernel] = {}

    def make(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str, header: str) -> HostKernel:
        return made.setdefault(name, HostKernel(name, inputs, outputs, source, header, folder))

    for module in modules:
        monkeypatch.setattr(module, "make_kernel", make)
    return made


def _guarded(array: Any) -> Any:
    """A copy behind whose end nothing may be read: a kernel that does ends this process."""
    size = -(-array.nbytes // _ALIGNED) * _ALIGNED
    room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _mprotect(ctypes.c_void_p(first + room), ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = np.frombuffer(memory, array.dtype, array.size, room - size).reshape(array.shape)
    copy[...] = array
    return copy


def _bits(dtype: mx.Dtype) -> mx.Dtype:
    return {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[dtype.size]
