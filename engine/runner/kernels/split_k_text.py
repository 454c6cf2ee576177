"""The CUDA texts of products of 17 to 32 rows whose K is split over blocks, and of what follows them in a layer.

Weights go to registers as in :mod:`engine.runner.kernels.rows_matmul_text`, a chunk ahead of the one that is
multiplied. With so many rows ``x`` counts too: a block copies chunks of it to shared memory, where its four warps,
of 16 weight rows each, read them.

Constants: T (element type), MT (tiles of 8 rows of x).
"""

from engine.runner.kernels.rows_matmul_text import TENSOR_CORES, UNROLLED

TILE, CHUNK, THREADS = 64, 128, 128
"""Weight rows of a block, 16 to a warp; what of K it multiplies between two meetings of its warps; its threads."""

COPIES = r"""
// Weights, that are read once: past the L1, and as much of a row at once as the L2 takes.
__device__ inline uint4 read_once(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
    : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}
// 16 bytes for shared memory: there once their thread has waited and the block has met.
__device__ inline void copy_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::
    "r"((unsigned)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
"""

_GEOMETRY = f"""
#define TILE {TILE}
#define CHUNK {CHUNK}
#define THREADS {THREADS}
"""
PARTS_HEADER = TENSOR_CORES + COPIES + UNROLLED + _GEOMETRY
PARTS = r"""
  // x [M, K], w [N, K], out float [parts, M, N]. K is a multiple of 32.
  constexpr int C = 8 * MT, ROW = CHUNK / 8 + 4;
  __shared__ uint4 memory[2 * C * ROW];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int M = x_shape[0], K = x_shape[1], N = w_shape[0];
  const int chunks = (K + CHUNK - 1) / CHUNK, tiles = (N + TILE - 1) / TILE;
  const int tile = blockIdx.x % tiles, part = blockIdx.x / tiles, parts = gridDim.x / tiles;
  const int first = part * chunks / parts, last = (part + 1) * chunks / parts;
  const T* rows[2];
  EACH(h, 2) rows[h] = w + (size_t)min(tile * TILE + warp * 16 + h * 8 + g, N - 1) * K + t * 8;
  float c[MT][4];
  EACH(m, MT) EACH(i, 4) c[m][i] = 0.0f;
  uint4 a[2][4][2];
  auto fetch = [&](int chunk, int buffer) {
    EACH(i, C * (CHUNK / 8) / THREADS) {
      const int m = (i * THREADS + threadIdx.x) / (CHUNK / 8), k = threadIdx.x % (CHUNK / 8);
      const T* from = x + (size_t)min(m, M - 1) * K + min(chunk * CHUNK + k * 8, K - 8);
      copy_async(memory + (buffer * C + m) * ROW + k, from);
    }
    // Behind K weights are zeros, so that x, which is clamped there, adds nothing if it is finite.
    EACH(u, 4) EACH(h, 2) {
      const int k = chunk * CHUNK + u * 32;
      a[buffer][u][h] = k < K ? read_once(reinterpret_cast<const uint4*>(rows[h] + k)) : make_uint4(0, 0, 0, 0);
    }
  };
  auto multiplied = [&](int chunk, int buffer) {
    wait_for_copies();
    __syncthreads();
    if (chunk + 1 < last) fetch(chunk + 1, buffer ^ 1);
    // A row of a chunk is followed by 64 bytes of nothing: so a warp's reads do not meet in one bank.
    const uint4* xs = memory + (buffer * C + g) * ROW + t;
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
  EACH(m, MT) EACH(i, 4) {
    const int row = m * 8 + t * 2 + (i & 1), column = tile * TILE + warp * 16 + (i >> 1) * 8 + g;
    if (row < M && column < N) out[((size_t)part * M + row) * N + column] = c[m][i];
  }
"""

_ADD_PARTS = r"""
  // parts float [S, M, N], residual [M, N]: a block has a row, a thread 4 columns of it, Q times. N is a multiple of 4.
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

SILU_AND_MUL = r"""
  // joined [M, 2 N], out [M, N]: a thread has 4 columns. N is a multiple of 4.
  const int N = joined_shape[1] / 2, n = (blockIdx.x * blockDim.x + threadIdx.x) % (N / 4) * 4;
  const int m = (blockIdx.x * blockDim.x + threadIdx.x) / (N / 4);
  if (m < joined_shape[0]) {
    const T* gates = joined + (size_t)m * 2 * N + n;
    float gate[4], up[4];
    EACH(i, 4) { gate[i] = float(gates[i]); up[i] = float(gates[N + i]); }
    EACH(i, 4) out[(size_t)m * N + n + i] = T(gate[i] / (1.0f + __expf(-gate[i])) * up[i]);
  }
"""


def add_parts_text(*, normed: bool) -> tuple[str, str]:
    """Body and header of the sum of parts [S, M, N] and a residual [M, N], and of its RMS norm.

    Constants: T, Q (times 4 columns of a thread) and, with the norm, EPS (bits of what is added to a mean square).
    """
    return _ADD_PARTS + (_NORM if normed else ""), UNROLLED
