"""The CUDA text of what lies between a decoder layer's products: a sum into the rows, and norms of the result.

A block has a row of K elements, ``Q`` vectors of 8 for each thread, all in registers. Every step is rounded to the
rows' type, as it is where each is an operation of its own; an RMS norm rounds before its gain too.

    x     = added, or rows of chosen experts by their scores, with a shared expert's by the sigmoid of its gate
    x     = rms(x) * own_gain + rms(beside) * beside_gain           where there is something beside it
    x     = rms(x) * before                                         where there is a norm before the sum
    total = (residual + x) * scale                                  scale where there is one
    normedI = rms(total) * gainI                                    of which there are up to three

Constants: T, K, Q, EPS (bits of what is added to a mean square), TOP (experts of a token).
"""

from dataclasses import dataclass
from functools import cache

from engine.runner.kernels.rows_matmul_text import UNROLLED

_FUNCTIONS = r"""
template <typename T> __device__ inline void unpacked(uint4 raw, float* f) {
  const T* values = reinterpret_cast<const T*>(&raw);
  EACH(i, 8) f[i] = float(values[i]);
}
template <typename T> __device__ inline void store(T* to, const float* f) {
  uint4 raw;
  T* values = reinterpret_cast<T*>(&raw);
  EACH(i, 8) values[i] = T(f[i]);
  *reinterpret_cast<uint4*>(to) = raw;
}
__device__ inline float sum_of_block(float own, float* sums) {
  EACH(i, 5) own += __shfl_xor_sync(0xffffffffu, own, 16 >> i);
  __syncthreads();                                                  // all have read the sum before
  if ((threadIdx.x & 31) == 0) sums[threadIdx.x >> 5] = own;
  __syncthreads();
  float all = 0.0f;
  for (int w = 0; w < int(blockDim.x >> 5); ++w) all += sums[w];
  return all;
}
"""
_HEADER = (
    UNROLLED
    + r"""
#define EACH_VECTOR(q) EACH(q, Q) if (q * int(blockDim.x) + int(threadIdx.x) < K / 8)
#define COLUMN(q) ((q * blockDim.x + threadIdx.x) * 8)
#define READ(from, q) *reinterpret_cast<const uint4*>((from) + COLUMN(q))
"""
    + _FUNCTIONS
)
_SETUP = r"""
  __shared__ float sums[32];
  const size_t row = blockIdx.x;
  float x[Q][8], factor = 0.0f;
  uint4 @HELD@;
  EACH_VECTOR(q) { @HOLD@ }
"""
_ADDED = r"""
  EACH_VECTOR(q) unpacked<T>(READ(added + row * K, q), x[q]);
"""
_EXPERTS = r"""
  EACH_VECTOR(q) {
    EACH(i, 8) x[q][i] = 0.0f;
    EACH(j, TOP) {
      const float by = scores[row * TOP + j];
      float some[8];
      unpacked<T>(READ(rows + (row * TOP + j) * K, q), some);
      EACH(i, 8) x[q][i] += by * some[i];
    }
    @SHARED@
    EACH(i, 8) x[q][i] = float(T(x[q][i]));
  }
"""
_SHARED = r"""
    const float part = 1.0f / (1.0f + __expf(-float(gate[row])));
    float more[8];
    unpacked<T>(READ(shared + row * K, q), more);
    EACH(i, 8) x[q][i] += part * more[i];
"""
_FACTOR = r"""
  factor = 0.0f;
  EACH_VECTOR(q) EACH(i, 8) factor += @X@[q][i] * @X@[q][i];
  factor = rsqrtf(sum_of_block(factor, sums) / K + __int_as_float(EPS));
"""
_NORMALIZE = (
    _FACTOR
    + r"""
  EACH_VECTOR(q) {
    float gain[8];
    unpacked<T>(@GAIN@[q], gain);
    EACH(i, 8) @X@[q][i] = float(T(float(T(@X@[q][i] * factor)) * gain[i]));
  }
"""
)
_BESIDE = r"""
  float other[Q][8];
  EACH_VECTOR(q) unpacked<T>(held_beside[q], other[q]);
  @NORMALIZE@
  EACH_VECTOR(q) EACH(i, 8) x[q][i] = float(T(x[q][i] + other[q][i]));
"""
_TOTAL = r"""
  EACH_VECTOR(q) {
    float before[8];
    unpacked<T>(held_residual[q], before);
    EACH(i, 8) x[q][i] = float(T(before[i] + x[q][i]));
    @SCALED@
    store<T>(total + row * K + COLUMN(q), x[q]);
  }
"""
_SCALED = "EACH(i, 8) x[q][i] = float(T(x[q][i] * float(scale[0])));"
_NORMED = r"""
  EACH_VECTOR(q) {
    float gain[8], result[8];
    unpacked<T>(held_@GAIN@[q], gain);
    EACH(i, 8) result[i] = float(T(x[q][i] * factor)) * gain[i];
    store<T>(@TO@ + row * K + COLUMN(q), result);
  }
"""


@dataclass(frozen=True, slots=True)
class Parts:
    """What one kernel has of all that the text knows; ``norms``: how many there are of the total."""

    experts: bool = False
    shared: bool = False
    beside: bool = False
    before: bool = False
    scaled: bool = False
    norms: int = 1

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the kernel's inputs."""
        names = ["rows", "scores"] if self.experts else ["added"]
        names += ["shared", "gate"] if self.shared else []
        names += ["beside", "own_gain", "beside_gain"] if self.beside else []
        names += ["residual", *(["before"] if self.before else []), *(["scale"] if self.scaled else [])]
        return *names, *(f"gain{i}" for i in range(self.norms))

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the kernel's outputs."""
        return "total", *(f"normed{i}" for i in range(self.norms))

    @property
    def name(self) -> str:
        """The kernel's."""
        said = [word for word in ("experts", "shared", "beside", "before", "scaled") if getattr(self, word)]
        return "_".join(["add_normed", *said, str(self.norms)])


@cache
def add_normed_text(parts: Parts) -> tuple[str, str]:
    """Body and header of the kernel. What it needs late is asked for first: its vectors are held until then."""
    early = {"rows", "scores", "added", "shared", "gate", "scale"}
    held = [name for name in parts.inputs if name not in early]
    hold = [f"held_{name}[q] = READ({name}{' + row * K' * (name in ('beside', 'residual'))}, q);" for name in held]
    body = _SETUP.replace("@HELD@", ", ".join(f"held_{name}[Q]" for name in held)).replace("@HOLD@", " ".join(hold))
    body += _EXPERTS.replace("@SHARED@", _SHARED if parts.shared else "") if parts.experts else _ADDED
    if parts.beside:
        body += _normalize("x", "own_gain")
        body += _BESIDE.replace("@NORMALIZE@", _normalize("other", "beside_gain"))
    body += _normalize("x", "before") if parts.before else ""
    body += _TOTAL.replace("@SCALED@", _SCALED if parts.scaled else "")
    body += _FACTOR.replace("@X@", "x") if parts.norms else ""
    for i in range(parts.norms):
        body += _NORMED.replace("@GAIN@", f"gain{i}").replace("@TO@", f"normed{i}")
    return body, _HEADER


def _normalize(values: str, gain: str) -> str:
    return _NORMALIZE.replace("@X@", values).replace("@GAIN@", f"held_{gain}")
