"""The CUDA text of products of few rows: ``x [M, K] @ w [N, K].T``, tensor cores, every weight read once.

A warp multiplies tiles of 16 rows of ``w`` by tiles of 8 rows of ``x`` (mma m16n8k16); the warps of a block share K
and join their sums in shared memory. In a contraction the order of k is free as long as both sides agree, so a lane
takes 16 neighbouring bytes of its weight row, and the same k of ``x``: all loads of weights are 16 bytes wide.

Weights that take the same input (``w0``, ``w1``, …) are multiplied in one launch: a block belongs to one of them, and
their results [M, N0], [M, N1], … follow each other in ``out``. Each number of weights has a text of its own, since
the host's time for a launch grows with the arrays in it.

Constants: T (element type), MT (tiles of 8 rows of x), RT (tiles of 16 rows of w per warp), BITS and GROUP. The
number of warps is the launch's, at most WARPS.
"""

from functools import cache

TENSOR_CORES = r"""
#define MULTIPLY(TYPE, PTX) \
__device__ inline void multiply(float* c, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, \
                                unsigned b1, TYPE) { \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." PTX "." PTX ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, " \
    "{%0,%1,%2,%3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) \
    : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1)); \
}
MULTIPLY(__nv_bfloat16, "bf16")
MULTIPLY(__half, "f16")
"""

UNROLLED = r"""
#define EACH(i, count) _Pragma("unroll") for (int i = 0; i < (count); ++i)
"""

HEADER = (
    UNROLLED
    + r"""
template <typename To, typename From> __device__ inline To bits_as(From from) {
  return *reinterpret_cast<To*>(&from);
}
// Pair i of the packed weights in a word, as scale * q + bias: values i and i + 4 of 4 bits, i and i + 2 of 8.
template <int BITS> __device__ inline unsigned unpack(unsigned word, int i, unsigned scale, unsigned bias,
                                                      __nv_bfloat16) {
  typedef __nv_bfloat162 Pair;
  Pair q;
  if (BITS == 4) {
    // 128 + q has no rounding in bfloat16.
    q = __hsub2(bits_as<Pair>(((word >> (4 * i)) & 0x000f000fu) | 0x43004300u), bits_as<Pair>(0x43004300u));
  } else {
    // A byte under the exponent of 2^23 is the float 2^23 + q.
    q = __floats2bfloat162_rn(bits_as<float>(__byte_perm(word, 0x4b000000u, 0x7650u + i)) - 8388608.0f,
                              bits_as<float>(__byte_perm(word, 0x4b000000u, 0x7652u + i)) - 8388608.0f);
  }
  return bits_as<unsigned>(__hfma2(q, bits_as<Pair>(scale), bits_as<Pair>(bias)));
}
template <int BITS> __device__ inline unsigned unpack(unsigned word, int i, unsigned scale, unsigned bias, __half) {
  typedef __half2 Pair;
  const unsigned mask = BITS == 4 ? 0x000f000fu : 0x00ff00ffu;
  // 1024 + q has no rounding in float16.
  const Pair q = __hsub2(bits_as<Pair>(((word >> (BITS * i)) & mask) | 0x64006400u), bits_as<Pair>(0x64006400u));
  return bits_as<unsigned>(__hfma2(q, bits_as<Pair>(scale), bits_as<Pair>(bias)));
}
"""
)

_SETUP = r"""
  constexpr int R = 16 * RT, C = 8 * MT, WARPS = MT > 2 ? 8 : 16;
  __shared__ float parts[WARPS][C][R + 1];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, g = lane >> 2, t = lane & 3;
  const int M = x_shape[0], K = x_shape[1];
  @WEIGHTS@
#define W_ROW(r, h) (size_t)min(n0 + (r) * 16 + (h) * 8 + g, N - 1)
#define X_ROW(m) (size_t)min((m) * 8 + g, M - 1)
  float c[RT][MT][4];
  EACH(r, RT) EACH(m, MT) EACH(i, 4) c[r][m][i] = 0.0f;
"""

_ONE = r"""
  const int n0 = blockIdx.x * R, N = w0_shape[0];
  constexpr size_t start = 0;
#define CHOSEN(a) a##0
"""
_SEVERAL = r"""
  int n0 = blockIdx.x * R, N = w0_shape[0], which = 0;
  size_t start = 0;
#define BLOCK_OF(place, width) \
  if (which == place - 1 && n0 >= (N + R - 1) / R * R) { \
    n0 -= (N + R - 1) / R * R; start += (size_t)M * N; N = width; which = place; \
  }
"""

_JOIN = r"""
  EACH(r, RT) EACH(m, MT) EACH(i, 4)
    parts[warp][m * 8 + t * 2 + (i & 1)][r * 16 + (i >> 1) * 8 + g] = c[r][m][i];
  __syncthreads();
  for (int i = threadIdx.x; i < R * C; i += blockDim.x) {
    const int n = i % R, m = i / R;
    if (m < M && n0 + n < N) {
      float sum = 0.0f;
#pragma unroll 4
      for (int v = 0; v < warps; ++v) sum += parts[v][m][n];
      out[start + (size_t)m * N + n0 + n] = T(sum);
    }
  }
"""

