"""The text of the attention kernels over packed pages: as :mod:`engine.runner.kernels.paged_attention_text`, but what
is loaded are integers with a scale and a bias for each group, and new rows are packed as ``mx.quantize`` packs them.

Template arguments, beside those there: BITS of an element, KEY_GROUP and VALUE_GROUP elements of a group.
"""

from engine.runner.kernels.paged_attention_text import (
    AFTER_LOADS,
    BEFORE_LOADS,
    SEPARATE_QUERIES,
    SETUP,
)

PACKING = r"""
// A warp packs SIZE neighbours of a row, as mx.quantize does on a GPU: every lane gives the word that its elements are
// in, and their scale and bias.
template <int BITS, int SIZE, typename P>
FUNCTION unsigned packed_group(P from, int lane, PRIVATE float* scale, PRIVATE float* bias) {
  constexpr int OWN = SIZE / 32, WORD = 32 / BITS;                  // elements of a lane, and of a word
  const float most = float((1 << BITS) - 1);
  float f[OWN], lowest = 3.4028235e38f, highest = 0.0f;
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    f[i] = float(from[lane * OWN + i]);
    lowest = FMIN(lowest, f[i]);
    highest = FMAX(highest, f[i]);
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    lowest = FMIN(lowest, SHFL_XOR(lowest, mask));
    highest = FMAX(highest, SHFL_XOR(highest, mask));
  }
  const bool negative = FMAX(lowest, -lowest) > FMAX(highest, -highest);
  const float edge = negative ? lowest : highest;
  float s = FMAX((highest - lowest) / most, 1e-7f);
  s = negative ? s : -s;
  const float steps = ROUND(edge / s);
  const float b = steps == 0.0f ? 0.0f : edge;
  s = steps == 0.0f ? s : edge / steps;
  unsigned word = 0u;
#pragma unroll
  for (int i = 0; i < OWN; ++i)
    word |= unsigned(FMIN(FMAX(ROUND((f[i] - b) / s), 0.0f), most)) << (BITS * ((lane * OWN + i) % WORD));
#pragma unroll
  for (int mask = 1; mask < WORD / OWN; mask <<= 1) word |= SHFL_XOR(word, mask);
  *scale = s;
  *bias = b;
  return word;
}
// The same into pages, as group number `group` of their rows.
template <typename T, int BITS, int SIZE, typename P>
FUNCTION void pack_group(P from, size_t group, GLOBAL unsigned* words, GLOBAL T* scales, GLOBAL T* biases, int lane) {
  constexpr int SHARING = 32 / (SIZE * BITS / 32);                  // lanes of a word
  float scale, bias;
  const unsigned word = packed_group<BITS, SIZE>(from, lane, &scale, &bias);
  if (lane % SHARING == 0) words[group * (SIZE * BITS / 32) + lane / SHARING] = word;
  if (lane == 0) { scales[group] = T(scale); biases[group] = T(bias); }
}
"""

