"""The text of the attention kernels: decode attention over pages, the joining of its splits, and ``collect``.

Decode attention is cut into (split of the context) x (kv head) x (row of the batch). A block reads every key and
value of its split once, for all query heads of the kv head, in 16-byte loads. Within a warp, teams of ``LANES`` lanes
own ``TOKENS`` tokens at a time: after log2(LANES) shuffles a team has their scores, and it keeps its own running
maximum, sum and output in registers. At the end teams are joined by shuffles, warps through shared memory, and splits
by a second kernel, or by the last of their blocks: what depends on that stands in the text as ``@MARKERS@``, which
:mod:`engine.runner.kernels.last_block_text` fills in.

Template arguments
    T, KEY_DIM, VALUE_DIM, GROUP   element type, sizes of a key and of a value, query heads per kv head
    BLOCK_SIZE, WINDOW             slots of a block; tokens that a row sees, itself among them (0: all)
    SCALE, CAP                     bits of float32: of the scores' scale and of their soft cap (0: none)
    LANES, HEADS, WARPS, TOKENS    geometry: lanes of a team, query heads of a warp, warps over the tokens, tokens of
                                   a team at a time
Scores are kept in powers of two: exp2 is one instruction.
"""

SHARED_FUNCTIONS = r"""
#define LOG2E 1.4426950408889634f
#define LOWEST -1e30f   // below every score; not -inf, since the difference of two must be a number
#define UNUSED -1.0f    // in place of a sum: the split has no tokens

template <typename T> FUNCTION void unpack_vector(uint4 raw, PRIVATE float* f) {
  constexpr int PER_WORD = 4 / int(sizeof(T));
  Packed<T>::unpack(raw.x, f);
  Packed<T>::unpack(raw.y, f + PER_WORD);
  Packed<T>::unpack(raw.z, f + 2 * PER_WORD);
  Packed<T>::unpack(raw.w, f + 3 * PER_WORD);
}

// VEC elements from memory.
template <typename T, int VEC> FUNCTION void load_elements(GLOBAL const T* from, PRIVATE float* f) {
  constexpr int EACH_LOAD = 16 / int(sizeof(T));
#pragma unroll
  for (int i = 0; i < VEC / EACH_LOAD; ++i)
    unpack_vector<T>(*(GLOBAL const uint4*)(from + i * EACH_LOAD), f + i * EACH_LOAD);
}

// One element of the output: weighted values over the sum of weights, to which a sink adds its own.
FUNCTION float normalized(float values, float top, float sum, float sink) {
  const float highest = FMAX(top, sink), scaled = EXP2(top - highest);
  sum = sum * scaled + EXP2(sink - highest);
  return sum == 0.0f ? 0.0f : values * scaled / sum;
}
"""

SINK_MACROS = {
    False: "#define SINK(head) -INFINITY\n",
    True: "#define SINK(head) (float(sinks[head]) * LOG2E)\n",
}

ATTENTION_FUNCTIONS = r"""
// Element of a row where this lane's vector number v begins.
#define COLUMN(v) (((v) * LANES + in_team) * VEC)

// One element d of a query head's result: the output itself, or this split's part of it.
template <typename T> FUNCTION void store_result(GLOBAL T* out, GLOBAL float* part, GLOBAL float* sums, size_t head,
                                                 int dim, int d, int split, int splits, float value, float top,
                                                 float sum, float sink) {
  if (splits == 1) {
    out[head * dim + d] = T(normalized(value, top, sum, sink));
    return;
  }
  const size_t at = head * splits + split;
  part[at * dim + d] = value;
  if (d == 0) { sums[2 * at] = top; sums[2 * at + 1] = sum; }
}
"""