DENSE_LOOP = (
    r"""
  // K is a multiple of 64: a warp takes two steps of 32 at a time, 8 values a lane in each.
  const T* w[RT][2];
  const T* xs[MT];
  EACH(r, RT) EACH(h, 2) w[r][h] = CHOSEN(w) + W_ROW(r, h) * K + t * 8;
  EACH(m, MT) xs[m] = x + X_ROW(m) * K + t * 8;
#pragma unroll (4 / MT)
  for (int k = warp * 64; k < K; k += warps * 64) {
    uint4 a[2][RT][2];
    EACH(u, 2) EACH(r, RT) EACH(h, 2) a[u][r][h] = __ldcs(reinterpret_cast<const uint4*>(w[r][h] + k + u * 32));
    EACH(u, 2) EACH(m, MT) {
      uint4 b = *reinterpret_cast<const uint4*>(xs[m] + k + u * 32);
""",
    r"""
      EACH(r, RT) {
        multiply(c[r][m], a[u][r][0].x, a[u][r][1].x, a[u][r][0].y, a[u][r][1].y, b.x, b.y, T());
        multiply(c[r][m], a[u][r][0].z, a[u][r][1].z, a[u][r][0].w, a[u][r][1].w, b.z, b.w, T());
      }
    }
  }
""",
)
"""Of weights that are not packed; between its two parts ``b`` holds 8 values of row ``m`` of x."""

QUANTIZED_LOOP = (
    r"""
  // Affine weights: uint32 words [N, K * BITS / 32], scales s and biases b [N, K / GROUP]. K is a multiple of VALUES,
  // which a lane takes of a step of four lanes: where the last step is shorter, x is 0.
  constexpr int VALUES = 128 / BITS, STEP = 4 * VALUES;
  const unsigned* w[RT][2];
  const unsigned short* ss[RT][2];
  const unsigned short* bs[RT][2];
  const T* xs[MT];
  EACH(r, RT) EACH(h, 2) {
    w[r][h] = CHOSEN(w) + W_ROW(r, h) * (K * BITS / 32);
    ss[r][h] = reinterpret_cast<const unsigned short*>(CHOSEN(s)) + W_ROW(r, h) * (K / GROUP);
    bs[r][h] = reinterpret_cast<const unsigned short*>(CHOSEN(b)) + W_ROW(r, h) * (K / GROUP);
  }
  EACH(m, MT) xs[m] = x + X_ROW(m) * K;
#pragma unroll 1
  for (int k = warp * STEP; k < K; k += warps * STEP) {
    unsigned words[RT][2][4], scale[RT][2], bias[RT][2];
    const int at = min(k + t * VALUES, K - VALUES), group = at / GROUP;
    const bool inside = k + t * VALUES < K;
    EACH(r, RT) EACH(h, 2) {
      const uint4 a = __ldcs(reinterpret_cast<const uint4*>(w[r][h] + at / VALUES * 4));
      words[r][h][0] = a.x; words[r][h][1] = a.y; words[r][h][2] = a.z; words[r][h][3] = a.w;
      scale[r][h] = ss[r][h][group] * 0x10001u;
      bias[r][h] = bs[r][h][group] * 0x10001u;
    }
    EACH(j, VALUES / 8) {
      unsigned a[RT][2][4];
      EACH(r, RT) EACH(h, 2) EACH(i, 4)
        a[r][h][i] = BITS == 4 ? unpack<BITS>(words[r][h][j], i, scale[r][h], bias[r][h], T())
                               : unpack<BITS>(words[r][h][j * 2 + i / 2], i & 1, scale[r][h], bias[r][h], T());
      EACH(m, MT) {
        uint4 v = inside ? *reinterpret_cast<const uint4*>(xs[m] + at + j * 8) : make_uint4(0, 0, 0, 0);
""",
    r"""
        // The same pairs of x: (0, 4) (1, 5) (2, 6) (3, 7) for 4 bits, (0, 2) (1, 3) (4, 6) (5, 7) for 8.
        const unsigned p = BITS == 4 ? v.z : v.y, q = BITS == 4 ? v.y : v.z;
        const unsigned x0 = __byte_perm(v.x, p, 0x5410), x1 = __byte_perm(v.x, p, 0x7632);
        const unsigned x2 = __byte_perm(q, v.w, 0x5410), x3 = __byte_perm(q, v.w, 0x7632);
        EACH(r, RT) {
          multiply(c[r][m], a[r][0][0], a[r][1][0], a[r][0][1], a[r][1][1], x0, x1, T());
          multiply(c[r][m], a[r][0][2], a[r][1][2], a[r][0][3], a[r][1][3], x2, x3, T());
        }
      }
    }
  }
""",
)
"""Of packed weights; between its two parts ``v`` holds 8 values of row ``m`` of x."""


@cache
def product_text(num_weights: int, *, packed: bool) -> str:
    """The body of a product of so many weights."""
    loop = QUANTIZED_LOOP if packed else DENSE_LOOP
    weights = _ONE if num_weights == 1 else _several(num_weights)
    return _SETUP.replace("@WEIGHTS@", weights) + "".join(loop) + _JOIN


def _several(num_weights: int) -> str:
    """Which of several weights a block belongs to."""
    passed = "\n".join(f"BLOCK_OF({place}, w{place}_shape[0])" for place in range(1, num_weights))
    others = "".join(f"which == {place} ? a##{place} : " for place in range(num_weights - 1))
    return f"{_SEVERAL}{passed}\n#define CHOSEN(a) ({others}a##{num_weights - 1})\n"
