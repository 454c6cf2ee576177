"""The text of drawing tokens: penalties, temperature, min_p, top_k, top_p and the draw of a row in one block.

Logits are ordered as unsigned integers (``ordered``). A first pass leaves the largest of every block of columns in
shared memory; from then on only blocks are read again whose largest can matter. What top_k and top_p keep is one
bound. It is found among candidates: all logits from a bound on that is certainly low enough, which the k-th largest of
the blocks' maxima is. Where they are too many, the bound is found by bisection over the whole row instead. Then the
weights kept of each block are summed, and the draw takes a block, and a token in it. Nothing depends on another row,
nor on the order in which threads run.

Of a row's wishes the first is the scale, log2(e) / temperature, 0 for a greedy row; then min_p, top_p (above 1: none),
top_k (0: none), frequency penalty, presence penalty, and the row of ``counts`` (-1: no penalties).

Template argument: T, the element type of logits.
"""

from functools import cache

from engine.runner.kernels.paged_attention_text import SHARED_FUNCTIONS

THREADS = 512
"""Of a block. A thread may use 128 registers then; the compiler, which is not told, takes up to 96 (sm_90a, CUDA 13.0)
with so few tiles of columns under way as there are: with two of them and penalties it takes 163."""
MOST_BLOCKS = 2048
CANDIDATES = 2 * THREADS
FIRST_CANDIDATES, MORE = 64, 4
"""Blocks of columns that top_p alone begins with, and how many times more it goes on with."""

_CONSTANTS = f"""
#define THREADS {THREADS}
#define WARPS (THREADS / 32)
#define MOST_BLOCKS {MOST_BLOCKS}
#define CANDIDATES {CANDIDATES}
#define FIRST_CANDIDATES {FIRST_CANDIDATES}
#define MORE {MORE}
#define LOWEST_KEY 0x00800000u
#define HIGHEST_KEY 0xff7fffffu
#define NONE 0xffffffffu
"""

_FUNCTIONS = r"""
// Larger logits have larger keys; NaN has the largest, both zeros have one.
FUNCTION unsigned ordered(float x) {
  unsigned bits = AS_UINT(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return NONE;
  if (bits == 0x80000000u) bits = 0u;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
FUNCTION float logit_of(unsigned key) { return AS_FLOAT(key >> 31 ? key & 0x7fffffffu : ~key); }
FUNCTION unsigned smaller_of(unsigned a, unsigned b) { return a < b ? a : b; }
FUNCTION unsigned larger_of(unsigned a, unsigned b) { return a > b ? a : b; }
FUNCTION unsigned added(unsigned a, unsigned b) { return a + b; }
FUNCTION float added(float a, float b) { return a + b; }

// A weight over the likeliest token's, 0 where min_p rules it out.
FUNCTION float weight_of(float x, float top, float scale, float min_p) {
  const float weight = EXP2((x - top) * scale);
  return weight >= min_p ? weight : 0.0f;
}
template <typename T> FUNCTION void read_eight(GLOBAL const T* row, int column, int width, PRIVATE float* x) {
  for (int i = 0; i < 8; ++i) if (column + i < width) x[i] = float(row[column + i]);
}
// The product is rounded before it is subtracted, as in an operation of its own.
FUNCTION void penalize(PRIVATE float* x, PRIVATE const float* count, int column, int newest, float frequency,
                       float presence) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float all = count[i] + (column + i == newest ? 1.0f : 0.0f);
    x[i] = x[i] - FMA(frequency, all, 0.0f);
    if (all > 0.0f) x[i] = x[i] - presence;
  }
}

// Joins the values of all threads; each has the result.
#define REDUCE(value, JOIN, TO, FROM) \
for (int mask = 16; mask > 0; mask >>= 1) value = JOIN(value, SHFL_XOR(value, mask)); \
BARRIER; \
if (LANE == 0) scratch[WARP] = TO(value); \
BARRIER; \
value = FROM(scratch[0]); \
for (int w = 1; w < WARPS; ++w) value = JOIN(value, FROM(scratch[w]));
// Within a warp: inclusive becomes the sum up to this lane, before the sum of the lanes before it.
#define WARP_SCAN(inclusive, before) \
for (int step = 1; step < 32; step <<= 1) { \
  const auto other = SHFL(inclusive, LANE < step ? 0 : LANE - step); \
  if (LANE >= step) inclusive += other; \
} \
before = SHFL(inclusive, LANE == 0 ? 0 : LANE - 1); \
if (LANE == 0) before = 0;
// Over all threads: before becomes the sum of those before this one, whole that of all.
#define SCAN(value, before, whole, TO, FROM) { \
  auto inclusive = value; \
  WARP_SCAN(inclusive, before) \
  BARRIER; \
  if (LANE == 31) scratch[WARP] = TO(inclusive); \
  BARRIER; \
  whole = 0; \
  for (int w = 0; w < WARPS; ++w) { \
    if (w == WARP) before += whole; \
    whole += FROM(scratch[w]); \
  } \
}
#define SAME(x) (x)
"""

