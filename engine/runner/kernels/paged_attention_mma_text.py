"""The CUDA text of decode attention on tensor cores: for many query heads per kv head, and for packed pages.

A warp takes 16 tokens at a time. Scores are Q K^T (mma m16n8k16): up to 16 query heads by 8 tokens twice, keys as they
lie: in a contraction the order of k is free, so a lane takes neighbouring bytes of its token's key, and the same k of
the queries. What comes out lies as the second operand of V^T P^T wants it, pairs of tokens in a register; pairs of
values are made of two tokens' bytes. ``PARTS`` warps may share a token's elements, for wide heads: each multiplies its
part of the key, they add up scores in shared memory, and each weighs its part of the value.

Packed pages hold integers i, with a scale s and a bias b for each GROUP of elements, and are not unpacked: an integer
under the exponent of 1024 is the float16 1024 + i, so that s (q . (1024 + i)) + (b - 1024 s) sum(q) is a group's part
of a score. Weights are multiplied by the values' scales instead, and by 2 ** 8, which keeps scales from 2e-7 to 255 in
float16's range; what 1024 and the biases add is kept apart, a number for each head and group.

Template arguments, beside those of :mod:`engine.runner.kernels.paged_attention_text`
    C                           what is multiplied: the element type, float16 over packed pages
    BITS, KEY_STEP, VALUE_STEP  of packed elements (0: plain pages); elements of a key that are multiplied at a time,
                                and of a value that eight lanes read at a time: a group's, or 32 and 64
    ROPE_DIM                    of latent pages: the values' pages hold so many further elements of keys, and values
                                are the keys; their queries are scaled already. 0: usual ones
    HEADS, WARPS, PARTS         query heads of a block (at most 16), its warps, and warps that share a token
    STAGES                      2: a pass of tokens is loaded while another is computed
"""

from functools import cache

from engine.runner.kernels.joined_attention_text import KINDS, ValueHeads
from engine.runner.kernels.mma_rows_text import JOINED_ROWS, NORM, ROPE_QUERIES, SEPARATE_ROWS
from engine.runner.kernels.packed_attention_text import PACKING
from engine.runner.kernels.paged_attention_text import ATTENTION_FUNCTIONS, SHARED_FUNCTIONS, SINK_MACROS
from engine.runner.kernels.rows_matmul_text import TENSOR_CORES, UNROLLED

