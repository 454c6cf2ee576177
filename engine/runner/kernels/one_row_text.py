"""The CUDA text of a product of one row with weights of 4 bits, and with what stands before and behind it in a layer.

With one row of ``x`` most columns of a tensor core's B are free. Here they keep apart what has scales of its own: a
warp multiplies 4 weight rows, and the 16 rows of its A are those times 4 parts of 128 k, each of two groups, for which
B has a column each (column 2 * part + group). So weights need no unpacking but two instructions a pair, which make
them the numbers 128 + q of bfloat16 (1024 + q of float16); scales, biases and that offset are applied to the sums of a
group. A step of a warp reads 256 neighbouring bytes of each row.

Of a block's WARPS = TILES * SPLITS, SPLITS share K of 4 rows. ``x`` lies in shared memory, its pairs ordered as a word
has them: (0, 4) (1, 5) (2, 6) (3, 7). Inputs and endings are those of :mod:`engine.runner.kernels.fused_rows_text`.

Constants: T, K (a multiple of 128), TILES, SPLITS, DEPTH (steps on their way at once) and EPS. Groups are of 64.
"""

from functools import cache
from typing import get_args

from engine.runner.kernels.fused_rows_text import ACTIVATIONS, GAINS, Activation, Ending
from engine.runner.kernels.rows_matmul_text import HEADER, TENSOR_CORES
from engine.runner.kernels.split_k_text import COPIES

_HEADER = r"""
__device__ inline unsigned magic(__nv_bfloat16) { return 0x43004300u; }
__device__ inline unsigned magic(__half) { return 0x64006400u; }
__device__ inline float offset(__nv_bfloat16) { return 128.0f; }
__device__ inline float offset(__half) { return 1024.0f; }
__device__ inline float first_of(unsigned pair, __nv_bfloat16) { return __uint_as_float(pair << 16); }
__device__ inline float second_of(unsigned pair, __nv_bfloat16) { return __uint_as_float(pair & 0xffff0000u); }
__device__ inline float first_of(unsigned pair, __half) { return __half22float2(bits_as<__half2>(pair)).x; }
__device__ inline float second_of(unsigned pair, __half) { return __half22float2(bits_as<__half2>(pair)).y; }
"""

_SETUP = r"""
  constexpr int PARTS = K / 128, STEPS = (PARTS + 3) / 4, PIECES = STEPS * 64;
  constexpr int WARPS = TILES * SPLITS, THREADS = 32 * WARPS, MINE = (STEPS + SPLITS - 1) / SPLITS;
  constexpr int LOADS = (PIECES + THREADS - 1) / THREADS;
  __shared__ uint4 xs[PIECES + 4];  // the last four are zeros
  __shared__ float2 sums[STEPS * 4];  // of x, by groups
  __shared__ float parts[WARPS][4];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int tile = blockIdx.x * TILES + warp / SPLITS, share = warp % SPLITS, rows = w0_shape[0];
"""
_ONE = r"""
  const int N = rows, n = tile * 4 + (g & 3);
  const size_t row = min(n, N - 1);
"""
_GATED = r"""
  const int N = rows / 2, n = tile * 2 + (g & 1);
  const size_t row = (size_t)(g >> 1 & 1) * N + min(n, N - 1);
"""

_FETCH = r"""
  // Rows of A: this lane's weight row, of parts g / 4 and, 8 rows below, g / 4 + 2. Of its C it needs what has its
  // row's and its part's columns: lanes whose t is that part.
  const bool needed = (t & 1) == g >> 2;
  const uint4* const words = reinterpret_cast<const uint4*>(w0 + row * (K / 8)) + t;
  const unsigned* const scales = w0 + (size_t)rows * (K / 8) + row * PARTS;
  const unsigned* const biases = scales + (size_t)rows * PARTS;
  uint4 a[DEPTH][2];
  unsigned scale[DEPTH], bias[DEPTH];
  auto fetch = [&](int d, int i) {
    const int step = share + i * SPLITS;
    if (i >= MINE || step >= STEPS) return;
    // Behind K x is 0, so that any weights will do.
    EACH(h, 2) a[d][h] = read_once(words + min(step * 4 + h * 2 + (g >> 2), PARTS - 1) * 4);
    if (needed) {
      scale[d] = scales[min(step * 4 + t, PARTS - 1)];
      bias[d] = biases[min(step * 4 + t, PARTS - 1)];
    }
  };
"""

