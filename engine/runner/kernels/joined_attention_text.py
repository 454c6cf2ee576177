"""The text of decode attention that begins at a layer's joined product: head norms and rotation in the same launch.

A row holds its query heads, its key heads and its value heads, one behind the other, as a product with the joined
weights gives them. Everything after that is :data:`engine.runner.kernels.paged_attention_text.ATTENTION_PASSES`.
A rotation turns elements i and i + KEY_DIM / 2 of a head; a lane holds both. Queries stay in float32, the new key is
rounded once. So is a new value, where value heads are normalized, which they are without gains.

EPS: bits of what is added to the mean square of a head, for heads that are normalized.
"""

from functools import cache
from typing import Literal

from engine.runner.kernels.packed_attention_text import (
    PACK_NEWEST,
    PACKED_PASSES,
    PACKED_SETUP,
    PACKING,
    UNPACKING,
)
from engine.runner.kernels.paged_attention_text import (
    ATTENTION_FUNCTIONS,
    ATTENTION_PASSES,
    ATTENTION_SETUP,
    SHARED_FUNCTIONS,
    SINK_MACROS,
)

ValueHeads = Literal["given", "normalized", "normalized keys"]
"""What values are: a row's value heads as given, or normalized; or its key heads, normalized but neither scaled by
gains nor turned, where a row holds no others."""

KINDS: dict[ValueHeads, str] = {"given": "2", "normalized": "2", "normalized keys": "1"}
"""Heads of a row for each kv head."""

_ROTATE = r"""
template <int PAIRS>
FUNCTION void turn_pairs(PRIVATE float* f, PRIVATE const float* cosines, PRIVATE const float* sines) {
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) {
    const float a = f[i], b = f[i + PAIRS];
    f[i] = a * cosines[i] - b * sines[i];
    f[i + PAIRS] = b * cosines[i] + a * sines[i];
  }
}
// A word of elements, each rounded.
template <typename T> FUNCTION unsigned packed_word(PRIVATE const float* f) {
  alignas(4) T few[4 / sizeof(T)];
#pragma unroll
  for (int i = 0; i < 4 / int(sizeof(T)); ++i) few[i] = T(f[i]);
  return *(PRIVATE const unsigned*)few;
}
template <typename T> FUNCTION uint4 packed_vector(PRIVATE const float* f) {
  constexpr int PER_WORD = 4 / int(sizeof(T));
  uint4 raw;
  raw.x = packed_word<T>(f);
  raw.y = packed_word<T>(f + PER_WORD);
  raw.z = packed_word<T>(f + 2 * PER_WORD);
  raw.w = packed_word<T>(f + 3 * PER_WORD);
  return raw;
}
"""

_NORMALIZE = r"""
// What divides a team's head by its root mean square.
template <int DIM, int LANES> FUNCTION float head_scale(PRIVATE const float* f, float eps) {
  constexpr int PART = DIM / LANES;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < PART; ++i) sum += f[i] * f[i];
#pragma unroll
  for (int mask = LANES / 2; mask > 0; mask >>= 1) sum += SHFL_XOR(sum, mask);
  return RSQRT(sum / DIM + eps);
}
// The same, times the gains of its elements.
template <int DIM, int LANES, int VEC>
FUNCTION void normalize_head(PRIVATE float* f, GLOBAL const float* gain, int in_team, float eps) {
  const float scaled = head_scale<DIM, LANES>(f, eps);
#pragma unroll
  for (int i = 0; i < DIM / LANES; ++i) f[i] *= scaled * gain[COLUMN(i / VEC) + i % VEC];
}
"""

_NORM_CALL = "normalize_head<KEY_DIM, LANES, VEC>({values}, {gain}, in_team, CONSTANT(EPS));"
_NORM_VALUE = r"""
    float w[VALUE_PART];
#pragma unroll
    for (int v = 0; v < VALUE_LOADS; ++v) load_elements<T, VEC>(new_value + COLUMN(v), &w[v * VEC]);
    const float scaled = head_scale<VALUE_DIM, LANES>(w, CONSTANT(EPS));
#pragma unroll
    for (int i = 0; i < VALUE_PART; ++i) w[i] *= scaled;
"""