_FUNCTIONS = r"""
#define MAGIC 0x64646464u
template <typename To, typename From> FUNCTION To bits_as(From from) { return *reinterpret_cast<To*>(&from); }
FUNCTION unsigned pair_of(float a, float b, __half) { return bits_as<unsigned>(__floats2half2_rn(a, b)); }
FUNCTION unsigned pair_of(float a, float b, __nv_bfloat16) { return bits_as<unsigned>(__floats2bfloat162_rn(a, b)); }

// Rows of `dim` elements, as another type, `to_row` elements apart; zeros from row number `given` on.
template <typename From, typename To, int THREADS>
FUNCTION void stage_rows(const From* from, To* to, int dim, int to_row, int given, int rows, int thread) {
#pragma unroll 4
  for (int i = thread; i < rows * dim / 8; i += THREADS) {
    const int row = i / (dim / 8), at = i % (dim / 8) * 8;
    float f[8];
    load_elements<From, 8>(from + (row < given ? row : 0) * dim + at, f);
    unsigned words[4];
    EACH(k, 4) words[k] = row < given ? pair_of(f[2 * k], f[2 * k + 1], To()) : 0u;
    *reinterpret_cast<uint4*>(to + row * to_row + at) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}
// HALVES times two bytes.
template <int HALVES> FUNCTION void load_halves(const void* from, unsigned* words) {
  if (HALVES == 8) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    words[0] = raw.x; words[1] = raw.y; words[2] = raw.z; words[3] = raw.w;
  } else if (HALVES == 4) {
    const uint2 raw = *reinterpret_cast<const uint2*>(from);
    words[0] = raw.x; words[1] = raw.y;
  } else if (HALVES == 2) {
    words[0] = *reinterpret_cast<const unsigned*>(from);
  } else {
    words[0] = *reinterpret_cast<const unsigned short*>(from);
  }
}
// COUNT neighbours of two tokens, whose rows of ROW elements follow each other: one token's behind the other's.
template <int COUNT, int ROW, typename T> FUNCTION void load_scales(const T* from, unsigned* words) {
  const unsigned short* halves = reinterpret_cast<const unsigned short*>(from);
  if (COUNT == ROW && (COUNT == 1 || COUNT == 2 || COUNT == 4)) {
    load_halves<COUNT == 1 ? 2 : COUNT == 2 ? 4 : 8>(halves, words);
  } else {
    EACH(w, COUNT) {
      const int low = 2 * w, high = 2 * w + 1;
      words[w] = halves[low / COUNT * ROW + low % COUNT] | unsigned(halves[high / COUNT * ROW + high % COUNT]) << 16;
    }
  }
}
// Element i of words of pairs.
template <typename T> FUNCTION float element_of(const unsigned* words, int i) {
  float both[2];
  Packed<T>::unpack(words[i / 2], both);
  return both[i % 2];
}
// Pair p of a lane's elements of a key: elements 2 p and 2 p + 1, of 4 bits pair_first(p) and 4 behind it.
template <int BITS> FUNCTION unsigned key_pair(const unsigned* words, int p) {
  if (BITS == 8) return __byte_perm(words[p / 2], MAGIC, p % 2 ? 0x4342u : 0x4140u);
  if (BITS == 4) return ((words[p / 4] >> (p % 4 * 4)) & 0x000f000fu) | 0x64006400u;
  return words[p];
}
FUNCTION int pair_first(int p) { return p / 4 * 8 + p % 4; }

// Elements 2 i and 2 i + 1 of two tokens' values, each as a pair over the tokens.
template <int BITS> FUNCTION void value_pairs(const unsigned* first, const unsigned* second, int i, unsigned* pairs) {
  if (BITS == 8) {
    const unsigned mixed = __byte_perm(first[i / 2], second[i / 2], i % 2 ? 0x7362u : 0x5140u);
    pairs[0] = __byte_perm(mixed, MAGIC, 0x4140u);
    pairs[1] = __byte_perm(mixed, MAGIC, 0x4342u);
  } else if (BITS == 4) {
    const unsigned mixed = __byte_perm(first[i / 4], second[i / 4], i % 4 < 2 ? 0x5410u : 0x7632u);
    pairs[0] = ((mixed >> (i % 2 * 8)) & 0x000f000fu) | 0x64006400u;
    pairs[1] = ((mixed >> (i % 2 * 8 + 4)) & 0x000f000fu) | 0x64006400u;
  } else {
    pairs[0] = __byte_perm(first[i], second[i], 0x5410u);
    pairs[1] = __byte_perm(first[i], second[i], 0x7632u);
  }
}
"""

