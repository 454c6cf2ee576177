"""The CUDA texts of products over routed experts: which rows each expert has, and the two products of its MLP.

A *pair* is a token and one of its experts; ``indices`` [P] has the pairs' experts, token by token. A *tile* is up to
C pairs of one expert: its weights are read once for them. Tiles come from a list (:data:`ROUTE`), or, where there are
few pairs, each block finds its tile by looking at all of them. Rows of every result lie in the pairs' order.

Weights are w [E, N, K]; for the first product gate and up projection are two arrays, and a warp's tile of 16 weight
rows has 8 of each, so that what is written is their activation. As in
:mod:`engine.runner.kernels.rows_matmul_text` a lane takes 16 neighbouring bytes of its weight row and the same k of x.
A step of K that does not fit ends with weights of zero: K is a multiple of what a lane takes.

Constants: T (element type), MT (tiles of 8 rows of x), RT (tiles of 16 weight rows of a
warp), WN (warps beside each other on weight rows), WK (warps that share K), DEPTH (steps of weights under way, even),
BITS and GROUP.
"""

from functools import cache
from typing import Literal

from engine.runner.kernels.rows_matmul_text import HEADER, TENSOR_CORES
from engine.runner.kernels.split_k_text import COPIES

Format = Literal["dense", "affine", "mxfp4"]
Ending = Literal["plain", "silu", "gelu", "oai"]
"""What follows a product: nothing, or the activation of gate and up."""

SCANNED_PAIRS = 64
"""Pairs that a block looks at itself; more take a list of tiles."""

LIST_OF_TILES = r"""
  // indices [P] -> tiles int [L, 2]: expert and rows (0: none); order int [L, C]: pairs, the last again behind the end.
  __shared__ int counts[@EXPERTS@], starts[@EXPERTS@], sums[32];
  const int P = @PAIRS@, L = P < @EXPERTS@ + P / C ? P : @EXPERTS@ + P / C, lane = threadIdx.x & 31, e = threadIdx.x;
  for (int i = e; i < @EXPERTS@; i += blockDim.x) counts[i] = 0;
  __syncthreads();
  for (int p = e; p < P; p += blockDim.x) atomicAdd(&counts[int(indices[p])], 1);
  __syncthreads();
  const int n = e < @EXPERTS@ ? counts[e] : 0, own = (n + C - 1) / C;
  int upto = own;
  for (int d = 1; d < 32; d *= 2) {
    const int before = __shfl_up_sync(0xffffffffu, upto, d);
    if (lane >= d) upto += before;
  }
  if (lane == 31) sums[e >> 5] = upto;
  __syncthreads();
  int first = upto - own, total = 0;
  for (int v = 0; v < int(blockDim.x >> 5); ++v) {
    if (v < e >> 5) first += sums[v];
    total += sums[v];
  }
  for (int i = 0; i < own; ++i) {
    tiles[(first + i) * 2] = e;
    tiles[(first + i) * 2 + 1] = min(C, n - i * C);
  }
  for (int i = total + e; i < L; i += blockDim.x) { tiles[i * 2] = 0; tiles[i * 2 + 1] = 0; }
  if (e < @EXPERTS@) { counts[e] = 0; starts[e] = first * C; }
  __syncthreads();
  for (int p = e; p < P; p += blockDim.x) {
    const int of = int(indices[p]);
    order[starts[of] + atomicAdd(&counts[of], 1)] = p;
  }
  __syncthreads();
  for (int i = n; i < own * C; ++i) order[first * C + i] = order[first * C + n - 1];
"""
ROUTE = LIST_OF_TILES.replace("@PAIRS@", "indices_shape[0]").replace("@EXPERTS@", "E")
"""One block of at least E threads. Constants: E (experts), C (rows of a tile)."""

