"""The CUDA text of products of 17 to 32 rows, ``x [M, K] @ w [N, K].T``: tensor cores, every weight read once.

Weights go to registers as in :mod:`engine.runner.kernels.rows_matmul_text`, a chunk ahead of the one that is
multiplied. With so many rows ``x`` counts too: a block copies chunks of it to shared memory, and its WN warps of 16
weight rows each read them there; WK such groups share a chunk. Where the tiles of weights alone would not fill the
chip, several blocks share K: each writes the sums of its part, and :data:`ADD_PARTS` adds them up.

Constants: T (element type), MT (tiles of 8 rows of x), WN, WK. The last needs K to be a multiple of 32.
"""

from functools import cache
from typing import Literal

from engine.runner.kernels.rows_matmul_text import TENSOR_CORES, UNROLLED

Ending = Literal["plain", "bias", "gated", "parts"]

ASYNC_COPIES = r"""
// 16 bytes for shared memory: there once their thread has waited and the block has met.
__device__ inline void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::
    "r"((unsigned)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
"""

_BODY = r"""
  constexpr int R = 16 * WN, C = 8 * MT, THREADS = 32 * WN * WK, CHUNK = 128 * WK, ROW = CHUNK / 8 + 4;
  constexpr int STAGED = 2 * C * ROW * 16, SUMS = WK * C * (R + 1) * 4;
  __shared__ uint4 memory[((STAGED > SUMS ? STAGED : SUMS) + 15) / 16];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int wn = warp % WN, wk = warp / WN;
  const int M = x_shape[0], K = x_shape[1], N = w_shape[0] @HALVED@, chunks = (K + CHUNK - 1) / CHUNK;
  const int tiles = (N + @COLUMNS@ - 1) / (@COLUMNS@), parts = gridDim.x / tiles;
  const int tile = blockIdx.x % tiles, part = blockIdx.x / tiles;
  const int first = part * chunks / parts, last = (part + 1) * chunks / parts;
  const T* rows[2];
  EACH(h, 2) rows[h] = w + (size_t)(@WEIGHT_ROW@) * K + wk * 128 + t * 8;
  float c[MT][4];
  EACH(m, MT) EACH(i, 4) c[m][i] = 0.0f;
  uint4 a[2][4][2];
  auto fetch = [&](int chunk, int buffer) {
    for (int i = threadIdx.x; i < C * (CHUNK / 8); i += THREADS) {
      const int m = i / (CHUNK / 8), k = i % (CHUNK / 8), at = min(chunk * CHUNK + k * 8, K - 8);
      copy_async(memory + (buffer * C + m) * ROW + k, x + (size_t)min(m, M - 1) * K + at);
    }
    // Behind K weights are zeros, so that it does not matter what x is there.
    EACH(u, 4) EACH(h, 2) {
      const int k = chunk * CHUNK + u * 32;
      a[buffer][u][h] = k + wk * 128 < K ? __ldcs(reinterpret_cast<const uint4*>(rows[h] + k)) : make_uint4(0, 0, 0, 0);
    }
  };
  auto multiplied = [&](int chunk, int buffer) {
    wait_for_copies();
    __syncthreads();
    if (chunk + 1 < last) fetch(chunk + 1, buffer ^ 1);
    // A row of a chunk is followed by 64 bytes of nothing: so a warp's reads do not meet in one bank.
    const uint4* xs = memory + (buffer * C + g) * ROW + wk * 16 + t;
    EACH(u, 4) EACH(m, MT) {
      const uint4 b = xs[m * 8 * ROW + u * 4];
      uint4(&v)[2] = a[buffer][u];
      multiply(c[m], v[0].x, v[1].x, v[0].y, v[1].y, b.x, b.y, T());
      multiply(c[m], v[0].z, v[1].z, v[0].w, v[1].w, b.z, b.w, T());
    }
  };
  fetch(first, 0);
  for (int chunk = first; chunk < last; chunk += 2) {
    multiplied(chunk, 0);
    if (chunk + 1 < last) multiplied(chunk + 1, 1);
  }
  __syncthreads();
  float (*sums)[C][R + 1] = reinterpret_cast<float (*)[C][R + 1]>(memory);
  EACH(m, MT) EACH(i, 4) sums[wk][m * 8 + t * 2 + (i & 1)][wn * 16 + (i >> 1) * 8 + g] = c[m][i];
  __syncthreads();
  for (int i = threadIdx.x; i < (@COLUMNS@) * C; i += THREADS) {
    const int j = i % (@COLUMNS@), m = i / (@COLUMNS@), n = tile * (@COLUMNS@) + j;
    if (m < M && n < N) {
      @RESULT@
    }
  }
"""
_SUM = "float sum = 0.0f; EACH(v, WK) sum += sums[v][m][j];"
_RESULTS: dict[Ending, str] = {
    "plain": f"{_SUM} out[(size_t)m * N + n] = T(sum);",
    "bias": f"{_SUM} out[(size_t)m * N + n] = T(sum + float(bias[n]));",
    "parts": f"{_SUM} out[((size_t)part * M + m) * N + n] = sum;",
    "gated": r"""
      float gate = 0.0f, up = 0.0f;
      const int row = j / 8 * 16 + j % 8;
      EACH(v, WK) { gate += sums[v][m][row]; up += sums[v][m][row + 8]; }
      out[(size_t)m * N + n] = T(gate / (1.0f + __expf(-gate)) * up);
""",
}
_ROW = "min(tile * R + wn * 16 + h * 8 + g, N - 1)"
_GATED_ROW = "h * N + min(tile * (R / 2) + wn * 8 + g, N - 1)"