_SETUP = r"""
  constexpr int THREADS = 32 * WARPS, LANES = 1, VEC = 1;
  constexpr int TILES = HEADS > 8 ? 2 : 1;                          // of 8 query heads
  constexpr int PASS = WARPS / PARTS * 16;                          // tokens of a block at a time
  constexpr int GIVEN = ROPE_DIM ? ROPE_DIM : VALUE_DIM;            // elements of a row of the values' pages
  constexpr int KEY_STEPS = KEY_DIM / KEY_STEP / PARTS, ROPE_STEPS = ROPE_DIM / 32;
  constexpr int MORE = (ROPE_STEPS + PARTS - 1) / PARTS, STEPS = KEY_STEPS + MORE;
  constexpr int KEY_PAIRS = KEY_STEP / 8, KEY_HALVES = BITS ? KEY_STEP / 4 * BITS / 16 : 8;
  constexpr int KEY_WORDS = (KEY_HALVES + 1) / 2;
  constexpr int SECTIONS = VALUE_DIM / VALUE_STEP / PARTS, EACH_LANE = VALUE_STEP / 8;
  constexpr int VALUE_HALVES = BITS ? EACH_LANE * BITS / 16 : EACH_LANE, VALUE_WORDS = (VALUE_HALVES + 1) / 2;
  constexpr int QUERY_ROW = KEY_DIM + ROPE_DIM + 8, RESULT_DIM = VALUE_DIM + 4;   // rows begin in different banks
  constexpr int KEY_ROW = BITS ? KEY_DIM * BITS / 16 : KEY_DIM, VALUE_ROW = BITS ? VALUE_DIM * BITS / 16 : VALUE_DIM;
  constexpr int KEY_GROUPS = KEY_DIM / KEY_STEP, VALUE_GROUPS = VALUE_DIM / VALUE_STEP;
  constexpr int STAGED = (HEADS * QUERY_ROW + KEY_DIM + GIVEN) / 8;
  constexpr int RESULT = HEADS * RESULT_DIM / 4, MEMORY = STAGED > RESULT ? STAGED : RESULT;
  constexpr int EXCHANGED = PARTS > 1 ? 2 * WARPS * 32 * TILES * 4 : 1;
  SHARED uint4 memory[MEMORY];
  SHARED float exchanged[EXCHANGED];
  SHARED float warp_sums[WARPS / PARTS * 16 * 2];
  C* staged = reinterpret_cast<C*>(memory);
  T* fresh = reinterpret_cast<T*>(memory) + HEADS * QUERY_ROW;      // the new key, then the new value
  float* result = reinterpret_cast<float*>(memory);

  constexpr int BLOCKS = (GROUP + HEADS - 1) / HEADS;               // of one kv head's query heads
  const int split = BLK_X, kv_head = BLK_Y / BLOCKS, head0 = BLK_Y % BLOCKS * HEADS, row = BLK_Z, @LAUNCHED@;
  const int kv_heads = key_pages_shape[1], width = block_tables_shape[1];
  const size_t slots = key_pages_shape[2];
  const size_t first_head = ((size_t)row * kv_heads + kv_head) * GROUP + head0;
  const int here = GROUP - head0 < HEADS ? GROUP - head0 : HEADS;   // query heads
  const int lane = LANE, g = lane >> 2, t = lane & 3, part_of = WARP % PARTS, over_tokens = WARP / PARTS;

  const int position = positions[row], length = position + 1;
  const int low = WINDOW > 0 && length > WINDOW ? length - WINDOW : 0;
  const int origin = low / BLOCK_SIZE * BLOCK_SIZE;
  const int per_split = ((length - origin + @SPLITS@ - 1) / @SPLITS@ + PASS - 1) / PASS * PASS;
  const int begin = origin + split * per_split;
  const int end = length < begin + per_split ? length : begin + per_split;
  @PARTS@
  if (position < 0 || begin >= length) {                            // a padding row, or a split past the row's end
    if (@EMPTY@) {
      for (int i = TID; i < here * VALUE_DIM; i += THREADS) out[first_head * VALUE_DIM + i] = T(0.0f);
    } @ELSE@ {
      for (int i = TID; i < here; i += THREADS) sums[2 * ((first_head + i) * splits + split) + 1] = UNUSED;
    }
    return;
  }
  const bool has_newest = end == length;                            // this split ends with the new token
"""