_FORMATS = r"""
// Values of a lane in the order of unpacked pairs: (0, 4) (1, 5) (2, 6) (3, 7) for 4 bits, (0, 2) (1, 3) (4, 6) (5, 7)
// for 8; as they are for weights that are not packed.
template <int BITS> __device__ inline uint4 ordered(uint4 v) {
  if (BITS == 16) return v;
  const unsigned p = BITS == 4 ? v.z : v.y, q = BITS == 4 ? v.y : v.z;
  return make_uint4(__byte_perm(v.x, p, 0x5410), __byte_perm(v.x, p, 0x7632), __byte_perm(q, v.w, 0x5410),
                    __byte_perm(q, v.w, 0x7632));
}
__device__ inline unsigned word_of(uint4 v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
"""
_MXFP4 = r"""
// Pair i of a word of e2m1 values: sign, exponent and mantissa where bfloat16 has them, 2^126 times too small.
__device__ inline unsigned unpack_fp4(unsigned word, int i, unsigned factor) {
  typedef __nv_bfloat162 Pair;
  const unsigned sign = (word << (12 - 4 * i)) & 0x80008000u;
  const unsigned rest = (i < 2 ? word << (6 - 4 * i) : word >> (4 * i - 6)) & 0x01c001c0u;
  return bits_as<unsigned>(__hmul2(bits_as<Pair>(sign | rest), bits_as<Pair>(factor)));
}
"""

_SETUP = r"""
  constexpr int R = 16 * RT, C = 8 * MT, COLUMNS = @GATED@ ? R / 2 : R, WARPS = WN * WK, WIDTH = WN * COLUMNS;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int wn = warp % WN, wk = warp / WN;
  const int K = x_shape[1], N = w0_shape[1], across = (N + WIDTH - 1) / WIDTH;
  const int P = indices_shape[0], per_row = P / x_shape[0];
  const int entry = blockIdx.x / across, n0 = blockIdx.x % across * WIDTH, n1 = n0 + wn * COLUMNS;
"""
_LISTED = r"""
  // Both are read at once: which pairs there are need not wait for how many.
  int mine[MT];
  EACH(m, MT) mine[m] = order[entry * C + m * 8 + g];
  const int expert = tiles[entry * 2], count = tiles[entry * 2 + 1];
  if (count == 0) return;
#define PAIR(m) order[entry * C + (m)]
"""
_SCANNED = r"""
  // The first of up to C pairs of an expert stands for them; the blocks of the others leave.
  __shared__ int found[WARPS][C];
  const int expert = int(indices[entry]);
  const int one = lane < P ? int(indices[lane]) : -1, other = lane + 32 < P ? int(indices[lane + 32]) : -1;
  const unsigned low = __ballot_sync(0xffffffffu, one == expert), high = __ballot_sync(0xffffffffu, other == expert);
  const unsigned below = (1u << lane) - 1, before = (1u << (entry & 31)) - 1;
  const int place = entry < 32 ? __popc(low & before) : __popc(low) + __popc(high & before);
  if (place % C) return;
  const int count = min(C, __popc(low) + __popc(high) - place);
  const int first = __popc(low & below) - place, second = __popc(low) + __popc(high & below) - place;
  if (one == expert && first >= 0 && first < C) found[warp][first] = lane;
  if (other == expert && second >= 0 && second < C) found[warp][second] = lane + 32;
  __syncwarp();
#define PAIR(m) found[warp][min(m, count - 1)]
  int mine[MT];
  EACH(m, MT) mine[m] = PAIR(m * 8 + g);
"""

