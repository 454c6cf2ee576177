"""A kernel's text compiled for this machine, as MLX would write it around the body, and run on its CPU.

In place of :func:`engine.runner.kernels.dialect.make_kernel` it gives kernels that take and give MLX arrays. What lies
in memory that no kernel has written is NaN; a write outside an output is noticed.
"""

import ctypes
import hashlib
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from engine.runner.kernels.dialect import kernel_text
from engine.runner.kernels.rows_matmul_text import TENSOR_CORES

HERE = Path(__file__).parent
_GUARD = 64
"""Elements before and behind an output that must stay as they are."""
_UNWRITTEN = {mx.bfloat16: 0x7FFF, mx.int32: -0x7FFFFFF}
"""Where an output is not NaN until it is written."""
_CUDA_TYPES = {
    mx.bfloat16: "__nv_bfloat16", mx.float16: "__half", mx.float32: "float", mx.int32: "int32_t", mx.uint32: "uint32_t",
}  # fmt: skip
_METAL_TYPES = {
    mx.bfloat16: "bfloat16_t", mx.float16: "float16_t", mx.float32: "float", mx.int32: "int32_t", mx.uint32: "uint32_t",
}  # fmt: skip
_TYPE_NAMES = ("T", "C")
"""Template arguments that are types."""
_METAL_BUILT_INS = {
    "threadgroup_position_in_grid": ("uint3", "blockIndex"),
    "threadgroups_per_grid": ("uint3", "gridSize"),
    "thread_index_in_threadgroup": ("uint", "current_thread"),
    "thread_index_in_simdgroup": ("uint", "current_thread % 32"),
    "simdgroup_index_in_threadgroup": ("uint", "current_thread / 32"),
}
_MOST_CONSTANT = 8
"""Inputs of fewer elements are in Metal's constant memory."""


@dataclass(frozen=True, slots=True)
class Argument:
    """An input or output as the text declares it."""

    name: str
    type: str
    constant: bool = False
    shaped: bool = False