# Their fragments into registers, and the new token into its page, from where this block reads it like others.
_PLAIN_WRITE = r"""
    for (int i = TID; i < KEY_DIM / 8; i += THREADS)
      reinterpret_cast<uint4*>(const_cast<T*>(key_pages) + slot * KEY_DIM)[i] = reinterpret_cast<uint4*>(fresh)[i];
    for (int i = TID; i < GIVEN / 8; i += THREADS)
      reinterpret_cast<uint4*>(const_cast<T*>(value_pages) + slot * GIVEN)[i] =
          reinterpret_cast<uint4*>(fresh + KEY_DIM)[i];
"""
_PACKED_WRITE = r"""
    for (int i = WARP; i < KEY_DIM / KEY_STEP + VALUE_DIM / VALUE_STEP; i += WARPS) {
      if (i < KEY_DIM / KEY_STEP)
        pack_group<T, BITS, KEY_STEP>(fresh + i * KEY_STEP, slot * (KEY_DIM / KEY_STEP) + i,
                                      const_cast<unsigned*>(key_pages), const_cast<T*>(key_scales),
                                      const_cast<T*>(key_biases), lane);
      else {
        const int j = i - KEY_DIM / KEY_STEP;
        pack_group<T, BITS, VALUE_STEP>(fresh + KEY_DIM + j * VALUE_STEP, slot * (VALUE_DIM / VALUE_STEP) + j,
                                        const_cast<unsigned*>(value_pages), const_cast<T*>(value_scales),
                                        const_cast<T*>(value_biases), lane);
      }
    }
"""
_FRAGMENTS = r"""
  BARRIER;
  if (has_newest) {
    const int block = block_tables[row * width + position / BLOCK_SIZE];
    const size_t slot = kv_head * slots + (size_t)block * BLOCK_SIZE + position % BLOCK_SIZE;
    @WRITE@
  }
  unsigned q[STEPS][KEY_PAIRS][TILES];
  float query_sums[BITS ? KEY_STEPS : 1][TILES];
  EACH(s, STEPS) {
    const int more = (s - KEY_STEPS) * PARTS + part_of;             // a step over what latent keys have further
    const int first = s < KEY_STEPS ? (part_of * KEY_STEPS + s) * KEY_STEP + t * (KEY_STEP / 4)
                                    : KEY_DIM + more * 32 + t * 8;
    EACH(h, TILES) {
      float sum = 0.0f;
      EACH(p, KEY_PAIRS) {
        q[s][p][h] = 0u;
        if (h * 8 + g < HEADS && (s < KEY_STEPS || more < ROPE_STEPS)) {
          const C* row = staged + (h * 8 + g) * QUERY_ROW + first;
          q[s][p][h] = BITS == 4 ? pair_of(float(row[pair_first(p)]), float(row[pair_first(p) + 4]), C())
                                 : *reinterpret_cast<const unsigned*>(row + 2 * p);
        }
        float both[2];
        Packed<C>::unpack(q[s][p][h], both);
        sum += both[0] + both[1];
      }
      if (BITS) {
        sum += SHFL_XOR(sum, 1);
        query_sums[BITS ? s : 0][h] = sum + SHFL_XOR(sum, 2);
      }
    }
  }
  float acc[SECTIONS * EACH_LANE / 2][TILES][4], apart[BITS ? SECTIONS : 1][TILES], top[TILES], sum[TILES];
  EACH(m, SECTIONS * EACH_LANE / 2) EACH(h, TILES) EACH(i, 4) acc[m][h][i] = 0.0f;
  EACH(s, BITS ? SECTIONS : 1) EACH(h, TILES) apart[s][h] = 0.0f;
  EACH(h, TILES) { top[h] = LOWEST; sum[h] = 0.0f; }
  const float scale = CAP ? CONSTANT(SCALE) : CONSTANT(SCALE) * LOG2E, unscaled = 1.0f / CONSTANT(SCALE);
  BARRIER;                                                          // the new token lies in its page
"""

