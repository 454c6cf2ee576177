"""The text of a CUDA kernel around the body that is given to MLX, as MLX writes it, but quick to compile.

MLX's own begins with its headers, which take most of a small kernel's second of compiling; here are only the names
that a body needs. An input's shape arrives as integers: precompiled kernels get no arrays of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

TemplateValue = bool | int | mx.Dtype

_TYPES = {
    mx.bool_: "bool", mx.int8: "int8_t", mx.int16: "int16_t", mx.int32: "int32_t", mx.int64: "int64_t",
    mx.uint8: "uint8_t", mx.uint16: "uint16_t", mx.uint32: "uint32_t", mx.uint64: "uint64_t",
    mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.float32: "float",
}  # fmt: skip
_PRELUDE = """\
typedef signed char int8_t; typedef short int16_t; typedef int int32_t; typedef long int64_t;
typedef unsigned char uint8_t; typedef unsigned short uint16_t; typedef unsigned uint32_t;
typedef unsigned long uint64_t;
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#ifndef NAN
#define NAN __int_as_float(0x7fffffff)
#endif
"""


class UnsupportedKernelError(Exception):
    """A kernel that only MLX itself can compile; one line."""


@dataclass(frozen=True, slots=True)
class KernelText:
    """A kernel as ``mx.fast.cuda_kernel`` takes it."""

    name: str
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    source: str
    header: str = ""

    @property
    def symbol(self) -> str:
        """The kernel's name in its machine code."""
        return f"vm_magic_{self.name}"


@dataclass(frozen=True, slots=True)
class Signature:
    """What one text is compiled for: element types, numbers of dimensions, and the constants of its template."""

    inputs: tuple[tuple[mx.Dtype, int], ...]
    outputs: tuple[mx.Dtype, ...]
    template: tuple[tuple[str, TemplateValue], ...]

    @classmethod
    def of(
        cls,
        inputs: Sequence[mx.array],
        output_dtypes: Sequence[mx.Dtype],
        template: Sequence[tuple[str, TemplateValue]] | None,
    ) -> "Signature":
        """That of one call."""
        return cls(tuple((array.dtype, array.ndim) for array in inputs), tuple(output_dtypes), tuple(template or ()))


def cuda_source(text: KernelText, signature: Signature) -> str:
    """The whole text. Raises :class:`UnsupportedKernelError` for what cannot be passed to a precompiled kernel."""
    named = list(zip(text.input_names, signature.inputs, strict=True))
    pointers = [f"const {_type(dtype)}* {name}" for name, (dtype, _) in named]
    pointers += [f"{_type(dtype)}* {name}" for name, dtype in zip(text.output_names, signature.outputs, strict=True)]
    sizes, constants = [], []
    for name, (_, ndim) in named:
        if f"{name}_strides" in text.source:
            raise UnsupportedKernelError(f"{text.name} reads strides of {name}")
        if ndim and f"{name}_ndim" in text.source:
            constants.append(f"constexpr int {name}_ndim = {ndim};")
        if ndim and _reads_shape(text, name):
            own = [f"{name}_shape_{axis}" for axis in range(ndim)]
            sizes += [f"const int {size}" for size in own]
            constants.append(f"const int {name}_shape[{ndim}] = {{{', '.join(own)}}};")
    constants += [_constant(name, value) for name, value in signature.template]
    return (
        f'{_PRELUDE}{text.header}\nextern "C" __global__ void {text.symbol}(\n    '
        + ",\n    ".join([*pointers, *sizes])
        + ") {\n"
        + "".join(f"  {line}\n" for line in constants)
        + f"{text.source}\n}}\n"
    )


def shape_arguments(text: KernelText, inputs: Sequence[mx.array]) -> list[int]:
    """The integers that follow the arrays in a launch: shapes of the inputs whose shapes the body reads."""
    named = zip(text.input_names, inputs, strict=True)
    return [size for name, array in named if _reads_shape(text, name) for size in array.shape]


def _reads_shape(text: KernelText, name: str) -> bool:
    return f"{name}_shape" in text.source


def _type(dtype: mx.Dtype) -> str:
    if dtype not in _TYPES:
        raise UnsupportedKernelError(f"elements of {dtype}")
    return _TYPES[dtype]


def _constant(name: str, value: TemplateValue) -> str:
    if isinstance(value, bool):
        return f"constexpr bool {name} = {str(value).lower()};"
    if isinstance(value, int):
        return f"constexpr int {name} = {value};"
    return f"using {name} = {_type(value)};"