SETUP = r"""
  constexpr int VEC = @VEC@;                                        // elements of a load
  constexpr int KEY_LOADS = KEY_DIM / (LANES * VEC), VALUE_LOADS = VALUE_DIM / (LANES * VEC);
  constexpr int KEY_PART = KEY_LOADS * VEC, VALUE_PART = VALUE_LOADS * VEC;   // a lane's elements of a row
  constexpr int TEAMS = 32 / LANES, PASS = WARPS * TEAMS * TOKENS;  // tokens of a block at a time
  constexpr int THREADS = 32 * WARPS * ((GROUP + HEADS - 1) / HEADS);
  SHARED float warp_values[WARPS > 1 ? WARPS * GROUP * VALUE_DIM : 1];
  SHARED float warp_sums[WARPS > 1 ? WARPS * GROUP * 2 : 1];
  @NEWEST@

  const int split = BLK_X, kv_head = BLK_Y, row = BLK_Z, @LAUNCHED@;
  const int kv_heads = key_pages_shape[1], width = block_tables_shape[1];
  const size_t slots = key_pages_shape[2];
  const size_t first_head = ((size_t)row * kv_heads + kv_head) * GROUP;       // of the rows' query heads
  const int lane = LANE, in_team = lane % LANES, team = lane / LANES;
  const int over_tokens = WARP % WARPS, head0 = (WARP / WARPS) * HEADS;

  // The row's tokens [low, length) are cut into splits of whole passes, from the first slot of low's block.
  const int position = positions[row], length = position + 1;
  const int low = WINDOW > 0 && length > WINDOW ? length - WINDOW : 0;
  const int origin = low / BLOCK_SIZE * BLOCK_SIZE;
  const int per_split = ((length - origin + @SPLITS@ - 1) / @SPLITS@ + PASS - 1) / PASS * PASS;
  const int begin = origin + split * per_split;
  const int end = length < begin + per_split ? length : begin + per_split;
  @PARTS@
  if (position < 0 || begin >= length) {                            // a padding row, or a split past the row's end
    if (@EMPTY@) {
      for (int i = TID; i < GROUP * VALUE_DIM; i += THREADS) out[first_head * VALUE_DIM + i] = T(0.0f);
    } @ELSE@ {
      for (int g = TID; g < GROUP; g += THREADS) sums[2 * ((first_head + g) * splits + split) + 1] = UNUSED;
    }
    return;
  }

  float q[HEADS][KEY_PART], acc[HEADS][VALUE_PART], top[HEADS], sum[HEADS];
  const bool has_newest = end == length;                            // this split ends with the new token
"""

# The rows' queries, into registers, and the new token's key and value: into their page, and for this launch into
# shared memory, since nobody reads a slot that it writes.
SEPARATE_QUERIES = r"""
#pragma unroll
  for (int g = 0; g < HEADS; ++g) {
    const size_t head = first_head + (head0 + g < GROUP ? head0 + g : GROUP - 1);
#pragma unroll
    for (int v = 0; v < KEY_LOADS; ++v)
      load_elements<T, VEC>(queries + head * KEY_DIM + COLUMN(v), &q[g][v * VEC]);
  }
"""

_SEPARATE_NEWEST = r"""
  if (has_newest && WARP == 0 && team == 0) {
    const size_t from = (size_t)row * kv_heads + kv_head;
    const int block = block_tables[row * width + position / BLOCK_SIZE];
    const size_t slot = kv_head * slots + (size_t)block * BLOCK_SIZE + position % BLOCK_SIZE;
    GLOBAL T* key = const_cast<GLOBAL T*>(key_pages) + slot * KEY_DIM;
    GLOBAL T* value = const_cast<GLOBAL T*>(value_pages) + slot * VALUE_DIM;
#pragma unroll
    for (int v = 0; v < KEY_LOADS; ++v) {
      const uint4 raw = *(GLOBAL const uint4*)(new_keys + from * KEY_DIM + COLUMN(v));
      newest[v * LANES + in_team] = raw;
      *(GLOBAL uint4*)(key + COLUMN(v)) = raw;
    }
#pragma unroll
    for (int v = 0; v < VALUE_LOADS; ++v) {
      const uint4 raw = *(GLOBAL const uint4*)(new_values + from * VALUE_DIM + COLUMN(v));
      newest[(KEY_LOADS + v) * LANES + in_team] = raw;
      *(GLOBAL uint4*)(value + COLUMN(v)) = raw;
    }
  }

"""