_LOOP = r"""
  unsigned keys[STAGES][STEPS][2][KEY_WORDS], values[STAGES][SECTIONS][4][VALUE_WORDS];
@SCALE_WORDS@
  int next_block = begin + over_tokens * 16 < end ? block_tables[row * width + (begin + over_tokens * 16) / BLOCK_SIZE]
                                                  : 0;
  // Offsets of a lane's elements in a block, in halves: of a key's, of what a latent key has further, of a value's.
  const int key_lane = g * KEY_ROW + (part_of * KEY_STEPS * KEY_STEP + t * (KEY_STEP / 4)) * (BITS ? BITS : 16) / 16;
  const int rope_lane = g * GIVEN + (part_of < ROPE_STEPS ? part_of : 0) * 32 + t * 8;
  const int value_first = part_of * SECTIONS * VALUE_STEP + g * EACH_LANE;
  const int value_lane = 2 * t * VALUE_ROW + value_first * (BITS ? BITS : 16) / 16;
  // Calls follow each other, PASS by PASS. All of a block's slots may be read; what no row may see is masked later.
  auto fetch = [&](int base, int stage) {
    const int token = base + over_tokens * 16;
    const size_t slot0 = kv_head * slots + (size_t)next_block * BLOCK_SIZE + token % BLOCK_SIZE;
    if (token + PASS < end) next_block = block_tables[row * width + (token + PASS) / BLOCK_SIZE];
    const unsigned short* key = reinterpret_cast<const unsigned short*>(key_pages) + slot0 * KEY_ROW + key_lane;
    const unsigned short* rope = reinterpret_cast<const unsigned short*>(value_pages) + slot0 * GIVEN + rope_lane;
    const unsigned short* value = reinterpret_cast<const unsigned short*>(@VALUES@) + slot0 * VALUE_ROW + value_lane;
    EACH(s, STEPS) EACH(j, 2) {
      if (s < KEY_STEPS)
        load_halves<KEY_HALVES>(key + j * 8 * KEY_ROW + s * 4 * KEY_HALVES, keys[stage][s][j]);
      else
        load_halves<KEY_HALVES>(rope + j * 8 * GIVEN + (s - KEY_STEPS) * PARTS * 32, keys[stage][s][j]);
    }
    EACH(s, SECTIONS) EACH(k, 4)
      load_halves<VALUE_HALVES>(value + (k / 2 * 8 + k % 2) * VALUE_ROW + s * 8 * VALUE_HALVES, values[stage][s][k]);
@FETCH_SCALES@
  };
  auto attend = [&](int base, int stage, int turn) {
    const int token = base + over_tokens * 16;
    const bool whole = token >= low && token + 16 <= end;           // all 16 are seen
    float score[2][TILES][2];                                       // tokens 2 t and 2 t + 1 of each eight
@SCORES@
    if (PARTS > 1) {
      float* all = exchanged + turn * (EXCHANGED / 2);
      EACH(j, 2) EACH(h, TILES) EACH(i, 2)
        all[((WARP * TILES + h) * 4 + j * 2 + i) * 32 + lane] = score[j][h][i];
      BARRIER;
      EACH(j, 2) EACH(h, TILES) EACH(i, 2) {
        score[j][h][i] = 0.0f;
        EACH(w, PARTS)
          score[j][h][i] += all[(((over_tokens * PARTS + w) * TILES + h) * 4 + j * 2 + i) * 32 + lane];
      }
    }
    EACH(j, 2) EACH(i, 2) {
      const int at = token + j * 8 + 2 * t + i;
      const bool seen = whole || (at >= low && at < end);
      EACH(h, TILES) {
        float x = score[j][h][i] * scale;
        if (CAP) x = CONSTANT(CAP) * TANH(x / CONSTANT(CAP)) * LOG2E;
        score[j][h][i] = seen ? x : -INFINITY;
      }
    }
    EACH(h, TILES) {
      float highest = FMAX(FMAX(score[0][h][0], score[0][h][1]), FMAX(score[1][h][0], score[1][h][1]));
      highest = FMAX(highest, SHFL_XOR(highest, 1));
      highest = FMAX(FMAX(highest, SHFL_XOR(highest, 2)), top[h]);
      const float scaled = EXP2(top[h] - highest);
      if (ANY(highest > top[h])) {                                  // the results' columns are heads 2 t and 2 t + 1
        const float even = SHFL(scaled, 8 * t), odd = SHFL(scaled, 8 * t + 4);
        EACH(m, SECTIONS * EACH_LANE / 2) {
          acc[m][h][0] *= even; acc[m][h][1] *= odd; acc[m][h][2] *= even; acc[m][h][3] *= odd;
        }
        if (BITS) EACH(s, SECTIONS) apart[BITS ? s : 0][h] *= scaled;
      }
      top[h] = highest; sum[h] *= scaled;
      EACH(j, 2) EACH(i, 2) { score[j][h][i] = EXP2(score[j][h][i] - highest); sum[h] += score[j][h][i]; }
    }
@WEIGHTED@
  };
  if (STAGES == 1) {
    int turn = 0;
    for (int base = begin; base < end; base += PASS, turn ^= 1) { fetch(base, 0); attend(base, 0, turn); }
  } else {                                                          // a pass is on its way while one is computed
    fetch(begin, 0);
    for (int base = begin; base < end; base += 2 * PASS) {
      if (base + PASS < end) fetch(base + PASS, STAGES - 1);
      attend(base, 0, 0);
      if (base + PASS < end) {
        if (base + 2 * PASS < end) fetch(base + 2 * PASS, 0);
        attend(base + PASS, STAGES - 1, 1);
      }
    }
  }
"""