DRAW_HEADER = SHARED_FUNCTIONS + _CONSTANTS + _FUNCTIONS
_SETUP = r"""
  constexpr int TILES = @TILES@, VECTORS = int(sizeof(T)) / 2;
  SHARED unsigned blocks[MOST_BLOCKS];
  SHARED unsigned candidates[CANDIDATES];
  SHARED float masses[CANDIDATES];
  SHARED unsigned scratch[WARPS];
  const int row = BLK_X, width = logits_shape[1], tiles = (width + 255) / 256;
  int shift = 8;
  while (shift > 5 && width % (1 << shift)) --shift;
  if (width % (1 << shift) || (width >> shift) > MOST_BLOCKS) shift = 8;
  const int num_blocks = (width + (1 << shift) - 1) >> shift, lanes = 1 << (shift - 3);
  const bool vectors = width % 8 == 0, leads = (LANE & (lanes - 1)) == 0;
  GLOBAL const T* mine = logits + (size_t)row * width;
  unsigned grain = sizeof(T) == 2 ? 1u << 13 : 1u;                    // no two keys are nearer to each other
  const float scale = wishes[row * 8], min_p = wishes[row * 8 + 1], top_p = wishes[row * 8 + 2];
  const unsigned top_k = unsigned(wishes[row * 8 + 3]);
  const float first_uniform = uniforms[row * 2], second_uniform = uniforms[row * 2 + 1];
"""
_PENALTY_SETUP = r"""
  const float frequency = wishes[row * 8 + 4], presence = wishes[row * 8 + 5];
  const int entry = int(wishes[row * 8 + 6]), newest = entry >= 0 ? pending[row] : -1;
  if (entry >= 0) grain = 1u;
  GLOBAL const float* counted = counts + (size_t)(entry < 0 ? 0 : entry) * width;
"""
_PENALTY_LOAD = r"""
        if (entry >= 0) {
          raw_counts[u][0] = ((GLOBAL const uint4*)(counted + column))[0];
          raw_counts[u][1] = ((GLOBAL const uint4*)(counted + column))[1];
        }
"""
_PENALTY_APPLY = r"""
        if (entry >= 0) {
          float count[8];
          if (vectors) {
            unpack_vector<float>(raw_counts[u][0], count);
            unpack_vector<float>(raw_counts[u][1], count + 4);
          } else {
            for (int i = 0; i < 8; ++i) count[i] = 0.0f;
            read_eight<float>(counted, column, width, count);
          }
          penalize(x, count, column, newest, frequency, presence);
        }
"""