_X = r"""
  // x is asked for first: what is asked for later arrives later.
  uint4 values[LOADS]@GAINS@;
  EACH(i, LOADS) {
    const int piece = threadIdx.x + i * THREADS;
    values[i] = piece < K / 8 ? read_once(reinterpret_cast<const uint4*>(x) + piece) : make_uint4(0, 0, 0, 0);
    @GAIN@
  }
  EACH(d, DEPTH) fetch(d, d);
  @SQUARE@
  EACH(i, LOADS) {
    const int piece = threadIdx.x + i * THREADS;
    if (piece < PIECES) {  // a warp's all, or none
      uint4 v = values[i];
      @ARRIVED@
      float sum = first_of(v.x, T()) + second_of(v.x, T()) + first_of(v.y, T()) + second_of(v.y, T())
          + first_of(v.z, T()) + second_of(v.z, T()) + first_of(v.w, T()) + second_of(v.w, T());
      EACH(j, 3) sum += __shfl_xor_sync(0xffffffffu, sum, 1 << j);
      if (piece % 8 == 0) reinterpret_cast<float*>(sums)[piece / 8] = sum;
      xs[piece] = make_uint4(__byte_perm(v.x, v.z, 0x5410), __byte_perm(v.x, v.z, 0x7632),
                             __byte_perm(v.y, v.w, 0x5410), __byte_perm(v.y, v.w, 0x7632));
    }
  }
  if (threadIdx.x < 4) xs[PIECES + threadIdx.x] = make_uint4(0, 0, 0, 0);
  @SQUARES@
  __syncthreads();
"""
_NORM = {
    "@GAINS@": ", gains[LOADS]",
    "@GAIN@": "const T* const each = gain;  // no other element type\n"
    "gains[i] = piece < K / 8 ? read_once(reinterpret_cast<const uint4*>(each) + piece) : make_uint4(0, 0, 0, 0);",
    "@SQUARE@": "__shared__ float row_squares[WARPS]; float square = 0.0f;",
    "@ARRIVED@": "square += squares(v); v = make_uint4(times(v.x, gains[i].x), times(v.y, gains[i].y),"
    " times(v.z, gains[i].z), times(v.w, gains[i].w));",
    "@SQUARES@": "EACH(j, 5) square += __shfl_xor_sync(0xffffffffu, square, 1 << j);"
    " if (lane == 0) row_squares[warp] = square;",
    "@FACTOR@": "float squares = 0.0f; EACH(v, WARPS) squares += row_squares[v];"
    " sum *= rsqrtf(squares / K + __int_as_float(EPS));",
}  # fmt: skip

_LOOP = r"""
  // Column g of B is part g / 2, group g % 2: lanes whose t is of that group hold its x, the others zeros.
  const bool mine = (g & 1) == t >> 1;
  const uint4* const own = xs + (mine ? (g >> 1) * 16 + t * 4 : PIECES);
  unsigned mask = 0x000f000fu;
  asm volatile("" : "+r"(mask));  // in a register: then one instruction masks and adds
  float sum = 0.0f;
#pragma unroll (MINE > 8 ? 1 : 8)
  for (int first = 0; first < MINE; first += DEPTH) EACH(d, DEPTH) {
    const int i = first + d, step = share + i * SPLITS;
    if (i < MINE && step < STEPS) {
      const uint4 low = a[d][0], high = a[d][1];
      const unsigned word[2][4] = {{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
      const unsigned by = scale[d], to = bias[d];
      fetch(d, i + DEPTH);
      float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      EACH(j, 4) {
        const uint4 b = own[(mine ? step * 64 : 0) + j];
#define PAIR(h, p) (((word[h][j] >> (4 * p)) & mask) | magic(T()))
        multiply(c, PAIR(0, 0), PAIR(1, 0), PAIR(0, 1), PAIR(1, 1), b.x, b.y, T());
        multiply(c, PAIR(0, 2), PAIR(1, 2), PAIR(0, 3), PAIR(1, 3), b.z, b.w, T());
      }
      if (needed) {
        const float2 of_x = sums[step * 4 + t];
        const float s0 = first_of(by, T()), s1 = second_of(by, T());
        sum += s0 * (t & 2 ? c[2] : c[0]) + s1 * (t & 2 ? c[3] : c[1]);
        sum += of_x.x * (first_of(to, T()) - offset(T()) * s0) + of_x.y * (second_of(to, T()) - offset(T()) * s1);
      }
    }
  }
"""

_JOIN = r"""
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  sum += __shfl_xor_sync(0xffffffffu, sum, 16);  // now of row g % 4, in every lane
  if (SPLITS > 1) {
    if (t == 0 && g < 4) parts[warp][g] = sum;
    __syncthreads();
    if (share == 0) {
      sum = 0.0f;
      EACH(v, SPLITS) sum += parts[warp + v][g & 3];
    }
  }
  @FACTOR@
"""
_WRITE = "if (share == 0 && t == 0 && g < 4 && n < N) out[n] = T({value});"
_GATES = r"""
  const float gate = sum, up = __shfl_xor_sync(0xffffffffu, sum, 8);
  if (share == 0 && t == 0 && g < 2 && n < N) {
    @ACTIVATION@
    out[n] = T(activated * up);
  }
"""


@cache
def one_row_text(*, normed: bool, ending: Ending) -> tuple[str, str]:
    """Body and header of one kernel."""
    text = _SETUP
    if ending in get_args(Activation):
        text += _GATED + _FETCH + _X + _LOOP + _JOIN + _GATES.replace("@ACTIVATION@", ACTIVATIONS[ending])
    else:
        value = "sum" if ending == "plain" else "sum + float(added[n])"
        text += _ONE + _FETCH + _X + _LOOP + _JOIN + _WRITE.format(value=value)
    for place, part in _NORM.items():
        text = text.replace(place, part if normed else "")
    return text, TENSOR_CORES + COPIES + HEADER + _HEADER + (GAINS if normed else "")