# Over packed pages a load is 16 elements, all of one group, and the new token's row is packed by the block's warps.
PACKED_SETUP = SETUP.replace("@VEC@", "16").replace(
    "@NEWEST@",
    r"""constexpr int WORDS = BITS / 2, KEY_GROUPS = KEY_DIM / KEY_GROUP, VALUE_GROUPS = VALUE_DIM / VALUE_GROUP;
  SHARED T fresh[KEY_DIM + VALUE_DIM];
  SHARED unsigned newest[(KEY_DIM + VALUE_DIM) * BITS / 32];        // the new token's key and value
  SHARED float newest_scales[KEY_GROUPS + VALUE_GROUPS], newest_biases[KEY_GROUPS + VALUE_GROUPS];""",
)
_PACKED_SEPARATE_NEWEST = r"""
  if (has_newest) {
    const size_t from = (size_t)row * kv_heads + kv_head;
    for (int i = TID; i < KEY_DIM; i += THREADS) fresh[i] = new_keys[from * KEY_DIM + i];
    for (int i = TID; i < VALUE_DIM; i += THREADS) fresh[KEY_DIM + i] = new_values[from * VALUE_DIM + i];
  }
"""
PACK_NEWEST = r"""
  if (has_newest) {
    BARRIER;
    const int block = block_tables[row * width + position / BLOCK_SIZE];
    const size_t slot = kv_head * slots + (size_t)block * BLOCK_SIZE + position % BLOCK_SIZE;
    for (int i = WARP; i < KEY_GROUPS + VALUE_GROUPS; i += THREADS / 32) {
      const bool is_key = i < KEY_GROUPS;
      const int at = is_key ? i : i - KEY_GROUPS, size = is_key ? KEY_GROUP : VALUE_GROUP;
      float scale, bias;
      const unsigned word = is_key ? packed_group<BITS, KEY_GROUP>(fresh + at * KEY_GROUP, lane, &scale, &bias)
                                   : packed_group<BITS, VALUE_GROUP>(fresh + KEY_DIM + at * VALUE_GROUP, lane,
                                                                     &scale, &bias);
      const int words = size * BITS / 32, sharing = 32 / words;     // words of a group, lanes of a word
      const size_t group = slot * (is_key ? KEY_GROUPS : VALUE_GROUPS) + at;
      GLOBAL unsigned* page = const_cast<GLOBAL unsigned*>(is_key ? key_pages : value_pages);
      if (lane % sharing == 0) {
        page[group * words + lane / sharing] = word;
        newest[(is_key ? 0 : KEY_DIM * BITS / 32) + at * words + lane / sharing] = word;
      }
      if (lane == 0) {
        const_cast<GLOBAL T*>(is_key ? key_scales : value_scales)[group] = T(scale);
        const_cast<GLOBAL T*>(is_key ? key_biases : value_biases)[group] = T(bias);
        newest_scales[i] = float(T(scale));
        newest_biases[i] = float(T(bias));
      }
    }
  }
"""
_PACKED_LOADS = r"""
    unsigned keys[TOKENS][KEY_LOADS][WORDS], values[TOKENS][VALUE_LOADS][WORDS];
    float key_scale[TOKENS][KEY_LOADS], key_bias[TOKENS][KEY_LOADS];
    float value_scale[TOKENS][VALUE_LOADS], value_bias[TOKENS][VALUE_LOADS];
#pragma unroll
    for (int u = 0; u < TOKENS; ++u) {
      const int t = token + u;
      const bool seen = t >= low && t < end, paged = seen && t != position;
      const size_t slot = kv_head * slots + (size_t)block * BLOCK_SIZE + t % BLOCK_SIZE;
#pragma unroll
      for (int v = 0; v < KEY_LOADS; ++v) {
        const int word = COLUMN(v) * BITS / 32, group = COLUMN(v) / KEY_GROUP;
        if (paged) load_words<WORDS>(key_pages + slot * (KEY_DIM * BITS / 32) + word, keys[u][v]);
        else {
#pragma unroll
          for (int w = 0; w < WORDS; ++w) keys[u][v][w] = newest[word + w];
        }
        key_scale[u][v] = paged ? float(key_scales[slot * KEY_GROUPS + group]) : seen ? newest_scales[group] : 0.0f;
        key_bias[u][v] = paged ? float(key_biases[slot * KEY_GROUPS + group]) : seen ? newest_biases[group] : 0.0f;
      }
#pragma unroll
      for (int v = 0; v < VALUE_LOADS; ++v) {
        const int word = COLUMN(v) * BITS / 32, group = COLUMN(v) / VALUE_GROUP, behind = KEY_GROUPS + group;
        if (paged) load_words<WORDS>(value_pages + slot * (VALUE_DIM * BITS / 32) + word, values[u][v]);
        else {
#pragma unroll
          for (int w = 0; w < WORDS; ++w) values[u][v][w] = newest[KEY_DIM * BITS / 32 + word + w];
        }
        value_scale[u][v] =
            paged ? float(value_scales[slot * VALUE_GROUPS + group]) : seen ? newest_scales[behind] : 0.0f;
        value_bias[u][v] =
            paged ? float(value_biases[slot * VALUE_GROUPS + group]) : seen ? newest_biases[behind] : 0.0f;
      }
    }
"""
PACKED_PASSES = (BEFORE_LOADS + _PACKED_LOADS + AFTER_LOADS).replace(
    "unpack_vector<T>(keys[u][v], k)", "unpack_words<BITS>(keys[u][v], key_scale[u][v], key_bias[u][v], k)"
).replace(
    "unpack_vector<T>(values[u][v], x)", "unpack_words<BITS>(values[u][v], value_scale[u][v], value_bias[u][v], x)"
)  # fmt: skip
PACKED_ATTENTION = PACKED_SETUP + SEPARATE_QUERIES + _PACKED_SEPARATE_NEWEST + PACK_NEWEST + PACKED_PASSES
UNPACKING = r"""
template <int WORDS> FUNCTION void load_words(GLOBAL const unsigned* from, PRIVATE unsigned* words) {
  if (WORDS == 4) {
    const uint4 raw = *(GLOBAL const uint4*)from;
    words[0] = raw.x; words[1] = raw.y; words[2] = raw.z; words[3] = raw.w;
  } else {
    const uint2 raw = *(GLOBAL const uint2*)from;
    words[0] = raw.x; words[1] = raw.y;
  }
}
// 16 elements.
template <int BITS> FUNCTION void unpack_words(PRIVATE const unsigned* words, float scale, float bias,
                                               PRIVATE float* f) {
#pragma unroll
  for (int i = 0; i < 16; ++i)
    f[i] = FMA(float((words[i * BITS / 32] >> (i * BITS % 32)) & ((1u << BITS) - 1u)), scale, bias);
}
"""