_PASS = r"""
  for (int first = WARP; first < tiles; first += WARPS * TILES) {
    uint4 raw[TILES][VECTORS];
    @RAW_COUNTS@
    bool wanted[TILES];
#pragma unroll
    for (int u = 0; u < TILES; ++u) {
      const int column = (first + u * WARPS) * 256 + LANE * 8;
      wanted[u] = column < width && (@WANTED@);
      if (vectors && wanted[u]) {
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) raw[u][v] = ((GLOBAL const uint4*)(mine + column))[v];
        @LOAD_COUNTS@
      }
    }
#pragma unroll
    for (int u = 0; u < TILES; ++u) {
      const int column = (first + u * WARPS) * 256 + LANE * 8;
      if (!ANY(wanted[u])) {
        @ELSE@
        continue;
      }
      float x[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = -INFINITY;
      if (wanted[u]) {
        if (vectors) {
#pragma unroll
          for (int v = 0; v < VECTORS; ++v) unpack_vector<T>(raw[u][v], x + v * 8 / VECTORS);
        } else {
          read_eight<T>(mine, column, width, x);
        }
        @APPLY_COUNTS@
      }
      @WORK@
    }
  }
"""


def _pass(wanted: str, work: str, otherwise: str = "") -> str:
    """Over the row's columns, eight ``x`` a thread at a time, of those blocks that are ``wanted``."""
    return _PASS.replace("@WANTED@", wanted).replace("@WORK@", work).replace("@ELSE@", otherwise)


_LARGEST = _pass(
    "true",
    r"""
      unsigned most = 0u;
#pragma unroll
      for (int i = 0; i < 8; ++i) most = larger_of(most, ordered(x[i]));
      for (int mask = 1; mask < lanes; mask <<= 1) most = larger_of(most, SHFL_XOR(most, mask));
      const int block = column >> shift;
      if (leads && block < num_blocks) blocks[block] = most;
""",
)

_TOP = r"""
  BARRIER;
  unsigned top = 0u;
  for (int i = TID; i < num_blocks; i += THREADS) top = larger_of(top, blocks[i]);
  REDUCE(top, larger_of, SAME, SAME)
  const bool finite = top >= LOWEST_KEY && top <= HIGHEST_KEY;
  const float largest = logit_of(top);
  unsigned bound = LOWEST_KEY, chosen = NONE;
"""


def _measure(from_key: str) -> str:
    """This thread's ``number`` and ``mass`` of logits from a key on."""
    return "number = 0u; mass = 0.0f;" + _pass(
        f"blocks[column >> shift] >= {from_key}",
        rf"""
#pragma unroll
      for (int i = 0; i < 8; ++i) {{
        if (ordered(x[i]) < {from_key}) continue;
        ++number;
        mass += weight_of(x[i], largest, scale, min_p);
      }}
""",
    )


_GATHER = _pass(
    "blocks[column >> shift] >= low",
    r"""
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const unsigned key = ordered(x[i]);
        if (key < low) continue;
        candidates[place] = key;
        masses[place] = weight_of(x[i], largest, scale, min_p);
        ++place;
      }
""",
)

# Of each candidate: how many are larger, and their mass.
_RANK = r"""
      unsigned own[CANDIDATES / THREADS], larger[CANDIDATES / THREADS];
      float before[CANDIDATES / THREADS];
#pragma unroll
      for (int e = 0; e < CANDIDATES / THREADS; ++e) {
        const unsigned at = TID + e * THREADS;
        own[e] = at < all ? candidates[at] : NONE;
        larger[e] = at < all ? 0u : NONE;
        before[e] = 0.0f;
      }
      for (unsigned j = 0; j < all; ++j) {
        const unsigned key = candidates[j];
        const float weight = masses[j];
#pragma unroll
        for (int e = 0; e < CANDIDATES / THREADS; ++e)
          if (key > own[e]) { ++larger[e]; before[e] += weight; }
      }
      const unsigned most = top_k ? top_k : NONE;
      mass = 0.0f;
#pragma unroll
      for (int e = 0; e < CANDIDATES / THREADS; ++e)
        if (larger[e] < most) mass += masses[TID + e * THREADS];
      REDUCE(mass, added, AS_UINT, AS_FLOAT)
      if (top_k) total = mass;
      found = top_k || low == LOWEST_KEY || mass >= top_p * total;
      unsigned least = top;
#pragma unroll
      for (int e = 0; e < CANDIDATES / THREADS; ++e)
        if (larger[e] < most && (top_p > 1.0f || before[e] < top_p * total)) least = smaller_of(least, own[e]);
      REDUCE(least, smaller_of, SAME, SAME)
      if (found) bound = least;
"""

