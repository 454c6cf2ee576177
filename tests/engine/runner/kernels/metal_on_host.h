// Metal's library as far as the kernels need it, for a C++ compiler: a threadgroup's threads are fibers. Shows that
// the text is C++ and that its indices and arithmetic are right; it shows no races, no speed, and nothing of Apple's
// compiler. With -DADDRESS_SPACES (clang, syntax only) the address spaces are real, and a pointer into a wrong one is
// an error as it is in Metal.
#pragma once
#include <stddef.h>
#include <stdint.h>

#undef INFINITY
#define INFINITY __builtin_inff()
typedef unsigned int uint;
typedef unsigned short ushort;
struct uint3 { uint x, y, z; };
#ifdef ADDRESS_SPACES
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup static __attribute__((address_space(3)))
typedef uint uint4 __attribute__((ext_vector_type(4)));
typedef uint uint2 __attribute__((ext_vector_type(2)));
typedef short half;                      // any two types of their size
typedef unsigned short bfloat16_t;
static void barrier();
static unsigned exchange(unsigned value, unsigned from);
static bool any_of_warp(bool one);
static unsigned current_thread;
#else
#include "fibers.h"
#define device
#define constant
#define threadgroup static
struct alignas(16) uint4 {
  uint x, y, z, w;
  uint4() = default;
  explicit uint4(uint all) : x(all), y(all), z(all), w(all) {}
};
struct alignas(8) uint2 { uint x, y; };
typedef _Float16 half;
struct bfloat16_t {
  ushort bits;
  bfloat16_t() = default;
  explicit bfloat16_t(float f) {
    uint u;
    __builtin_memcpy(&u, &f, 4);
    bits = ushort((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
  explicit operator float() const {
    const uint u = uint(bits) << 16;
    float f;
    __builtin_memcpy(&f, &u, 4);
    return f;
  }
};
#endif
#define thread
typedef half float16_t;
struct half2 { half x, y; };

template <typename T, typename U> T as_type(U value) {
  static_assert(sizeof(T) == sizeof(U), "as_type keeps the size");
  T same;
  __builtin_memcpy(&same, &value, sizeof same);
  return same;
}
namespace fast { inline float exp2(float x) { return __builtin_exp2f(x); } }
namespace precise {
inline float log2(float x) { return __builtin_log2f(x); }
inline float tanh(float x) { return __builtin_tanhf(x); }
inline float cos(float x) { return __builtin_cosf(x); }
inline float sin(float x) { return __builtin_sinf(x); }
inline float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
}
inline float max(float a, float b) { return __builtin_fmaxf(a, b); }
inline float min(float a, float b) { return __builtin_fminf(a, b); }
// Some C libraries have functions of these names.
#define fma(a, b, c) __builtin_fmaf(a, b, c)
#define rint(x) __builtin_rintf(x)
// As MLX on a CPU, which what is packed is compared with here: halves to even, where a GPU rounds them away from zero.
#define round(x) __builtin_rintf(x)

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
inline void threadgroup_barrier(mem_flags) { barrier(); }
inline float simd_shuffle(float x, ushort lane) { return as_type<float>(exchange(as_type<uint>(x), lane)); }
inline uint simd_shuffle(uint x, ushort lane) { return exchange(x, lane); }
template <typename T> T simd_shuffle_xor(T x, ushort mask) { return simd_shuffle(x, current_thread % 32 ^ mask); }
inline bool simd_any(bool x) { return any_of_warp(x); }
