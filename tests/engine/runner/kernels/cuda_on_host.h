// CUDA as far as the products of few rows need it, for g++: a block's threads are fibers, and a tensor core's
// product is computed from what the 32 lanes of a warp hand in. Shows that indices and arithmetic are right; it
// shows no races and no speed.
#pragma once
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#define __device__
#define __shared__ static
using std::min;
struct Dim3 { unsigned x; };
static Dim3 threadIdx, blockIdx, blockDim;
struct Shape { int v[8]; int operator[](int i) const { return v[i]; } };
struct alignas(16) uint4 { unsigned x, y, z, w; };

static unsigned float_bits(float f) { unsigned u; std::memcpy(&u, &f, 4); return u; }
struct __nv_bfloat16 {
  unsigned short v;
  __nv_bfloat16() : v(0) {}
  explicit __nv_bfloat16(float f) { const unsigned u = float_bits(f); v = (u + 0x7fff + ((u >> 16) & 1)) >> 16; }
  explicit operator float() const { const unsigned u = unsigned(v) << 16; float f; std::memcpy(&f, &u, 4); return f; }
};
typedef _Float16 __half;
template <typename T> struct Pair { T x, y; };
typedef Pair<__nv_bfloat16> __nv_bfloat162;
typedef Pair<__half> __half2;
template <typename T> Pair<T> __hsub2(Pair<T> a, Pair<T> b) {
  return {T(float(a.x) - float(b.x)), T(float(a.y) - float(b.y))};
}
template <typename T> Pair<T> __hfma2(Pair<T> a, Pair<T> b, Pair<T> c) {
  return {T(std::fma(float(a.x), float(b.x), float(c.x))), T(std::fma(float(a.y), float(b.y), float(c.y)))};
}
static __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__nv_bfloat16(a), __nv_bfloat16(b)}; }
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

static const size_t STACK = 1 << 16;
static ucontext_t scheduler;
static std::vector<ucontext_t> fibers;
static std::vector<char> stacks, done;
static std::vector<long> at_barrier, at_product;
static void (*body)();
static void rest() {
  const unsigned me = threadIdx.x;
  swapcontext(&fibers[me], &scheduler);
  threadIdx.x = me;
}
static void meet(std::vector<long>& count, unsigned first, unsigned number) {
  const long mine = ++count[threadIdx.x];
  for (unsigned i = first; i < first + number; ++i)
    while (!done[i] && count[i] < mine) rest();
}
static void __syncthreads() { meet(at_barrier, 0, blockDim.x); }
static void enter() { body(); done[threadIdx.x] = 1; }
static void run_block(unsigned threads, void (*kernel)()) {
  body = kernel; blockDim.x = threads;
  fibers.resize(threads); stacks.resize(threads * STACK);
  done.assign(threads, 0); at_barrier.assign(threads, 0); at_product.assign(threads, 0);
  for (unsigned i = 0; i < threads; ++i) {
    getcontext(&fibers[i]);
    fibers[i].uc_stack.ss_sp = &stacks[i * STACK]; fibers[i].uc_stack.ss_size = STACK; fibers[i].uc_link = &scheduler;
    makecontext(&fibers[i], enter, 0);
  }
  for (bool any = true; any;) {
    any = false;
    for (unsigned i = 0; i < threads; ++i)
      if (!done[i]) { any = true; threadIdx.x = i; swapcontext(&scheduler, &fibers[i]); }
  }
}

// mma.sync m16n8k16: which elements of A [16, 16], B [16, 8] and C [16, 8] a lane holds is in PTX's manual.
struct Fragment { unsigned a[4], b[2]; };
static Fragment handed_in[2][32][32];
template <typename T> float element(unsigned pair, int i) {
  const unsigned short bits = pair >> (16 * i);
  T value; std::memcpy(&value, &bits, 2);
  return float(value);
}
template <typename T>
void multiply(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1, T) {
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Fragment(&all)[32] = handed_in[at_product[threadIdx.x] & 1][warp];
  all[lane] = {{a0, a1, a2, a3}, {b0, b1}};
  meet(at_product, warp * 32, 32);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const Fragment &left = all[row % 8 * 4 + k % 8 / 2], &right = all[column * 4 + k % 8 / 2];
      c[i] += element<T>(left.a[row / 8 + k / 8 * 2], k % 2) * element<T>(right.b[k / 8], k % 2);
    }
  }
}
