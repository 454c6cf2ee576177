"""One kernel text in two dialects: the macros that make it CUDA or Metal, and kernels from it.

A text names its built-ins in capitals (``BLK_X``, ``SHFL_XOR``, …); each dialect's header defines them.
"""

import re
import struct
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import mlx.core as mx

from engine.runner.kernels.kernel_cache import cached_kernel

CUDA = r"""
#define FUNCTION static __device__ __forceinline__
#define GLOBAL
#define PRIVATE
#define SHARED __shared__
#define BARRIER __syncthreads()
#define BLK_X int(blockIdx.x)
#define BLK_Y int(blockIdx.y)
#define BLK_Z int(blockIdx.z)
#define GRID_X int(gridDim.x)
#define TID int(threadIdx.x)
#define LANE int(threadIdx.x & 31)
#define WARP int(threadIdx.x >> 5)
#define SHFL_XOR(x, mask) __shfl_xor_sync(0xffffffffu, x, mask)
#define SHFL(x, lane) __shfl_sync(0xffffffffu, x, lane)
#define ANY(x) __any_sync(0xffffffffu, x)
#define EXP2(x) exp2f(x)
#define LOG2(x) log2f(x)
#define TANH(x) tanhf(x)
#define FMAX(a, b) fmaxf(a, b)
#define FMIN(a, b) fminf(a, b)
#define FMA(a, b, c) fmaf(a, b, c)
#define RINT(x) rintf(x)
#define ROUND(x) roundf(x)
#define RSQRT(x) rsqrtf(x)
#define COS(x) __cosf(x)
#define SIN(x) __sinf(x)
#define AS_FLOAT(x) __uint_as_float(x)
#define AS_UINT(x) __float_as_uint(x)
#define CONSTANT(bits) __int_as_float(bits)
#define ZERO4 make_uint4(0u, 0u, 0u, 0u)
template <typename T> struct Packed;
template <> struct Packed<__nv_bfloat16> {
  static __device__ __forceinline__ void unpack(unsigned word, float* f) {
    f[0] = AS_FLOAT(word << 16); f[1] = AS_FLOAT(word & 0xffff0000u); }
};
template <> struct Packed<__half> {
  static __device__ __forceinline__ void unpack(unsigned word, float* f) {
    float2 pair = __half22float2(*reinterpret_cast<__half2*>(&word)); f[0] = pair.x; f[1] = pair.y; }
};
template <> struct Packed<float> {
  static __device__ __forceinline__ void unpack(unsigned word, float* f) { f[0] = AS_FLOAT(word); }
};
"""

METAL = r"""
#define FUNCTION static inline
#define GLOBAL device
#define PRIVATE thread
#define SHARED threadgroup
#define BARRIER threadgroup_barrier(mem_flags::mem_threadgroup)
#define BLK_X int(threadgroup_position_in_grid.x)
#define BLK_Y int(threadgroup_position_in_grid.y)
#define BLK_Z int(threadgroup_position_in_grid.z)
#define GRID_X int(threadgroups_per_grid.x)
#define TID int(thread_index_in_threadgroup)
#define LANE int(thread_index_in_simdgroup)
#define WARP int(simdgroup_index_in_threadgroup)
#define SHFL_XOR(x, mask) simd_shuffle_xor(x, ushort(mask))
#define SHFL(x, lane) simd_shuffle(x, ushort(lane))
#define ANY(x) simd_any(x)
#define EXP2(x) fast::exp2(x)
#define LOG2(x) precise::log2(x)
#define TANH(x) precise::tanh(x)
#define FMAX(a, b) max(a, b)
#define FMIN(a, b) min(a, b)
#define FMA(a, b, c) fma(a, b, c)
#define RINT(x) rint(x)
#define ROUND(x) round(x)
#define RSQRT(x) precise::rsqrt(x)
#define COS(x) precise::cos(x)
#define SIN(x) precise::sin(x)
#define AS_FLOAT(x) as_type<float>(x)
#define AS_UINT(x) as_type<unsigned>(x)
#define CONSTANT(bits) as_type<float>(int(bits))
#define ZERO4 uint4(0u)
template <typename T> struct Packed;
template <> struct Packed<bfloat16_t> {
  static void unpack(uint word, thread float* f) {
    f[0] = AS_FLOAT(word << 16); f[1] = AS_FLOAT(word & 0xffff0000u); }
};
template <> struct Packed<half> {
  static void unpack(uint word, thread float* f) {
    half2 pair = as_type<half2>(word); f[0] = float(pair.x); f[1] = float(pair.y); }
};
template <> struct Packed<float> {
  static void unpack(uint word, thread float* f) { f[0] = AS_FLOAT(word); }
};
"""

_METAL_BUILT_INS = {
    "BLK_[XYZ]": "threadgroup_position_in_grid",
    "GRID_X": "threadgroups_per_grid",
    "TID": "thread_index_in_threadgroup",
    "LANE": "thread_index_in_simdgroup",
    "WARP": "simdgroup_index_in_threadgroup",
}


class Kernel(Protocol):
    """A kernel of MLX, ready to be launched."""

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
        """Launch it: ``grid`` counts threads, ``template`` gives the constants of the text."""


def kernels_available() -> bool:
    """Whether kernels can run: MLX computes on a GPU by default."""
    on_gpu = mx.default_device().type == mx.DeviceType.gpu
    return on_gpu and bool(mx.metal.is_available() or mx.cuda.is_available())


@cache
def make_kernel(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str, header: str = "") -> Kernel:
    """The kernel with ``source`` as its body, for this machine's GPU. Compiled at its first launch.

    ``header`` holds what stands before the kernel; the dialect's macros come before that.
    """
    cuda = mx.cuda.is_available()
    make: Callable[..., Any] = cached_kernel if cuda else mx.fast.metal_kernel
    body, before = kernel_text(source, header, cuda=cuda)
    kernel: Kernel = make(name=name, input_names=list(inputs), output_names=list(outputs), source=body, header=before)
    return kernel


def kernel_text(source: str, header: str, *, cuda: bool) -> tuple[str, str]:
    """Body and header as MLX takes them, in one dialect."""
    body, before = compact(source), compact(header)
    if not cuda:
        # MLX declares those of Metal's built-in arguments whose names it finds in the body.
        named = [built_in for macro, built_in in _METAL_BUILT_INS.items() if re.search(rf"\b{macro}\b", body + before)]
        body = f"// {' '.join(named)}\n{body}"
    return body, compact(CUDA if cuda else METAL) + before


def compact(text: str) -> str:
    """Without comments and indents: MLX hashes a kernel's whole text at every launch."""
    text = re.sub(r"//[^\n]*", "", text)
    return "\n".join(line.strip() for line in text.splitlines() if line.strip()) + "\n"


def float_bits(value: float) -> int:
    """The bits of a float32, as an integer template argument that ``CONSTANT`` turns back.

    A constant in an array would be read from the host's memory: that is where MLX on CUDA keeps arrays of up to
    eight bytes, and every block of every launch would wait for it.
    """
    bits: int = struct.unpack("i", struct.pack("f", value))[0]
    return bits