_JOINED_ROWS = r"""
  constexpr int PAIRS = KEY_PART / 2;
  GLOBAL const T* given = joined + (size_t)row * kv_heads * (GROUP + @KINDS@) * KEY_DIM;
  float cosines[PAIRS], sines[PAIRS];
#pragma unroll
  for (int i = 0; i < PAIRS; ++i) {
    const float angle = float(position) * constants[COLUMN(i / VEC) + i % VEC];
    const float turns = RINT(angle * 0.15915494f);
    // Without whole turns: 2 pi is 6.2831855 as a float, and 1.7484556e-7 less.
    const float rest = FMA(turns, 1.7484556e-7f, FMA(-turns, 6.2831855f, angle));
    cosines[i] = COS(rest); sines[i] = SIN(rest);
  }
#pragma unroll
  for (int g = 0; g < HEADS; ++g) {
    const int head = kv_head * GROUP + (head0 + g < GROUP ? head0 + g : GROUP - 1);
#pragma unroll
    for (int v = 0; v < KEY_LOADS; ++v) load_elements<T, VEC>(given + head * KEY_DIM + COLUMN(v), &q[g][v * VEC]);
    @NORM_QUERY@
    turn_pairs<PAIRS>(q[g], cosines, sines);
  }
  if (has_newest && WARP == 0) {                                    // all teams, since lanes exchange sums
    GLOBAL const T* new_key = given + (kv_heads * GROUP + kv_head) * KEY_DIM;
    GLOBAL const T* new_value = new_key + kv_heads * (@KINDS@ - 1) * KEY_DIM;
    float k[KEY_PART];
#pragma unroll
    for (int v = 0; v < KEY_LOADS; ++v) load_elements<T, VEC>(new_key + COLUMN(v), &k[v * VEC]);
    @NORM_KEY@
    turn_pairs<PAIRS>(k, cosines, sines);
    @NORM_VALUE@
    @KEEP@
  }
"""
_KEEP_PLAIN = r"""
    if (team == 0) {
      const int block = block_tables[row * width + position / BLOCK_SIZE];
      const size_t slot = kv_head * slots + (size_t)block * BLOCK_SIZE + position % BLOCK_SIZE;
      GLOBAL T* key = const_cast<GLOBAL T*>(key_pages) + slot * KEY_DIM;
      GLOBAL T* value = const_cast<GLOBAL T*>(value_pages) + slot * VALUE_DIM;
#pragma unroll
      for (int v = 0; v < KEY_LOADS; ++v) {
        const uint4 raw = packed_vector<T>(&k[v * VEC]);
        newest[v * LANES + in_team] = raw;
        *(GLOBAL uint4*)(key + COLUMN(v)) = raw;
      }
#pragma unroll
      for (int v = 0; v < VALUE_LOADS; ++v) {
        const uint4 raw = @VALUE@;
        newest[(KEY_LOADS + v) * LANES + in_team] = raw;
        *(GLOBAL uint4*)(value + COLUMN(v)) = raw;
      }
    }
"""
_KEEP_FRESH = r"""
    if (team == 0)
#pragma unroll
      for (int i = 0; i < KEY_PART; ++i) fresh[COLUMN(i / VEC) + i % VEC] = T(k[i]);
    @VALUE@
"""
_PLAIN_VALUE = {False: "*(GLOBAL const uint4*)(new_value + COLUMN(v))", True: "packed_vector<T>(&w[v * VEC])"}
_FRESH_VALUE = {
    False: "for (int i = lane; i < VALUE_DIM; i += 32) fresh[KEY_DIM + i] = new_value[i];",
    True: r"""
    if (team == 0)
#pragma unroll
      for (int i = 0; i < VALUE_PART; ++i) fresh[KEY_DIM + COLUMN(i / VEC) + i % VEC] = T(w[i]);""",
}


@cache
def joined_text(*, normed: bool, packed: bool = False, value_heads: ValueHeads = "given") -> tuple[str, str]:
    """Body and header of the kernel, for heads that are normalized or not, over plain pages or packed ones."""
    norms_values = value_heads != "given"
    query, key = (
        (
            _NORM_CALL.format(values="q[g]", gain="constants + KEY_DIM / 2"),
            _NORM_CALL.format(values="k", gain="constants + KEY_DIM / 2 * 3"),
        )
        if normed
        else ("", "")
    )
    rows = _JOINED_ROWS.replace("@NORM_QUERY@", query).replace("@NORM_KEY@", key)
    rows = rows.replace("@NORM_VALUE@", _NORM_VALUE if norms_values else "")
    rows = rows.replace("@KEEP@", _KEEP_FRESH if packed else _KEEP_PLAIN).replace("@KINDS@", KINDS[value_heads])
    rows = rows.replace("@VALUE@", (_FRESH_VALUE if packed else _PLAIN_VALUE)[norms_values])
    header = SHARED_FUNCTIONS + SINK_MACROS[False] + ATTENTION_FUNCTIONS + _ROTATE + (_NORMALIZE if normed else "")
    if packed:
        return PACKED_SETUP + rows + PACK_NEWEST + PACKED_PASSES, header + PACKING + UNPACKING
    return ATTENTION_SETUP + rows + ATTENTION_PASSES, header
