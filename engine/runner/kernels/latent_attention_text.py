"""The text of decode attention over latent pages (MLA): a token's one vector is the key of all heads, and their value.

Beside it lies what is rotated, ``ROPE_DIM`` elements that only keys have. The rest is
:mod:`engine.runner.kernels.paged_attention_text`, in which a lane's part of a key is its part of the value too, so that
every token is read once for all heads.
"""

from engine.runner.kernels.paged_attention_text import (
    ATTENTION_FUNCTIONS,
    ATTENTION_PASSES,
    ATTENTION_SETUP,
    SHARED_FUNCTIONS,
    SINK_MACROS,
)

_ROWS = r"""
  constexpr int ROPE_PART = ROPE_DIM / LANES;                       // a lane's rotated elements of a key
  SHARED T newest_rope[ROPE_DIM];
  float rope_q[HEADS][ROPE_PART];
#pragma unroll
  for (int g = 0; g < HEADS; ++g) {
    const size_t head = first_head + (head0 + g < GROUP ? head0 + g : GROUP - 1);
#pragma unroll
    for (int v = 0; v < KEY_LOADS; ++v)
      load_elements<T, VEC>(queries + head * KEY_DIM + COLUMN(v), &q[g][v * VEC]);
#pragma unroll
    for (int i = 0; i < ROPE_PART; ++i)
      rope_q[g][i] = float(rope_queries[head * ROPE_DIM + in_team * ROPE_PART + i]) * LOG2E;
  }

  if (has_newest && WARP == 0 && team == 0) {
    const int block = block_tables[row * width + position / BLOCK_SIZE];
    const size_t slot = (size_t)block * BLOCK_SIZE + position % BLOCK_SIZE;
#pragma unroll
    for (int v = 0; v < KEY_LOADS; ++v) {
      const uint4 raw = *(GLOBAL const uint4*)(new_keys + (size_t)row * KEY_DIM + COLUMN(v));
      newest[v * LANES + in_team] = raw;
      *(GLOBAL uint4*)(const_cast<GLOBAL T*>(key_pages) + slot * KEY_DIM + COLUMN(v)) = raw;
    }
#pragma unroll
    for (int i = 0; i < ROPE_PART; ++i) {
      const int d = in_team * ROPE_PART + i;
      const T element = new_values[(size_t)row * ROPE_DIM + d];
      newest_rope[d] = element;
      const_cast<GLOBAL T*>(value_pages)[slot * ROPE_DIM + d] = element;
    }
  }
"""

_VALUE_LOADS = r"""
#pragma unroll
      for (int v = 0; v < VALUE_LOADS; ++v)
        values[u][v] = paged ? *(GLOBAL const uint4*)(value + COLUMN(v))
                             : seen ? newest[(KEY_LOADS + v) * LANES + in_team] : ZERO4;
"""
_ROPE_LOADS = r"""
#pragma unroll
      for (int i = 0; i < ROPE_PART; ++i) {
        const int d = in_team * ROPE_PART + i;
        rope[u][i] = paged ? float(value_pages[slot * ROPE_DIM + d]) : seen ? float(newest_rope[d]) : 0.0f;
      }
"""
_REPLACED = (
    (_VALUE_LOADS, _ROPE_LOADS),
    ("      GLOBAL const T* value = value_pages + slot * VALUE_DIM;\n", ""),
    (", values[TOKENS][VALUE_LOADS];", ";\n    float rope[TOKENS][ROPE_PART];"),
    ("unpack_vector<T>(values[u][v], x)", "unpack_vector<T>(keys[u][v], x)"),
    (
        "for (int g = 0; g < HEADS; ++g) score[u][g] = 0.0f;",
        """for (int g = 0; g < HEADS; ++g) {
        score[u][g] = 0.0f;
#pragma unroll
        for (int i = 0; i < ROPE_PART; ++i) score[u][g] += rope_q[g][i] * rope[u][i];
      }""",
    ),
)


def _over_latents(passes: str) -> str:
    for usual, latent in _REPLACED:
        assert usual in passes, usual
        passes = passes.replace(usual, latent)
    return passes


LATENT_ATTENTION = ATTENTION_SETUP + _ROWS + _over_latents(ATTENTION_PASSES)
LATENT_HEADER = SHARED_FUNCTIONS + SINK_MACROS[False] + ATTENTION_FUNCTIONS
