"""How a launch of decode attention ends: what joins the parts of a context that was split over blocks.

On CUDA the last of a row's blocks to store its part joins them all, in the same launch. Counters of arrivals, one for
each row and block of heads, are all zeros between launches: the last arrival sets its counter back.
"""

from enum import Enum
from functools import cache


class Ending(Enum):
    """What becomes of the parts."""

    SECOND_LAUNCH = ""
    """``REDUCE`` joins them. One text for any number of splits."""
    ONE_SPLIT = "_alone"
    """There are none: no output but the result."""
    LAST_BLOCK = "_last"
    """The last block joins them. CUDA only: Metal has no fence between a grid's threadgroups."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the kernel's outputs."""
        if self is Ending.SECOND_LAUNCH:
            return "out", "part", "sums"
        return ("out", "parts") if self is Ending.LAST_BLOCK else ("out",)


# A row's parts lie side by side for the splits that have tokens, at the end of what the row has room for; behind all
# parts lie the sums. The other blocks have nothing to do and do not arrive: all know how many there are.
_PARTS = r"""
  const int splits = position < 0 ? 0 : (length - origin + per_split - 1) / per_split;
  const size_t unused = (size_t)row * kv_heads * GROUP * (grid - splits);
  float* part = parts + unused * VALUE_DIM;
  float* sums = parts + (size_t)gridDim.z * kv_heads * GROUP * grid * VALUE_DIM + 2 * unused;
"""
_JOIN = r"""
  if (splits > 1)
    join_last<T, THREADS, VALUE_DIM>(out, part, sums, arrivals, first_head, @HEADS@, splits,
                                     [&](int i) { return SINK(first_head % (kv_heads * GROUP) + i); });
"""
_WHOLE = {"@LAUNCHED@": "splits = GRID_X", "@SPLITS@": "splits", "@EMPTY@": "splits == 1", "@ELSE@": "else"}
_FILLINGS = {
    Ending.SECOND_LAUNCH: _WHOLE | {"@PARTS@": "", "@JOIN@": ""},
    Ending.ONE_SPLIT: _WHOLE
    | {"@LAUNCHED@": "splits = 1", "@PARTS@": "float *const part = nullptr, *const sums = nullptr;", "@JOIN@": ""},
    Ending.LAST_BLOCK: {
        "@LAUNCHED@": "grid = GRID_X", "@SPLITS@": "grid", "@EMPTY@": "split == 0", "@ELSE@": "else if (false)",
        "@PARTS@": _PARTS, "@JOIN@": _JOIN,
    },
}  # fmt: skip

# The arithmetic is REDUCE's, in the same order. A warp has up to 128 elements of a head at a time, a lane four. What
# other multiprocessors wrote is read past L1. atomicInc sets a counter that has reached `splits - 1` back to zero.
JOIN_LAST = r"""
template <typename T, int THREADS, int DIM, typename S>
FUNCTION void join_last(T* out, const float* part, const float* sums, const int* arrivals, size_t first_head, int heads,
                        int splits, S sink_of) {
  constexpr int CHUNKS = (DIM + 127) / 128, AHEAD = 8;
  __threadfence();
  __syncthreads();
  const unsigned others = splits - 1;
  unsigned* arrived = reinterpret_cast<unsigned*>(const_cast<int*>(arrivals)) + blockIdx.z * gridDim.y + blockIdx.y;
  if (!__syncthreads_or(threadIdx.x == 0 && atomicInc(arrived, others) == others)) return;
  __threadfence();
  const int lane = LANE;
  for (int item = WARP; item < heads * CHUNKS; item += THREADS / 32) {
    const size_t head = first_head + item / CHUNKS;
    const int d = item % CHUNKS * 128 + lane * 4;
    const float2* pairs = reinterpret_cast<const float2*>(sums) + head * splits;
    const float4* from = reinterpret_cast<const float4*>(part + head * splits * DIM + (d < DIM ? d : 0));
    float top = LOWEST, sum = 0.0f, x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    float2 pair = make_float2(LOWEST, 0.0f);
    if (lane < splits) pair = __ldcg(pairs + lane);
#pragma unroll 1
    for (int base = 0; base < splits; base += 32 * AHEAD) {
      float tops[AHEAD];
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        tops[i] = LOWEST;
        if (base + i * 32 + lane < splits) tops[i] = __ldcg(&pairs[base + i * 32 + lane].x);
      }
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) top = FMAX(top, tops[i]);
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) top = FMAX(top, SHFL_XOR(top, mask));
#pragma unroll 1
    for (int base = 0; base < splits; base += 32) {
      float weight = 0.0f;
      if (base + lane < splits) { weight = EXP2(pair.x - top); sum += pair.y * weight; }
      if (base + 32 + lane < splits) pair = __ldcg(pairs + base + 32 + lane);   // on its way meanwhile
#pragma unroll 1
      for (int first = 0; first < 32 && base + first < splits; first += AHEAD) {
        float4 read[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
          read[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
          if (base + first + i < splits) read[i] = __ldcg(from + (size_t)(base + first + i) * (DIM / 4));
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {                           // behind the last split are weights of zero
          const float by = SHFL(weight, first + i);
          x[0] += by * read[i].x; x[1] += by * read[i].y; x[2] += by * read[i].z; x[3] += by * read[i].w;
        }
      }
    }
#pragma unroll
    for (int mask = 16; mask > 0; mask >>= 1) sum += SHFL_XOR(sum, mask);
    const float sink = sink_of(item / CHUNKS);
    if (d < DIM)
#pragma unroll
      for (int i = 0; i < 4; ++i) out[head * DIM + d + i] = T(normalized(x[i], top, sum, sink));
  }
}
"""


@cache
def ended(body: str, header: str, ending: Ending, heads: str) -> tuple[str, str]:
    """Body and header of an attention kernel whose launch ends so; ``heads``: what its text calls those of a block."""
    for marker, filling in _FILLINGS[ending].items():
        body = body.replace(marker, filling.replace("@HEADS@", heads))
    return body, header + (JOIN_LAST if ending is Ending.LAST_BLOCK else "")