BEFORE_LOADS = r"""
  const float scale = CAP ? CONSTANT(SCALE) : CONSTANT(SCALE) * LOG2E;
#pragma unroll
  for (int g = 0; g < HEADS; ++g) {
    top[g] = LOWEST; sum[g] = 0.0f;
#pragma unroll
    for (int i = 0; i < KEY_PART; ++i) q[g][i] *= scale;
#pragma unroll
    for (int i = 0; i < VALUE_PART; ++i) acc[g][i] = 0.0f;
  }
  if (has_newest) BARRIER;

  int token = begin + (over_tokens * TEAMS + team) * TOKENS;        // of this team: TOKENS of one block
  int next_block = token < end ? block_tables[row * width + token / BLOCK_SIZE] : 0;
  for (int base = begin + over_tokens * TEAMS * TOKENS; base < end; base += PASS, token += PASS) {
    const int block = next_block;
    if (token + PASS < end) next_block = block_tables[row * width + (token + PASS) / BLOCK_SIZE];
"""

_LOADS = r"""
    uint4 keys[TOKENS][KEY_LOADS], values[TOKENS][VALUE_LOADS];
#pragma unroll
    for (int u = 0; u < TOKENS; ++u) {
      const int t = token + u;
      const bool seen = t >= low && t < end, paged = seen && t != position;
      const size_t slot = kv_head * slots + (size_t)block * BLOCK_SIZE + t % BLOCK_SIZE;
      GLOBAL const T* key = key_pages + slot * KEY_DIM;
      GLOBAL const T* value = value_pages + slot * VALUE_DIM;
#pragma unroll
      for (int v = 0; v < KEY_LOADS; ++v)
        keys[u][v] = paged ? *(GLOBAL const uint4*)(key + COLUMN(v)) : seen ? newest[v * LANES + in_team] : ZERO4;
#pragma unroll
      for (int v = 0; v < VALUE_LOADS; ++v)
        values[u][v] = paged ? *(GLOBAL const uint4*)(value + COLUMN(v))
                             : seen ? newest[(KEY_LOADS + v) * LANES + in_team] : ZERO4;
    }
"""