# Scales and biases of the tokens whose scores a lane gets, in the pages' element type.
_SCALE_WORDS = r"""
  unsigned key_s[STAGES][2][KEY_STEPS], key_b[STAGES][2][KEY_STEPS];      // of both tokens, element by element
  unsigned value_s[STAGES][2][SECTIONS], value_b[STAGES][2][SECTIONS];
"""
_FETCH_SCALES = r"""
    EACH(j, 2) {
      const size_t key = (slot0 + j * 8 + 2 * t) * KEY_GROUPS + part_of * KEY_STEPS;
      const size_t value = (slot0 + j * 8 + 2 * t) * VALUE_GROUPS + part_of * SECTIONS;
      load_scales<KEY_STEPS, KEY_GROUPS>(key_scales + key, key_s[stage][j]);
      load_scales<KEY_STEPS, KEY_GROUPS>(key_biases + key, key_b[stage][j]);
      load_scales<SECTIONS, VALUE_GROUPS>(value_scales + value, value_s[stage][j]);
      load_scales<SECTIONS, VALUE_GROUPS>(value_biases + value, value_b[stage][j]);
    }
"""

_PLAIN_SCORES = r"""
    EACH(j, 2) {
      float c[4] = {0.0f, 0.0f, 0.0f, 0.0f}, more[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      EACH(s, STEPS) EACH(p, KEY_PAIRS / 2)
        multiply(s < KEY_STEPS ? c : more, q[s][2 * p][0], TILES > 1 ? q[s][2 * p][TILES - 1] : 0u, q[s][2 * p + 1][0],
                 TILES > 1 ? q[s][2 * p + 1][TILES - 1] : 0u, key_pair<BITS>(keys[stage][s][j], 2 * p),
                 key_pair<BITS>(keys[stage][s][j], 2 * p + 1), C());
      EACH(h, TILES) EACH(i, 2)
        score[j][h][i] = ROPE_DIM ? c[2 * h + i] + more[2 * h + i] * unscaled : c[2 * h + i];
    }
"""
_PACKED_SCORES = r"""
    EACH(j, 2) {
      EACH(h, TILES) EACH(i, 2) score[j][h][i] = 0.0f;
      EACH(s, KEY_STEPS) {
        float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        EACH(p, KEY_PAIRS / 2)
          multiply(c, q[s][2 * p][0], TILES > 1 ? q[s][2 * p][TILES - 1] : 0u, q[s][2 * p + 1][0],
                   TILES > 1 ? q[s][2 * p + 1][TILES - 1] : 0u, key_pair<BITS>(keys[stage][s][j], 2 * p),
                   key_pair<BITS>(keys[stage][s][j], 2 * p + 1), C());
        EACH(i, 2) {
          const float by = element_of<T>(key_s[stage][j], i * KEY_STEPS + s);
          const float rest = FMA(-1024.0f, by, element_of<T>(key_b[stage][j], i * KEY_STEPS + s));
          EACH(h, TILES) score[j][h][i] += by * c[2 * h + i] + rest * query_sums[s][h];
        }
      }
    }
"""
_PLAIN_WEIGHTED = r"""
    unsigned p[TILES][2];
    EACH(h, TILES) EACH(j, 2) p[h][j] = pair_of(score[j][h][0], score[j][h][1], C());
    if (!whole)                                                     // who is not seen has no weight, but may be NaN
      EACH(k, 4) {
        const int at = token + k / 2 * 8 + 2 * t + k % 2;
        EACH(s, SECTIONS) EACH(w, VALUE_WORDS) if (at < low || at >= end) values[stage][s][k][w] = 0u;
      }
    EACH(s, SECTIONS) EACH(i, EACH_LANE / 2) {
      unsigned early[2], late[2];
      value_pairs<BITS>(values[stage][s][0], values[stage][s][1], i, early);
      value_pairs<BITS>(values[stage][s][2], values[stage][s][3], i, late);
      EACH(h, TILES)
        multiply(acc[s * (EACH_LANE / 2) + i][h], early[0], early[1], late[0], late[1], p[h][0], p[h][1], C());
    }
"""
_PACKED_WEIGHTED = r"""
    EACH(s, SECTIONS) {
      unsigned p[TILES][2];
      EACH(j, 2) {
        float scales[2], biases[2];
        EACH(i, 2) {
          const int at = token + j * 8 + 2 * t + i;
          const bool seen = whole || (at >= low && at < end);
          scales[i] = seen ? element_of<T>(value_s[stage][j], i * SECTIONS + s) * 256.0f : 0.0f;
          biases[i] = seen ? element_of<T>(value_b[stage][j], i * SECTIONS + s) : 0.0f;
        }
        EACH(h, TILES) {
          const float a = float(C(score[j][h][0] * scales[0])), b = float(C(score[j][h][1] * scales[1]));
          p[h][j] = pair_of(a, b, C());
          apart[s][h] += score[j][h][0] * biases[0] + score[j][h][1] * biases[1] - 4.0f * (a + b);
        }
      }
      EACH(i, EACH_LANE / 2) {
        unsigned early[2], late[2];
        value_pairs<BITS>(values[stage][s][0], values[stage][s][1], i, early);
        value_pairs<BITS>(values[stage][s][2], values[stage][s][3], i, late);
        EACH(h, TILES)
          multiply(acc[s * (EACH_LANE / 2) + i][h], early[0], early[1], late[0], late[1], p[h][0], p[h][1], C());
      }
    }
"""