@cache
def staged_text(ending: Ending) -> tuple[str, str]:
    """Body and header of a product. A gate's weights and an up projection's lie one behind the other."""
    gated = ending == "gated"
    body = _BODY.replace("@HALVED@", "/ 2" if gated else "").replace("@COLUMNS@", "R / 2" if gated else "R")
    body = body.replace("@WEIGHT_ROW@", _GATED_ROW if gated else _ROW).replace("@RESULT@", _RESULTS[ending])
    return body, TENSOR_CORES + ASYNC_COPIES + UNROLLED


_ADD_PARTS = r"""
  // A block has a row; a thread 4 columns of it, Q times. N is a multiple of 4.
  const int S = parts_shape[0], M = parts_shape[1], N = parts_shape[2];
  float v[Q][4];
  EACH(q, Q) EACH(i, 4) v[q][i] = 0.0f;
  EACH(q, Q) {
    const int n = (q * blockDim.x + threadIdx.x) * 4;
    const size_t at = (size_t)blockIdx.x * N + n;
    if (n < N) {
      float before[4];
      EACH(i, 4) before[i] = float(residual[at + i]);
#pragma unroll 4
      for (int s = 0; s < S; ++s) {
        const uint4 some = *reinterpret_cast<const uint4*>(parts + (size_t)s * M * N + at);
        v[q][0] += __uint_as_float(some.x); v[q][1] += __uint_as_float(some.y);
        v[q][2] += __uint_as_float(some.z); v[q][3] += __uint_as_float(some.w);
      }
      EACH(i, 4) {
        const T sum = T(v[q][i] + before[i]);
        total[at + i] = sum;
        v[q][i] = float(sum);
      }
    }
  }
"""
_NORM = r"""
  __shared__ float squares[32];
  float square = 0.0f;
  EACH(q, Q) EACH(i, 4) square += v[q][i] * v[q][i];
  for (int mask = 16; mask > 0; mask >>= 1) square += __shfl_xor_sync(0xffffffffu, square, mask);
  if ((threadIdx.x & 31) == 0) squares[threadIdx.x >> 5] = square;
  __syncthreads();
  square = 0.0f;
  for (int i = 0; i < int(blockDim.x >> 5); ++i) square += squares[i];
  const float factor = rsqrtf(square / N + __int_as_float(EPS));
  EACH(q, Q) {
    const int n = (q * blockDim.x + threadIdx.x) * 4;
    const size_t at = (size_t)blockIdx.x * N + n;
    if (n < N) {
      EACH(i, 4) v[q][i] *= factor * float(gain[n + i]);
      EACH(i, 4) normed[at + i] = T(v[q][i]);
    }
  }
"""


def add_parts_text(*, normed: bool) -> tuple[str, str]:
    """Body and header of the sum of parts [S, M, N] and a residual [M, N], and of its RMS norm.

    Constants: T, Q (times 4 columns of a thread) and, with the norm, EPS (bits of what is added to a mean square).
    """
    return _ADD_PARTS + (_NORM if normed else ""), UNROLLED