_CANDIDATES = (
    r"""
    for (unsigned k = top_k ? top_k : FIRST_CANDIDATES; !found; k *= MORE) {
      unsigned low = LOWEST_KEY, high = top + 1u, reached = NONE;
      // At least k blocks have a logit from here on; a few more of them are less work than another round.
      while (k < unsigned(num_blocks) && reached > k + k / 4u + 8u && high - low > grain) {
        const unsigned middle = low + (high - low) / 2u;
        unsigned count = 0u;
        for (int i = TID; i < num_blocks; i += THREADS) count += blocks[i] >= middle;
        REDUCE(count, added, SAME, SAME)
        if (count < k) { high = middle; } else { low = middle; reached = count; }
      }
"""
    + _measure("low")
    + r"""
      unsigned place, all;
      SCAN(number, place, all, SAME, SAME)
      if (all > CANDIDATES) break;
"""
    + _GATHER
    + "BARRIER;"
    + _RANK
    + r"""
      if (top_k || k * MORE > CANDIDATES) break;
    }
"""
)

_BISECTION = (
    r"""
    if (!found) {
      unsigned low = LOWEST_KEY, high = top + 1u;
      while (top_k && high - low > grain) {
        const unsigned middle = low + (high - low) / 2u;
"""
    + _measure("middle")
    + r"""
        REDUCE(number, added, SAME, SAME)
        if (number < top_k) { high = middle; } else { low = middle; }
      }
      if (top_p < 1.0f) {
        if (top_k) {
"""
    + _measure("low")
    + r"""
          REDUCE(mass, added, AS_UINT, AS_FLOAT)
          total = mass;
        }
        // The smallest key with less than the nucleus above it; weights below 2^-150 are 0.
        const unsigned weightless = ordered(largest - 160.0f / scale);
        unsigned outside = larger_of(low, weightless >= top ? low : weightless) - 1u, inside = top;
        while (inside - outside > grain) {
          const unsigned middle = outside + (inside - outside) / 2u + 1u;
"""
    + _measure("middle")
    + r"""
          REDUCE(mass, added, AS_UINT, AS_FLOAT)
          if (mass < top_p * total) { inside = middle - 1u; } else { outside = middle - 1u; }
        }
        low = outside + 1u;
      }
      bound = low;
    }
"""
)

_BOUND = (
    r"""
  if (finite && scale > 0.0f && (top_k || top_p < 1.0f)) {
    unsigned number = 0u;
    float mass = 0.0f, total = 0.0f;
    bool found = false;
    if (!top_k) {
"""
    + _measure("LOWEST_KEY")
    + r"""
      REDUCE(mass, added, AS_UINT, AS_FLOAT)
      total = mass;
    }
"""
    + _CANDIDATES
    + _BISECTION
    + "}"
)

_KEPT = _pass(
    "blocks[column >> shift] >= bound",
    r"""
      float kept = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (ordered(x[i]) >= bound) kept += weight_of(x[i], largest, scale, min_p);
      for (int mask = 1; mask < lanes; mask <<= 1) kept += SHFL_XOR(kept, mask);
      const int block = column >> shift;
      if (leads && block < num_blocks) blocks[block] = AS_UINT(kept);
""",
    "if (leads && (column >> shift) < num_blocks) blocks[column >> shift] = 0u;",
)

