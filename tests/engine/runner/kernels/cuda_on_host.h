// CUDA as far as our kernels need it, for g++: a block's threads are fibers, and a tensor core's product is
// computed from what the 32 lanes of a warp hand in. Shows that indices and arithmetic are right; it
// shows no races and no speed.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include "fibers.h"

// Declared here: to read C++'s own headers takes longer than to compile most kernels.
#undef INFINITY
#define INFINITY __builtin_inff()
extern "C" {
float cosf(float), exp2f(float), expf(float), fmaf(float, float, float), fmaxf(float, float), fminf(float, float);
float log2f(float), rintf(float), sinf(float), sqrtf(float), tanhf(float);
}
template <typename T> const T& min(const T& a, const T& b) { return b < a ? b : a; }
template <typename T> const T& max(const T& a, const T& b) { return a < b ? b : a; }

#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __shared__ static
struct Dim3 { unsigned x, y, z; };
static Dim3 blockIdx, gridDim;
#define threadIdx (Dim3{current_thread, 0, 0})
#define blockDim (Dim3{threads_in_block, 1, 1})
struct Shape { int v[8]; int operator[](int i) const { return v[i]; } };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

static unsigned float_bits(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
static float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
static unsigned __float_as_uint(float f) { return float_bits(f); }
static float __int_as_float(int i) { return __uint_as_float(unsigned(i)); }
struct __nv_bfloat16 {
  unsigned short v;
  __nv_bfloat16() : v(0) {}
  explicit __nv_bfloat16(float f) { const unsigned u = float_bits(f); v = (u + 0x7fff + ((u >> 16) & 1)) >> 16; }
  explicit operator float() const { const unsigned u = unsigned(v) << 16; float f; memcpy(&f, &u, 4); return f; }
};
typedef _Float16 __half;
template <typename T> struct Pair { T x, y; };
typedef Pair<__nv_bfloat16> __nv_bfloat162;
typedef Pair<__half> __half2;
template <typename T> Pair<T> __hsub2(Pair<T> a, Pair<T> b) {
  return {T(float(a.x) - float(b.x)), T(float(a.y) - float(b.y))};
}
template <typename T> Pair<T> __hfma2(Pair<T> a, Pair<T> b, Pair<T> c) {
  return {T(fmaf(float(a.x), float(b.x), float(c.x))), T(fmaf(float(a.y), float(b.y), float(c.y)))};
}
static __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__nv_bfloat16(a), __nv_bfloat16(b)}; }
static __half2 __floats2half2_rn(float a, float b) { return {__half(a), __half(b)}; }
static unsigned __byte_perm(unsigned low, unsigned high, unsigned pick) {
  const unsigned long long bytes = low | (unsigned long long)high << 32;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= unsigned(bytes >> (8 * (pick >> (4 * i) & 7)) & 0xff) << (8 * i);
  return out;
}
template <typename T> T __ldcs(const T* at) {
  if (reinterpret_cast<size_t>(at) % sizeof(T)) __builtin_trap();
  return *at;
}

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <typename T> T __ldcg(const T* at) { return __ldcs(at); }
static float2 __half22float2(__half2 pair) { return {float(pair.x), float(pair.y)}; }

// Some C libraries have functions of these names.
#define __cosf(x) cosf(x)
// What MLX packs on a CPU is what kernels are compared with here: it rounds halves to even, on a GPU away from zero.
#define roundf(x) rintf(x)
#define __sinf(x) sinf(x)
#define __expf(x) expf(x)
static float rsqrtf(float x) { return 1.0f / sqrtf(x); }
template <typename T> Pair<T> __hmul2(Pair<T> a, Pair<T> b) {
  return {T(float(a.x) * float(b.x)), T(float(a.y) * float(b.y))};
}

// Copies to shared memory are made when their thread waits for them: who reads before that reads what was there.
struct Copy { void* to; const void* from; };
static const unsigned MOST_COPIES = 256;
static Copy under_way[MOST_THREADS][MOST_COPIES];
static unsigned number_under_way[MOST_THREADS];
static void copy_async(void* to, const void* from) {
  if (reinterpret_cast<size_t>(to) % 16 || reinterpret_cast<size_t>(from) % 16) __builtin_trap();
  unsigned& number = number_under_way[current_thread];
  if (number == MOST_COPIES) __builtin_trap();
  under_way[current_thread][number++] = {to, from};
}
static uint4 read_once(const uint4* from) { return __ldcs(from); }
static void wait_for_copies() {
  unsigned& number = number_under_way[current_thread];
  for (unsigned i = 0; i < number; ++i) memcpy(under_way[current_thread][i].to, under_way[current_thread][i].from, 16);
  number = 0;
}

static void __syncthreads() { barrier(); }
static float __shfl_sync(unsigned, float x, int lane) { return __uint_as_float(exchange(float_bits(x), lane)); }
static unsigned __shfl_sync(unsigned, unsigned x, int lane) { return exchange(x, lane); }
template <typename T> T __shfl_xor_sync(unsigned all, T x, int mask) {
  return __shfl_sync(all, x, current_thread % 32 ^ mask);
}
static int __shfl_up_sync(unsigned, int x, unsigned by) {
  const unsigned lane = current_thread % 32;
  return int(exchange(unsigned(x), lane < by ? lane : lane - by));
}
static bool __any_sync(unsigned, bool x) { return any_of_warp(x); }
static unsigned __ballot_sync(unsigned, bool x) {
  unsigned all = 0;
  for (unsigned lane = 0; lane < 32; ++lane) all |= exchange(x, lane) << lane;
  return all;
}
static unsigned __reduce_max_sync(unsigned, unsigned x) {
  unsigned most = 0;
  for (unsigned lane = 0; lane < 32; ++lane) most = max(most, exchange(x, lane));
  return most;
}
static int __popc(unsigned x) { return __builtin_popcount(x); }
static void __syncwarp() { exchange(0, 0); }
// A thread runs until it waits for others, so that nothing comes between.
static int atomicAdd(int* at, int by) { const int was = *at; *at += by; return was; }
static unsigned atomicInc(unsigned* at, unsigned most) {
  const unsigned was = *at;
  *at = was >= most ? 0 : was + 1;
  return was;
}
// Blocks run one after the other, so that each sees all that those before it wrote.
static void __threadfence() {}
static int __syncthreads_or(int one) { return any_of_block(one); }

// mma.sync m16n8k16: which elements of A [16, 16], B [16, 8] and C [16, 8] a lane holds is in PTX's manual.
struct Fragment { unsigned a[4], b[2]; };
static Fragment fragments[2][32][32];
template <typename T> float element(unsigned pair, int i) {
  const unsigned short bits = pair >> (16 * i);
  T value; memcpy(&value, &bits, 2);
  return float(value);
}
template <typename T>
void multiply(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1, T) {
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Fragment(&all)[32] = fragments[at_exchange[current_thread] & 1][warp];
  all[lane] = {{a0, a1, a2, a3}, {b0, b1}};
  meet(at_exchange, warp * 32, 32);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const Fragment &left = all[row % 8 * 4 + k % 8 / 2], &right = all[column * 4 + k % 8 / 2];
      c[i] += element<T>(left.a[row / 8 + k / 8 * 2], k % 2) * element<T>(right.b[k / 8], k % 2);
    }
  }
}