AFTER_LOADS = r"""
    float score[TOKENS][HEADS];
#pragma unroll
    for (int u = 0; u < TOKENS; ++u) {
#pragma unroll
      for (int g = 0; g < HEADS; ++g) score[u][g] = 0.0f;
#pragma unroll
      for (int v = 0; v < KEY_LOADS; ++v) {
        float k[VEC];
        unpack_vector<T>(keys[u][v], k);
#pragma unroll
        for (int g = 0; g < HEADS; ++g)
#pragma unroll
          for (int i = 0; i < VEC; ++i) score[u][g] += q[g][v * VEC + i] * k[i];
      }
    }
#pragma unroll
    for (int u = 0; u < TOKENS; ++u) {
      const bool seen = token + u >= low && token + u < end;
#pragma unroll
      for (int g = 0; g < HEADS; ++g) {
        float x = score[u][g];
#pragma unroll
        for (int mask = LANES / 2; mask > 0; mask >>= 1) x += SHFL_XOR(x, mask);
        if (CAP) x = CONSTANT(CAP) * TANH(x / CONSTANT(CAP)) * LOG2E;
        score[u][g] = seen ? x : -INFINITY;
      }
    }

#pragma unroll
    for (int g = 0; g < HEADS; ++g) {
      float highest = top[g];
#pragma unroll
      for (int u = 0; u < TOKENS; ++u) highest = FMAX(highest, score[u][g]);
      const float scaled = EXP2(top[g] - highest);
      top[g] = highest; sum[g] *= scaled;
#pragma unroll
      for (int i = 0; i < VALUE_PART; ++i) acc[g][i] *= scaled;
#pragma unroll
      for (int u = 0; u < TOKENS; ++u) { score[u][g] = EXP2(score[u][g] - highest); sum[g] += score[u][g]; }
    }
#pragma unroll
    for (int u = 0; u < TOKENS; ++u)
#pragma unroll
      for (int v = 0; v < VALUE_LOADS; ++v) {
        float x[VEC];
        unpack_vector<T>(values[u][v], x);
#pragma unroll
        for (int g = 0; g < HEADS; ++g)
#pragma unroll
          for (int i = 0; i < VEC; ++i) acc[g][v * VEC + i] += score[u][g] * x[i];
      }
  }

#pragma unroll
  for (int g = 0; g < HEADS; ++g) {                                 // join the teams of the warp
    float highest = top[g];
#pragma unroll
    for (int mask = LANES; mask < 32; mask <<= 1) highest = FMAX(highest, SHFL_XOR(highest, mask));
    const float scaled = EXP2(top[g] - highest);
    top[g] = highest; sum[g] *= scaled;
#pragma unroll
    for (int mask = LANES; mask < 32; mask <<= 1) sum[g] += SHFL_XOR(sum[g], mask);
#pragma unroll
    for (int i = 0; i < VALUE_PART; ++i) {
      acc[g][i] *= scaled;
#pragma unroll
      for (int mask = LANES; mask < 32; mask <<= 1) acc[g][i] += SHFL_XOR(acc[g][i], mask);
    }
  }
  if (WARPS == 1) {
    if (team == 0)
#pragma unroll
      for (int g = 0; g < HEADS; ++g)
        if (head0 + g < GROUP) {
          const float sink = splits == 1 ? SINK(kv_head * GROUP + head0 + g) : 0.0f;
#pragma unroll
          for (int i = 0; i < VALUE_PART; ++i)
            store_result<T>(out, part, sums, first_head + head0 + g, VALUE_DIM, COLUMN(i / VEC) + i % VEC, split,
                            splits, acc[g][i], top[g], sum[g], sink);
        }
    @JOIN@
    return;
  }

#pragma unroll
  for (int g = 0; g < HEADS; ++g)                                   // join the warps, which share the writing
    if (head0 + g < GROUP) {
      const int at = over_tokens * GROUP + head0 + g;
      if (lane == 0) { warp_sums[2 * at] = top[g]; warp_sums[2 * at + 1] = sum[g]; }
#pragma unroll
      for (int i = 0; i < VALUE_PART; ++i)
        if (i * TEAMS / VALUE_PART == team) warp_values[at * VALUE_DIM + COLUMN(i / VEC) + i % VEC] = acc[g][i];
    }
  BARRIER;
  for (int i = TID; i < GROUP * VALUE_DIM; i += THREADS) {
    const int g = i / VALUE_DIM, d = i % VALUE_DIM;
    float highest = LOWEST, total = 0.0f, x = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) highest = FMAX(highest, warp_sums[2 * (w * GROUP + g)]);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float scaled = EXP2(warp_sums[2 * (w * GROUP + g)] - highest);
      total += warp_sums[2 * (w * GROUP + g) + 1] * scaled;
      x += warp_values[(w * GROUP + g) * VALUE_DIM + d] * scaled;
    }
    const float sink = splits == 1 ? SINK(kv_head * GROUP + g) : 0.0f;
    store_result<T>(out, part, sums, first_head + g, VALUE_DIM, d, split, splits, x, highest, total, sink);
  }
  @JOIN@
"""