# Weights are not negative, so that their bits have their order.
_BLOCK_OF_DRAW = r"""
    BARRIER;
    const int each = (num_blocks + THREADS - 1) / THREADS;
    const int start = TID * each, end = start + each < num_blocks ? start + each : num_blocks;
    float own = 0.0f, before, whole;
    for (int i = start; i < end; ++i) own += AS_FLOAT(blocks[i]);
    SCAN(own, before, whole, AS_UINT, AS_FLOAT)
    for (int i = start; i < end; ++i) {
      const float weight = AS_FLOAT(blocks[i]);
      before += weight;
      if (chosen == NONE && weight > 0.0f && before > first_uniform * whole) chosen = i;
    }
    REDUCE(chosen, smaller_of, SAME, SAME)
    if (chosen == NONE) {                                             // by rounding
      unsigned heaviest = 0u;
      for (int i = start; i < end; ++i) heaviest = larger_of(heaviest, blocks[i]);
      REDUCE(heaviest, larger_of, SAME, SAME)
      for (int i = start; i < end; ++i) if (blocks[i] == heaviest) chosen = smaller_of(chosen, unsigned(i));
      REDUCE(chosen, smaller_of, SAME, SAME)
    }
    if (!(whole > 0.0f && whole < INFINITY)) chosen = NONE;
"""
_BLOCK_OF_LARGEST = r"""
    for (int i = TID; i < num_blocks; i += THREADS) if (blocks[i] == top) chosen = smaller_of(chosen, unsigned(i));
    REDUCE(chosen, smaller_of, SAME, SAME)
"""

_TOKEN = r"""
  int token = -1;
  if (WARP == 0 && chosen != NONE) {
    const int column = (int(chosen) << shift) + LANE * 8;
    @ONE_TILE@
    float x[8], weight[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = -INFINITY;
    if (LANE < lanes && column < width) {
      read_eight<T>(mine, column, width, x);
      if (vectors) {
        @LOAD_COUNTS@
      }
      @APPLY_COUNTS@
    }
    float own = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const unsigned key = ordered(x[i]);
      weight[i] = scale > 0.0f ? (key >= bound ? weight_of(x[i], largest, scale, min_p) : 0.0f) : key == top;
      own += weight[i];
    }
    float inclusive = own, before;
    WARP_SCAN(inclusive, before)
    const float share = scale > 0.0f ? second_uniform * SHFL(inclusive, 31) : 0.0f;
    unsigned at = NONE, heaviest = 0u;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      before += weight[i];
      if (at == NONE && weight[i] > 0.0f && before > share) at = column + i;
      heaviest = larger_of(heaviest, AS_UINT(weight[i]));
    }
    for (int mask = 16; mask > 0; mask >>= 1) {
      at = smaller_of(at, SHFL_XOR(at, mask));
      heaviest = larger_of(heaviest, SHFL_XOR(heaviest, mask));
    }
    if (at == NONE) {                                                 // by rounding
#pragma unroll
      for (int i = 7; i >= 0; --i) if (AS_UINT(weight[i]) == heaviest) at = column + i;
      for (int mask = 16; mask > 0; mask >>= 1) at = smaller_of(at, SHFL_XOR(at, mask));
    }
    token = int(at);
  }
  if (TID == 0) tokens[row] = token;
"""
# All other reads of the row's counts lie before a barrier that this thread has passed.
_PENALTY_WRITE = r"""
  if (TID == 0 && newest >= 0 && newest < width) const_cast<GLOBAL float*>(counted)[newest] += 1.0f;
"""


@cache
def draw_text(*, penalties: bool) -> tuple[str, str]:
    """Body and header of the kernel, for batches in which a row has penalties or none has."""
    drawn = _KEPT + _BLOCK_OF_DRAW
    body = _SETUP + "@SETUP_COUNTS@" + _LARGEST + _TOP + _BOUND
    body += f"if (finite && scale > 0.0f) {{{drawn}}} else if (finite) {{{_BLOCK_OF_LARGEST}}}" + _TOKEN
    counts = {
        "@SETUP_COUNTS@": _PENALTY_SETUP,
        "@ONE_TILE@": "const int u = 0; uint4 raw_counts[1][2];",
        "@RAW_COUNTS@": "uint4 raw_counts[TILES][2];",
        "@LOAD_COUNTS@": _PENALTY_LOAD,
        "@APPLY_COUNTS@": _PENALTY_APPLY,
    }
    for mark, text in counts.items():
        body = body.replace(mark, text if penalties else "")
    body = body.replace("@TILES@", "1" if penalties else "sizeof(T) == 4 ? 2 : 4")
    return body + (_PENALTY_WRITE if penalties else ""), DRAW_HEADER