_WEIGHTS = r"""
  // Weight row of tile r and half h, within the expert's.
#define W_ROW(r, h) min(@GATED@ ? n1 + (r) * 8 + g : n1 + (r) * 16 + (h) * 8 + g, N - 1)
#define ARRAY(a, h) (@GATED@ && (h) ? a##@SECOND@ : a##0)
  int starts[RT][2];
  EACH(r, RT) EACH(h, 2) starts[r][h] = W_ROW(r, h) * K;
  const size_t skipped = (size_t)expert * N * K;
  float c[RT][MT][4];
  EACH(r, RT) EACH(m, MT) EACH(i, 4) c[r][m][i] = 0.0f;
"""
_DENSE = r"""
  constexpr int PACKED = 16, STEP = 64, UNITS = STEP / 32;
  const T* w[2];
  EACH(h, 2) w[h] = ARRAY(w, h) + skipped;
  uint4 words[DEPTH][RT][2][UNITS];
  auto fetch_weights = [&](int buffer, int k) {
    EACH(u, UNITS) EACH(r, RT) EACH(h, 2) {
      const int at = k + u * 32 + t * 8;
      const uint4* from = reinterpret_cast<const uint4*>(w[h] + starts[r][h] + at);
      words[buffer][r][h][u] = at < K ? __ldcs(from) : make_uint4(0, 0, 0, 0);
    }
  };
  auto weights = [&](int buffer, int r, int h, int j, unsigned* a) {
    EACH(i, 4) a[i] = word_of(words[buffer][r][h][j], i);
  };
#define X_AT(k, j) min((k) + (j) * 32 + t * 8, K - 8)
"""
_AFFINE = r"""
  constexpr int PACKED = BITS, VALUES = 128 / BITS, STEP = 4 * VALUES, UNITS = STEP / 32;
  const unsigned* w[2];
  const unsigned short* ss[2];
  const unsigned short* bs[2];
  EACH(h, 2) {
    w[h] = ARRAY(w, h) + skipped * BITS / 32;
    ss[h] = reinterpret_cast<const unsigned short*>(ARRAY(s, h)) + skipped / GROUP;
    bs[h] = reinterpret_cast<const unsigned short*>(ARRAY(b, h)) + skipped / GROUP;
  }
  uint4 words[DEPTH][RT][2];
  unsigned short scale[DEPTH][RT][2], bias[DEPTH][RT][2];
  auto fetch_weights = [&](int buffer, int k) {
    const int at = min(k + t * VALUES, K - VALUES);
    const bool inside = k + t * VALUES < K;
    EACH(r, RT) EACH(h, 2) {
      const unsigned from = starts[r][h] + at;
      words[buffer][r][h] = __ldcs(reinterpret_cast<const uint4*>(w[h] + from / (32 / BITS)));
      scale[buffer][r][h] = inside ? ss[h][from / GROUP] : 0;
      bias[buffer][r][h] = inside ? bs[h][from / GROUP] : 0;
    }
  };
  auto weights = [&](int buffer, int r, int h, int j, unsigned* a) {
    const unsigned by = scale[buffer][r][h] * 0x10001u, plus = bias[buffer][r][h] * 0x10001u;
    EACH(i, 4)
      a[i] = BITS == 4 ? unpack<BITS>(word_of(words[buffer][r][h], j), i, by, plus, T())
                       : unpack<BITS>(word_of(words[buffer][r][h], j * 2 + i / 2), i & 1, by, plus, T());
  };
#define X_AT(k, j) (min((k) + t * VALUES, K - VALUES) + (j) * 8)
"""
_FP4 = r"""
  constexpr int PACKED = 4, VALUES = 32, STEP = 128, UNITS = 4;
  const unsigned* w[2];
  const unsigned char* ss[2];
  EACH(h, 2) { w[h] = ARRAY(w, h) + skipped / 8; ss[h] = ARRAY(s, h) + skipped / 32; }
  uint4 words[DEPTH][RT][2];
  unsigned char scale[DEPTH][RT][2];
  auto fetch_weights = [&](int buffer, int k) {
    const int at = min(k + t * VALUES, K - VALUES);
    EACH(r, RT) EACH(h, 2) {
      const unsigned from = starts[r][h] + at;
      words[buffer][r][h] = __ldcs(reinterpret_cast<const uint4*>(w[h] + from / 8));
      scale[buffer][r][h] = k + t * VALUES < K ? ss[h][from / 32] : 0;
    }
  };
  auto weights = [&](int buffer, int r, int h, int j, unsigned* a) {
    // A scale of e stands for 2^(e - 127); behind K it is 0, and all is 2^126 times too small: no more than nothing.
    const unsigned e = scale[buffer][r][h], factor = (e == 0 ? 0u : (e + 126) << 7) * 0x10001u;
    EACH(i, 4) a[i] = unpack_fp4(word_of(words[buffer][r][h], j), i, factor);
  };
#define X_AT(k, j) (min((k) + t * VALUES, K - VALUES) + (j) * 8)
"""
_BY_FORMAT: dict[Format, str] = {"dense": _DENSE, "affine": _AFFINE, "mxfp4": _FP4}