# Warps over the tokens are joined one after the other: their results lie in shared memory with lanes side by side.
_JOIN = r"""
  EACH(h, TILES) {
    EACH(k, 2) sum[h] += SHFL_XOR(sum[h], 1 + k);
    if (BITS) EACH(s, SECTIONS) EACH(k, 2) apart[BITS ? s : 0][h] += SHFL_XOR(apart[BITS ? s : 0][h], 1 + k);
    if (part_of == 0 && t == 0) {
      warp_sums[(over_tokens * 16 + h * 8 + g) * 2] = top[h];
      warp_sums[(over_tokens * 16 + h * 8 + g) * 2 + 1] = sum[h];
    }
  }
  BARRIER;
  EACH(h, TILES) {
    float highest = LOWEST;
    EACH(w, WARPS / PARTS) highest = FMAX(highest, warp_sums[(w * 16 + h * 8 + g) * 2]);
    const float scaled = EXP2(top[h] - highest);
    const float even = SHFL(scaled, 8 * t), odd = SHFL(scaled, 8 * t + 4);
    EACH(s, SECTIONS) {
      float more[2] = {0.0f, 0.0f};
      if (BITS) { more[0] = SHFL(apart[BITS ? s : 0][h], 8 * t); more[1] = SHFL(apart[BITS ? s : 0][h], 8 * t + 4); }
      EACH(i, EACH_LANE / 2) EACH(k, 4) {
        float& x = acc[s * (EACH_LANE / 2) + i][h][k];
        x = (BITS ? x * 0.00390625f + more[k % 2] : x) * (k % 2 ? odd : even);
      }
    }
  }
#pragma unroll 1
  for (int w = 0; w < WARPS / PARTS; ++w) {
    if (over_tokens == w)
      EACH(h, TILES) EACH(s, SECTIONS) EACH(i, EACH_LANE / 2) EACH(k, 4) {
        const int head = h * 8 + 2 * t + k % 2;
        if (head < HEADS) {
          float& x = result[head * RESULT_DIM +
                            ((part_of * SECTIONS + s) * EACH_LANE + 2 * i + k / 2) * 8 + g];
          x = acc[s * (EACH_LANE / 2) + i][h][k] + (w ? x : 0.0f);
        }
      }
    BARRIER;
  }
  for (int i = TID; i < here * VALUE_DIM; i += THREADS) {
    const int head = i / VALUE_DIM, d = i % VALUE_DIM;
    float highest = LOWEST, total = 0.0f;
    EACH(w, WARPS / PARTS) highest = FMAX(highest, warp_sums[(w * 16 + head) * 2]);
    EACH(w, WARPS / PARTS)
      total += warp_sums[(w * 16 + head) * 2 + 1] * EXP2(warp_sums[(w * 16 + head) * 2] - highest);
    const float x = result[head * RESULT_DIM +
                           ((d / VALUE_STEP) * EACH_LANE + d % EACH_LANE) * 8 + d % VALUE_STEP / EACH_LANE];
    const float sink = splits == 1 ? SINK(kv_head * GROUP + head0 + head) : 0.0f;
    store_result<T>(out, part, sums, first_head + head, VALUE_DIM, d, split, splits, x, highest, total, sink);
  }
  @JOIN@
"""