ATTENTION_SETUP = SETUP.replace("@VEC@", "16 / int(sizeof(T))").replace(
    "@NEWEST@", "SHARED uint4 newest[(KEY_LOADS + VALUE_LOADS) * LANES];  // the new token's key and value"
)
ATTENTION_PASSES = BEFORE_LOADS + _LOADS + AFTER_LOADS
ATTENTION = ATTENTION_SETUP + SEPARATE_QUERIES + _SEPARATE_NEWEST + ATTENTION_PASSES

# One block per query head of a row, a thread per element; every warp weighs the splits for itself. A row's splits
# without tokens are its last ones; their parts were never written.
REDUCE = r"""
  const int head = BLK_X, splits = part_shape[2], lane = LANE;
  const int d = TID < VALUE_DIM ? TID : VALUE_DIM - 1;
  const size_t first = ((size_t)BLK_Y * GRID_X + head) * splits;
  float top = LOWEST, used = 0.0f;
  for (int s = lane; s < splits; s += 32)
    if (!(sums[2 * (first + s) + 1] < 0.0f)) { top = FMAX(top, sums[2 * (first + s)]); used += 1.0f; }
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) { top = FMAX(top, SHFL_XOR(top, mask)); used += SHFL_XOR(used, mask); }

  float sum = 0.0f, x = 0.0f;
  for (int base = 0; base < int(used); base += 32) {
    const int here = int(used) - base < 32 ? int(used) - base : 32;
    float weight = 0.0f;
    if (lane < here) {
      weight = EXP2(sums[2 * (first + base + lane)] - top);
      sum += sums[2 * (first + base + lane) + 1] * weight;
    }
#pragma unroll 8
    for (int s = 0; s < here; ++s) x += SHFL(weight, s) * part[(first + base + s) * VALUE_DIM + d];
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) sum += SHFL_XOR(sum, mask);
  if (TID < VALUE_DIM)
    out[((size_t)BLK_Y * GRID_X + head) * VALUE_DIM + d] = T(normalized(x, top, sum, SINK(head)));
"""

# A thread per 16 bytes of the collected keys and values of one kv head. KEY_VECTORS and VALUE_VECTORS are their
# numbers in one row; span holds the positions where the collected rows and the new ones begin.
COLLECT = r"""
  constexpr int VECTORS = KEY_VECTORS + VALUE_VECTORS;
  const int begin = span[0], start = span[1], num_new = new_keys_shape[2];
  const int length = start + num_new - begin;
  const int item = BLK_X * THREADS + TID, kv_head = BLK_Y;
  const int at = item / VECTORS, vector = item % VECTORS, position = begin + at;
  if (at >= length) return;
  const size_t slot = kv_head * (size_t)key_pages_shape[2] + (size_t)block_table[position / BLOCK_SIZE] * BLOCK_SIZE +
                      position % BLOCK_SIZE;
  const size_t fresh = (size_t)kv_head * num_new + (position - start), to = (size_t)kv_head * length + at;
  if (vector < KEY_VECTORS)
    copy_vector(new_keys, key_pages, keys, position >= start, fresh * KEY_VECTORS + vector,
                slot * KEY_VECTORS + vector, to * KEY_VECTORS + vector);
  else
    copy_vector(new_values, value_pages, values, position >= start, fresh * VALUE_VECTORS + vector - KEY_VECTORS,
                slot * VALUE_VECTORS + vector - KEY_VECTORS, to * VALUE_VECTORS + vector - KEY_VECTORS);
"""

COLLECT_FUNCTIONS = r"""
// One vector to the collected rows: a new one, which goes into its page too, or one from its page.
template <typename T> FUNCTION void copy_vector(GLOBAL const T* rows, GLOBAL const T* pages, GLOBAL T* collected,
                                                bool is_new, size_t row, size_t page, size_t to) {
  const uint4 raw = is_new ? ((GLOBAL const uint4*)rows)[row] : ((GLOBAL const uint4*)pages)[page];
  if (is_new) ((GLOBAL uint4*)const_cast<GLOBAL T*>(pages))[page] = raw;
  ((GLOBAL uint4*)collected)[to] = raw;
}
"""