_FEW = r"""
  const T* xs[MT];
  EACH(m, MT) xs[m] = x + (size_t)(mine[m] / per_row) * K;
  uint4 rows[2][MT][UNITS];
  auto fetch_rows = [&](int buffer, int k) {
    EACH(m, MT) EACH(j, UNITS) rows[buffer][m][j] = *reinterpret_cast<const uint4*>(xs[m] + X_AT(k, j));
  };
  auto multiplied = [&](int buffer, int side) {
    EACH(j, UNITS) {
      unsigned a[RT][2][4];
      EACH(r, RT) EACH(h, 2) weights(buffer, r, h, j, a[r][h]);
      EACH(m, MT) {
        const uint4 v = ordered<PACKED>(rows[side][m][j]);
        EACH(r, RT) {
          multiply(c[r][m], a[r][0][0], a[r][1][0], a[r][0][1], a[r][1][1], v.x, v.y, T());
          multiply(c[r][m], a[r][0][2], a[r][1][2], a[r][0][3], a[r][1][3], v.z, v.w, T());
        }
      }
    }
  };
  const int first_k = wk * STEP, stride = WK * STEP;
  EACH(d, DEPTH) if (first_k + d * stride < K) fetch_weights(d, first_k + d * stride);
  if (first_k < K) fetch_rows(0, first_k);
#pragma unroll 1
  for (int k = first_k; k < K; k += DEPTH * stride)
    EACH(d, DEPTH) {
      const int at = k + d * stride;
      if (at < K) {
        if (at + stride < K) fetch_rows((d + 1) & 1, at + stride);
        multiplied(d, d & 1);
        if (at + DEPTH * stride < K) fetch_weights(d, at + DEPTH * stride);
      }
    }
  __shared__ float parts[WARPS][C][R + 1];
  __shared__ int pairs[C];
  EACH(r, RT) EACH(m, MT) EACH(i, 4)
    parts[warp][m * 8 + t * 2 + (i & 1)][r * 16 + (i >> 1) * 8 + g] = c[r][m][i];
  if (warp == 0 && t == 0) EACH(m, MT) pairs[m * 8 + g] = mine[m];
  __syncthreads();
  for (int i = threadIdx.x; i < WIDTH * count; i += 32 * WARPS) {
    const int m = i / WIDTH, column = i % WIDTH, of = column / COLUMNS, n = n0 + column;
    const int row = @GATED@ ? column % COLUMNS / 8 * 16 + column % 8 : column % COLUMNS;
    if (n < N) {
      float one = 0.0f, two = 0.0f;
      EACH(v, WK) {
        one += parts[v * WN + of][m][row];
        if (@GATED@) two += parts[v * WN + of][m][row + 8 * @GATED@];
      }
      @BIASES@
      out[(size_t)pairs[m] * N + n] = T(@RESULT@);
    }
  }
"""
"""Few rows to an expert: warps share K, each lane loads its own values of x, a step ahead."""