# A warp per group of a collected row of one kv head. span as above; KEY_GROUPS and VALUE_GROUPS are those of a row.
PACKED_COLLECT = r"""
  constexpr int GROUPS = KEY_GROUPS + VALUE_GROUPS;
  const int begin = span[0], start = span[1], num_new = new_keys_shape[2];
  const int length = start + num_new - begin;
  const int item = BLK_X * (THREADS / 32) + WARP, kv_head = BLK_Y;
  const int at = item / GROUPS, group = item % GROUPS, position = begin + at;
  if (at >= length) return;
  const size_t slot = kv_head * (size_t)key_pages_shape[2] + (size_t)block_table[position / BLOCK_SIZE] * BLOCK_SIZE +
                      position % BLOCK_SIZE;
  const size_t fresh = (size_t)kv_head * num_new + (position - start), to = (size_t)kv_head * length + at;
  const int behind = group - KEY_GROUPS;
  if (group < KEY_GROUPS)
    collect_group<T, BITS, KEY_GROUP>(new_keys, key_pages, key_scales, key_biases, keys, position >= start,
                                      fresh * KEY_GROUPS + group, slot * KEY_GROUPS + group, to * KEY_GROUPS + group,
                                      LANE);
  else
    collect_group<T, BITS, VALUE_GROUP>(new_values, value_pages, value_scales, value_biases, values, position >= start,
                                        fresh * VALUE_GROUPS + behind, slot * VALUE_GROUPS + behind,
                                        to * VALUE_GROUPS + behind, LANE);
"""

PACKED_COLLECT_FUNCTIONS = r"""
// One group to the collected rows, unpacked: a new one, which goes into its page too, or one from its page.
template <typename T, int BITS, int SIZE>
FUNCTION void collect_group(GLOBAL const T* rows, GLOBAL const unsigned* words, GLOBAL const T* scales,
                            GLOBAL const T* biases, GLOBAL T* collected, bool is_new, size_t row, size_t page,
                            size_t to, int lane) {
  constexpr int OWN = SIZE / 32, WORDS = SIZE * BITS / 32, SHARING = 32 / WORDS;
  unsigned word;
  float scale, bias;
  if (is_new) {
    word = packed_group<BITS, SIZE>(rows + row * SIZE, lane, &scale, &bias);
    scale = float(T(scale)); bias = float(T(bias));
    if (lane % SHARING == 0) const_cast<GLOBAL unsigned*>(words)[page * WORDS + lane / SHARING] = word;
    if (lane == 0) {
      const_cast<GLOBAL T*>(scales)[page] = T(scale);
      const_cast<GLOBAL T*>(biases)[page] = T(bias);
    }
  } else {
    word = words[page * WORDS + lane / SHARING];
    scale = float(scales[page]); bias = float(biases[page]);
  }
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const unsigned integer = (word >> (BITS * ((lane * OWN + i) % (32 / BITS)))) & ((1u << BITS) - 1u);
    collected[to * SIZE + lane * OWN + i] = T(FMA(float(integer), scale, bias));
  }
}
"""