@cache
def mma_text(
    *, packed: bool, latent: bool = False, joined: bool = False, normed: bool = False,
    value_heads: ValueHeads = "given", sinks: bool = False,
) -> tuple[str, str]:  # fmt: skip
    """Body and header of the kernel: over packed pages or latent ones, from a joined product with or without norms."""
    rows = JOINED_ROWS.replace("@NORM@", NORM if normed else "") if joined else SEPARATE_ROWS
    rows = rows.replace("@FRESH@", "1" if value_heads == "given" else "2").replace("@KINDS@", KINDS[value_heads])
    rows = rows.replace("@ROPE_QUERIES@", ROPE_QUERIES if latent else "")
    fragments = _FRAGMENTS.replace("@WRITE@", _PACKED_WRITE if packed else _PLAIN_WRITE)
    loop = _LOOP.replace("@SCORES@", _PACKED_SCORES if packed else _PLAIN_SCORES)
    loop = loop.replace("@WEIGHTED@", _PACKED_WEIGHTED if packed else _PLAIN_WEIGHTED)
    loop = loop.replace("@SCALE_WORDS@", _SCALE_WORDS if packed else "")
    loop = loop.replace("@FETCH_SCALES@", _FETCH_SCALES if packed else "")
    loop = loop.replace("@VALUES@", "key_pages" if latent else "value_pages")
    header = TENSOR_CORES + UNROLLED + SHARED_FUNCTIONS + SINK_MACROS[sinks] + ATTENTION_FUNCTIONS
    return _SETUP + rows + fragments + loop + _JOIN, header + (PACKING if packed else "") + _FUNCTIONS
