"""The CUDA text of a product of few rows with what stands before and behind it in a layer.

The loops are those of :mod:`engine.runner.kernels.rows_matmul_text`, over one weight. Before the product ``x`` may be
RMS-normalized: its values are multiplied by the gains of their columns as they arrive, and each row's factor, known
once its squares are summed, is applied to the result. Behind it a bias [N] or a residual [M, N] (``added``) may be
added, or the weights may be those of a gate followed by those of an up projection: then the result is
silu(gate) * up, or gelu(gate) * up with the tanh approximation of gelu, half as wide, and a tile holds 8 rows of each.

EPS: bits of what is added to a mean square.
"""

from functools import cache
from typing import Literal, get_args

from engine.runner.kernels.rows_matmul_text import DENSE_LOOP, HEADER, QUANTIZED_LOOP, TENSOR_CORES

Activation = Literal["silu", "gelu"]
Ending = Literal["plain", "bias", "residual", Activation]

GAINS = r"""
__device__ inline unsigned times(unsigned x, unsigned gain) {
  typedef __nv_bfloat162 Pair;
  return bits_as<unsigned>(__hmul2(bits_as<Pair>(x), bits_as<Pair>(gain)));
}
__device__ inline float squares(unsigned pair) {
  const float a = __uint_as_float(pair << 16), b = __uint_as_float(pair & 0xffff0000u);
  return a * a + b * b;
}
__device__ inline float squares(uint4 x) { return squares(x.x) + squares(x.y) + squares(x.z) + squares(x.w); }
__device__ inline uint4 times(uint4 x, const __nv_bfloat16* gain) {
  const uint4 by = *reinterpret_cast<const uint4*>(gain);
  return make_uint4(times(x.x, by.x), times(x.y, by.y), times(x.z, by.z), times(x.w, by.w));
}
"""

_SETUP = r"""
  constexpr int R = 16 * RT, C = 8 * MT, WARPS = MT > 2 ? 8 : 16;
  __shared__ float parts[WARPS][C][R + 1];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, g = lane >> 2, t = lane & 3;
  const int M = x_shape[0], K = x_shape[1];
#define CHOSEN(a) a##0
#define X_ROW(m) (size_t)min((m) * 8 + g, M - 1)
  float c[RT][MT][4];
  EACH(r, RT) EACH(m, MT) EACH(i, 4) c[r][m][i] = 0.0f;
"""

_SCALING = r"""
  const T* const s0 = reinterpret_cast<const T*>(w0 + (size_t)w0_shape[0] * (K * BITS / 32));
  const T* const b0 = s0 + (size_t)w0_shape[0] * (K / GROUP);
"""

_ONE = r"""
  const int N = w0_shape[0], n0 = blockIdx.x * R;
#define W_ROW(r, h) (size_t)min(n0 + (r) * 16 + (h) * 8 + g, N - 1)
"""
_GATED = r"""
  const int N = w0_shape[0] / 2, n0 = blockIdx.x * R / 2;
#define W_ROW(r, h) (size_t)((h) * N + min(n0 + (r) * 8 + g, N - 1))
"""

_NORM_SETUP = r"""
  __shared__ float row_squares[WARPS][C];
  float square[MT];
  EACH(m, MT) square[m] = 0.0f;
"""
_NORM_ARRIVED = "square[m] += squares({values}); {values} = times({values}, gain + {column});"
_NORM_JOIN = r"""
  EACH(m, MT) {
    square[m] += __shfl_xor_sync(0xffffffffu, square[m], 1);
    square[m] += __shfl_xor_sync(0xffffffffu, square[m], 2);
    if (t == 0) row_squares[warp][m * 8 + g] = square[m];
  }
"""
_NORM_FACTOR = r"""
      float squares = 0.0f;
      for (int v = 0; v < warps; ++v) squares += row_squares[v][m];
      const float factor = rsqrtf(squares / K + __int_as_float(EPS));
"""

_JOIN = r"""
  EACH(r, RT) EACH(m, MT) EACH(i, 4)
    parts[warp][m * 8 + t * 2 + (i & 1)][r * 16 + (i >> 1) * 8 + g] = c[r][m][i];
  @NORM_JOIN@
  __syncthreads();
  for (int i = threadIdx.x; i < @COLUMNS@ * C; i += blockDim.x) {
    const int n = i % (@COLUMNS@), m = i / (@COLUMNS@);
    if (m < M && n0 + n < N) {
      const size_t at = (size_t)m * N + n0 + n;
      @FACTOR@
      @RESULT@
    }
  }
"""
_SUM = r"""
      float sum = 0.0f;
#pragma unroll 4
      for (int v = 0; v < warps; ++v) sum += parts[v][m][n];
"""
_GATES = r"""
      float gate = 0.0f, up = 0.0f;
      const int row = n / 8 * 16 + n % 8;
#pragma unroll 4
      for (int v = 0; v < warps; ++v) { gate += parts[v][m][row]; up += parts[v][m][row + 8]; }
      gate *= factor; up *= factor;
"""
ACTIVATIONS: dict[str, str] = {
    "silu": "const float activated = gate / (1.0f + __expf(-gate));",
    "gelu": r"""
      const float turned = tanhf(0.7978845608028654f * (gate + 0.044715f * gate * gate * gate));
      const float activated = 0.5f * gate * (1.0f + turned);
""",
}
"""What ``activated`` is of a ``gate``."""
_ACTIVATED = "out[at] = T(activated * up);"
_RESULTS: dict[Ending, str] = {
    "plain": _SUM + "out[at] = T(sum * factor);",
    "bias": _SUM + "out[at] = T(sum * factor + float(added[n0 + n]));",
    "residual": _SUM + "out[at] = T(sum * factor + float(added[at]));",
    "silu": _GATES + ACTIVATIONS["silu"] + _ACTIVATED,
    "gelu": _GATES + ACTIVATIONS["gelu"] + _ACTIVATED,
}


@cache
def fused_text(*, packed: bool, normed: bool, ending: Ending) -> tuple[str, str]:
    """Body and header of one kernel."""
    first, second = QUANTIZED_LOOP if packed else DENSE_LOOP
    values, column = ("v", "at + j * 8") if packed else ("b", "k + u * 32 + t * 8")
    arrived = _NORM_ARRIVED.format(values=values, column=column) if normed else ""
    gated = ending in get_args(Activation)
    join = _JOIN.replace("@COLUMNS@", "R / 2" if gated else "R").replace("@NORM_JOIN@", _NORM_JOIN if normed else "")
    factor = _NORM_FACTOR if normed else "const float factor = 1.0f;"
    join = join.replace("@FACTOR@", factor).replace("@RESULT@", _RESULTS[ending])
    setup = _SETUP + (_SCALING if packed else "") + (_GATED if gated else _ONE) + (_NORM_SETUP if normed else "")
    return setup + first + arrived + second + join, TENSOR_CORES + HEADER + (GAINS if normed else "")
