"""The CUDA texts around routed experts: which experts a token takes and with what weight, and the sum of their rows.

Constants: T (element type), E (experts), TOP (experts of a token, at most 32), and in a list of tiles C (rows of one).
"""

from engine.runner.kernels.routed_experts_text import LIST_OF_TILES
from engine.runner.kernels.rows_matmul_text import UNROLLED

_CHOOSE = r"""
  // logits [M, E] -> indices [M, ROW], scores float [M, ROW]: a warp has a token. Of equal logits the first is taken.
  {
  constexpr int V = (E + 31) / 32, ROW = TOP@MORE@;
  constexpr unsigned ALL = 0xffffffffu;
  const int M = logits_shape[0], lane = threadIdx.x & 31, warps = blockDim.x >> 5;
  for (int m = blockIdx.x * warps + (threadIdx.x >> 5); m < M; m += gridDim.x * warps) {
    // 16 bits that sort as the values do, then the expert, backwards.
    const unsigned short* row = reinterpret_cast<const unsigned short*>(logits) + (size_t)m * E;
    unsigned keys[V], mine = 0;
    EACH(v, V) {
      const int e = v * 32 + lane;
      const unsigned bits = e < E ? row[e] : 0u;
      keys[v] = e < E ? (bits & 0x8000u ? ~bits & 0xffffu : bits | 0x8000u) << 16 | (0xffffu - e) : 0u;
    }
    for (int j = 0; j < TOP; ++j) {
      unsigned best = 0;
      EACH(v, V) best = keys[v] > best ? keys[v] : best;
      best = __reduce_max_sync(ALL, best);
      EACH(v, V) keys[v] = keys[v] == best ? 0u : keys[v];
      mine = lane == j ? best : mine;
    }
    const unsigned high = mine >> 16;
    const unsigned short bits = high & 0x8000u ? high & 0x7fffu : ~high & 0xffffu;
    const int expert = 0xffff - (mine & 0xffffu);
    const float value = float(*reinterpret_cast<const T*>(&bits)), most = __shfl_sync(ALL, value, 0);
    const float own = lane < TOP ? __expf(value - most) : 0.0f;
    float sum = own;
    @OVER_ALL@
    for (int mask = 16; mask > 0; mask >>= 1) sum += __shfl_xor_sync(ALL, sum, mask);
    if (lane < TOP) {
      indices[m * ROW + lane] = expert;
      scores[m * ROW + lane] = own / sum @SCALED@;
    }
    @GATED@
  }
  }
"""
_GATED = r"""
    if (lane == TOP) {
      indices[m * ROW + TOP] = E;
      scores[m * ROW + TOP] = 1.0f / (1.0f + __expf(-float(gate[m])));
    }
"""
_OVER_ALL = r"""
    sum = 0.0f;
    for (int e = lane; e < E; e += 32) sum += __expf(float(logits[(size_t)m * E + e]) - most);
"""

_SUM = r"""
  // rows [M * TOP, D], scores float [M, TOP] -> out [M, D]: a thread has 8 columns. D is a multiple of 8.
  const int M = scores_shape[0], D = rows_shape[1], at = blockIdx.x * blockDim.x + threadIdx.x;
  const int m = at / (D / 8), n = at % (D / 8) * 8;
  if (m < M) {
    float sum[8];
    EACH(i, 8) sum[i] = 0.0f;
    EACH(j, TOP) {
      const float by = scores[m * TOP + j];
      const uint4 some = *reinterpret_cast<const uint4*>(rows + ((size_t)m * TOP + j) * D + n);
      const T* values = reinterpret_cast<const T*>(&some);
      EACH(i, 8) sum[i] += by * float(values[i]);
    }
    @SHARED@
    uint4 packed;
    T* results = reinterpret_cast<T*>(&packed);
    EACH(i, 8) results[i] = T(sum[i]);
    *reinterpret_cast<uint4*>(out + (size_t)m * D + n) = packed;
  }
"""
_SHARED = r"""
    const float part = 1.0f / (1.0f + __expf(-float(gate[m])));
    const uint4 more = *reinterpret_cast<const uint4*>(shared + (size_t)m * D + n);
    EACH(i, 8) sum[i] += part * float(reinterpret_cast<const T*>(&more)[i]);
"""


def choose_text(*, normalized: bool, scaled: bool, listed: bool, gated: bool = False) -> tuple[str, str]:
    """Body and header of a choice of experts.

    Scores are a softmax of the chosen if ``normalized``, or of all; ``scaled``: times ``scale`` [E]. ``gated``: every
    token takes expert E last, which counts by the sigmoid of its ``gate``. ``listed``: the list of tiles as well, in
    the same launch of one block.
    """
    body = _CHOOSE.replace("@OVER_ALL@", "" if normalized else _OVER_ALL)
    body = body.replace("@SCALED@", "* float(scale[expert])" if scaled else "")
    body = body.replace("@MORE@", " + 1" if gated else "").replace("@GATED@", _GATED if gated else "")
    if listed:
        tiles = LIST_OF_TILES.replace("@PAIRS@", f"logits_shape[0] * (TOP + {int(gated)})")
        body += "__syncthreads();\n" + tiles.replace("@EXPERTS@", f"(E + {int(gated)})")
    return body, UNROLLED


def sum_text(*, shared: bool) -> tuple[str, str]:
    """Body and header of the weighted sum; with a shared expert's rows by the sigmoid of their gate."""
    return _SUM.replace("@SHARED@", _SHARED if shared else ""), UNROLLED