_MANY = r"""
  // A chunk of x lies in shared memory, where its 16 bytes of unit j and lane t are the (4 j + t)th of a row.
  constexpr int ROW = STEP / 8 + 4, THREADS = 32 * WARPS, ALL = C * STEP / 8, COPIES = (ALL + THREADS - 1) / THREADS;
  __shared__ uint4 memory[2 * C * ROW];
  __shared__ int pairs[C];
  for (int i = threadIdx.x; i < C; i += THREADS) pairs[i] = PAIR(i);
  __syncthreads();
  const int unit = threadIdx.x % (STEP / 8), to = PACKED == 16 ? unit : unit % UNITS * 4 + unit / UNITS;
  const int full = (count + 7) / 8 * 8, chunks = (K + STEP - 1) / STEP;
  int from[COPIES];
  EACH(i, COPIES) from[i] = pairs[min((i * THREADS + int(threadIdx.x)) / (STEP / 8), C - 1)] / per_row * K;
  auto copy_rows = [&](int chunk) {
    EACH(i, COPIES) {
      const int m = (i * THREADS + threadIdx.x) / (STEP / 8);
      const T* at = x + (size_t)from[i] + min(chunk * STEP + unit * 8, K - 8);
      if (m < full) copy_async(memory + ((chunk & 1) * C + m) * ROW + to, at);
    }
  };
  auto multiplied = [&](int buffer) {
    const uint4* xs = memory + ((buffer & 1) * C + g) * ROW + t;
    EACH(j, UNITS) {
      unsigned a[RT][2][4];
      EACH(r, RT) EACH(h, 2) weights(buffer, r, h, j, a[r][h]);
      EACH(m, MT) if (m * 8 < count) {
        const uint4 v = ordered<PACKED>(xs[m * 8 * ROW + j * 4]);
        EACH(r, RT) {
          multiply(c[r][m], a[r][0][0], a[r][1][0], a[r][0][1], a[r][1][1], v.x, v.y, T());
          multiply(c[r][m], a[r][0][2], a[r][1][2], a[r][0][3], a[r][1][3], v.z, v.w, T());
        }
      }
    }
  };
  EACH(d, DEPTH) if (d < chunks) fetch_weights(d, d * STEP);
  copy_rows(0);
#pragma unroll 1
  for (int first = 0; first < chunks; first += DEPTH)
    EACH(d, DEPTH) {
      const int chunk = first + d;
      if (chunk < chunks) {
        wait_for_copies();
        __syncthreads();
        if (chunk + 1 < chunks) copy_rows(chunk + 1);
        multiplied(d);
        if (chunk + DEPTH < chunks) fetch_weights(d, (chunk + DEPTH) * STEP);
      }
    }
  __syncthreads();
  // Results go through shared memory, so that rows are written 16 bytes at a time.
  constexpr int LINE = WIDTH + 8;
  static_assert(C * LINE * sizeof(T) <= sizeof memory, "results fit the memory of x");
  T* lines = reinterpret_cast<T*>(memory);
  EACH(r, RT) EACH(m, MT) EACH(i, @GATED@ ? 2 : 4) {
    const int column = wn * COLUMNS + (@GATED@ ? r * 8 + g : r * 16 + (i >> 1) * 8 + g), n = min(n0 + column, N - 1);
    float one = c[r][m][i], two = c[r][m][@GATED@ ? i + 2 : i];
    @BIASES@
    lines[(m * 8 + t * 2 + (i & 1)) * LINE + column] = T(@RESULT@);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count * (WIDTH / 8); i += THREADS) {
    const int m = i / (WIDTH / 8), column = i % (WIDTH / 8) * 8;
    if (n0 + column < N)
      *reinterpret_cast<uint4*>(out + (size_t)pairs[m] * N + n0 + column) =
        *reinterpret_cast<const uint4*>(lines + m * LINE + column);
  }
"""
"""Many rows to an expert: each weight is unpacked once for all of them, and x goes through shared memory."""

_RESULTS: dict[Ending, str] = {
    "plain": "one",
    "silu": "one / (1.0f + __expf(-one)) * two",
    "gelu": "0.5f * one * (1.0f + tanhf(0.7978845608028654f * (one + 0.044715f * one * one * one))) * two",
    "oai": "one / (1.0f + __expf(-__int_as_float(ALPHA) * one)) * (two + 1.0f)",
}
_CLIPPED = r"""
      const float most = __int_as_float(LIMIT);
      one = one < most ? one : most;
      two = two > most ? most : two < -most ? -most : two;
"""


@cache
def experts_text(
    kind: Format, ending: Ending, *, listed: bool, many: bool, biased: bool
) -> tuple[tuple[str, ...], str, str]:
    """Names of the inputs, body and header of one product."""
    gated = ending != "plain"
    numbers = ("0", "1") if gated else ("0",)
    parts = {"dense": "w", "affine": "wsb", "mxfp4": "ws"}[kind] + ("a" if biased else "")
    names = ("x", "indices", *(("tiles", "order") if listed else ()), *(part + n for part in parts for n in numbers))
    biases = "".join(
        f"{value} += float(a{number}[(size_t)expert * N + n]);"
        for value, number in zip(("one", "two"), numbers, strict=False)
    )
    biases = (biases if biased else "") + (_CLIPPED if ending == "oai" else "")
    body = _SETUP + (_LISTED if listed else _SCANNED) + _WEIGHTS + _BY_FORMAT[kind] + (_MANY if many else _FEW)
    for mark, text in (
        ("@BIASES@", biases), ("@RESULT@", _RESULTS[ending]), ("@GATED@", str(int(gated))), ("@SECOND@", numbers[-1]),
    ):  # fmt: skip
        body = body.replace(mark, text)
    header = TENSOR_CORES + (COPIES if many else "") + HEADER + _FORMATS + (_MXFP4 if kind == "mxfp4" else "")
    return names, body, header