class HostKernel:
    """One kernel; every set of template arguments is compiled once. ``backwards``: a launch's last block runs first."""

    def __init__(
        self, dialect: str, name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str, header: str,
        folder: Path,
    ) -> None:  # fmt: skip
        self.cuda = dialect == "cuda"
        self._name, self._inputs, self._outputs, self._folder = name, inputs, outputs, folder
        self._body, self._header = kernel_text(source, header.replace(TENSOR_CORES, ""), cuda=self.cuda)
        self.sources: list[Path] = []
        self.backwards = False

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
        """Launch it here and now."""
        assert all(whole % part == 0 for whole, part in zip(grid, threadgroup, strict=True)), "threads without a block"
        assert threadgroup[1:] == (1, 1)
        run = self._compiled(inputs, template, output_dtypes)
        held = [_aligned(_view(array)) for array in inputs]
        outputs = [_guarded(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
        shapes = np.zeros((len(inputs), 8), np.int32)
        for row, array in zip(shapes, inputs, strict=True):
            row[: array.ndim] = array.shape
        addresses = [array.ctypes.data for array in held]
        addresses += [array.ctypes.data + _GUARD * array.itemsize for array in outputs]
        blocks = [whole // part for whole, part in zip(grid, threadgroup, strict=True)]
        run.restype = ctypes.c_char_p
        fault = run(
            (ctypes.c_void_p * len(addresses))(*addresses),
            ctypes.c_void_p(shapes.ctypes.data),
            *blocks,
            threadgroup[0],
            self.backwards,
        )
        assert not fault, fault.decode()
        for array, after in zip(inputs, held, strict=True):
            before = _view(array)
            if before.tobytes() != after.tobytes():
                assert before.flags.c_contiguous, f"{array.shape} was written, and is not the array itself but a copy"
                before[...] = after
        return [
            _unguarded(array, shape, dtype)
            for array, shape, dtype in zip(outputs, output_shapes, output_dtypes, strict=True)
        ]

    def _compiled(self, inputs: list[mx.array], template: list[tuple[str, Any]], outputs: list[mx.Dtype]) -> Any:
        types = _CUDA_TYPES if self.cuda else _METAL_TYPES
        ins = [
            Argument(name, types[array.dtype], array.size < _MOST_CONSTANT, f"{name}_shape" in self._body)
            for name, array in zip(self._inputs, inputs, strict=True)
        ]
        outs = [Argument(name, types[dtype]) for name, dtype in zip(self._outputs, outputs, strict=True)]
        constants = [(name, types[value] if isinstance(value, mx.Dtype) else str(value)) for name, value in template]
        write = cuda_program if self.cuda else metal_program
        text = write(self._name, ins, outs, constants, self._header, self._body)
        path = self._folder / f"{self._name}_{hashlib.sha256(text.encode()).hexdigest()[:16]}.cpp"
        if path not in self.sources:
            self.sources.append(path)
        return library_of(text, path).run


def library_of(text: str, path: Path) -> ctypes.CDLL:
    """``text`` compiled, once for all processes that share the folder of ``path``."""
    library = path.with_suffix(".so")
    if not library.exists():
        own = path.with_suffix(f".{os.getpid()}.cpp")
        own.write_text(text)
        own.replace(path)
        _compile(path, library)
    return ctypes.CDLL(str(library))


def _compile(path: Path, library: Path) -> None:
    """With g++; its words if it refuses. Other processes may be about the same text: the library appears whole."""
    flags = ["-O1", "-std=c++17", "-w", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", "-shared", "-fPIC", f"-I{HERE}"]
    own = library.with_suffix(f".{os.getpid()}")
    done = subprocess.run(["g++", *flags, "-o", str(own), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]
    own.replace(library)


def metal_program(
    name: str, ins: list[Argument], outs: list[Argument], template: list[tuple[str, str]], header: str, body: str
) -> str:
    """As ``metal_kernel`` of MLX writes it (mlx/backend/common/metal_kernel.cpp), and a function that launches it."""
    declared, passed = [], []
    for i, one in enumerate(ins):
        declared.append(f"const {'constant' if one.constant else 'device'} {one.type}* {one.name}")
        passed.append(f"(const {one.type}*)arrays[{i}]")
        if one.shaped:
            declared.append(f"const constant int* {one.name}_shape")
            passed.append(f"shapes[{i}]")
    for i, one in enumerate(outs, len(ins)):
        declared.append(f"device {one.type}* {one.name}")
        passed.append(f"({one.type}*)arrays[{i}]")
    for built_in, (kind, value) in _METAL_BUILT_INS.items():
        if built_in in body:
            declared.append(f"{kind} {built_in}")
            passed.append(value)
    names = ", ".join(f"{'typename' if key in _TYPE_NAMES else 'int'} {key}" for key, _ in template)
    names, values = (
        (f"template <{names}>\n", f"<{', '.join(value for _, value in template)}>") if template else ("", "")
    )
    return f"""#include "metal_on_host.h"
{header}{names}[[kernel]] void {name}(
{", ".join(declared)}) {{
{body}
}}
#ifdef ADDRESS_SPACES
{"template" if template else ""} void {name}{values}({", ".join(re.sub(r" [a-z_]+$", "", one) for one in declared)});
#else
static uint3 blockIndex, gridSize;
static void** arrays;
static const int (*shapes)[8];
static void launch() {{ {name}{values}({", ".join(passed)}); }}
extern "C" const char* run(void** given, const int (*sizes)[8], uint x, uint y, uint z, uint threads, int backwards) {{
arrays = given, shapes = sizes, gridSize = {{x, y, z}}, fault = "";
for (uint n = 0; n < x * y * z; ++n) {{
  const uint at = backwards ? x * y * z - 1 - n : n;
  blockIndex = {{at % x, at / x % y, at / x / y}};
  run_block(threads, launch);
}}
return fault;
}}
#endif
"""


def cuda_program(
    name: str, ins: list[Argument], outs: list[Argument], template: list[tuple[str, str]], header: str, body: str
) -> str:
    """As ``cuda_kernel`` of MLX writes it (mlx/backend/cuda/custom_kernel.cpp), and a function that launches it."""
    declared, passed = [], []
    for i, one in enumerate(ins):
        declared.append(f"const {one.type}* {one.name}")
        passed.append(f"(const {one.type}*)arrays[{i}]")
        if one.shaped:
            declared.append(f"const __grid_constant__ Shape {one.name}_shape")
            passed.append(f"shapes[{i}]")
    for i, one in enumerate(outs, len(ins)):
        declared.append(f"{one.type}* {one.name}")
        passed.append(f"({one.type}*)arrays[{i}]")
    constants = "\n".join(
        f"using {key} = {value};" if key in _TYPE_NAMES else f"constexpr int {key} = {value};"
        for key, value in template
    )
    return f"""#include "cuda_on_host.h"
{header}namespace mlx::core::cu {{
__global__ void {name}({", ".join(declared)}) {{
{constants}
{body}
}}
}}
static void** arrays;
static const Shape* shapes;
static void launch() {{ mlx::core::cu::{name}({", ".join(passed)}); }}
extern "C" const char* run(void** given, const Shape* sizes, unsigned x, unsigned y, unsigned z, unsigned threads,
                           int backwards) {{
arrays = given, shapes = sizes, gridDim = {{x, y, z}}, fault = "";
for (unsigned n = 0; n < x * y * z; ++n) {{
  const unsigned at = backwards ? x * y * z - 1 - n : n;
  blockIdx = {{at % x, at / x % y, at / x / y}};
  run_block(threads, launch);
}}
return fault;
}}
"""


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    """A copy in a row that begins at a multiple of 16 bytes, as every array on a GPU does."""
    room = np.empty(array.nbytes + 16, np.uint8)
    start = -room.ctypes.data % 16
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _view(array: mx.array) -> NDArray[Any]:
    """An array's own memory; bfloat16 as its bits."""
    mx.eval(array)
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, copy=False)


def _guarded(shape: tuple[int, ...], dtype: mx.Dtype) -> NDArray[Any]:
    kind = {mx.bfloat16: np.uint16, mx.float16: np.float16, mx.float32: np.float32, mx.int32: np.int32}[dtype]
    array = np.empty(int(np.prod(shape)) + 2 * _GUARD, kind)
    array.fill(_UNWRITTEN.get(dtype, np.nan))
    return array


def _unguarded(array: NDArray[Any], shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    guards = np.concatenate([array[:_GUARD], array[-_GUARD:]])
    untouched = guards == _UNWRITTEN[dtype] if dtype in _UNWRITTEN else np.isnan(guards)
    assert untouched.all(), "something was written outside an output"
    inner = mx.array(array[_GUARD:-_GUARD].reshape(shape))
    return inner.view(mx.bfloat16) if dtype == mx.bfloat16 else inner
