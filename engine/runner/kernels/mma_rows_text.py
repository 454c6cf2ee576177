"""How rows come to decode attention on tensor cores: into shared memory, queries as what is multiplied, new keys and
values as they are. Parts of the text of :mod:`engine.runner.kernels.paged_attention_mma_text`.
"""

# Queries, and the new key and value, into shared memory.
SEPARATE_ROWS = r"""
  stage_rows<T, C, THREADS>(queries + first_head * KEY_DIM, staged, KEY_DIM, QUERY_ROW, here, HEADS, TID);
  @ROPE_QUERIES@
  if (has_newest) {
    const size_t from = (size_t)row * kv_heads + kv_head;
    stage_rows<T, T, THREADS>(new_keys + from * KEY_DIM, fresh, KEY_DIM, KEY_DIM, 1, 1, TID);
    stage_rows<T, T, THREADS>(new_values + from * GIVEN, fresh + KEY_DIM, GIVEN, GIVEN, 1, 1, TID);
  }
"""

ROPE_QUERIES = r"""
  stage_rows<T, C, THREADS>(rope_queries + first_head * ROPE_DIM, staged + KEY_DIM, ROPE_DIM, QUERY_ROW, here, HEADS,
                            TID);
"""

# The same from a layer's joined product; a warp normalizes and turns a head at a time. FRESH heads are kept: the new
# key, and the new value where that is normalized.
JOINED_ROWS = r"""
  constexpr int PAIRS = KEY_DIM / 64, FRESH = @FRESH@;
  const T* given = joined + (size_t)row * kv_heads * (GROUP + @KINDS@) * KEY_DIM;
  const int value_head = kv_heads * (GROUP + @KINDS@ - 1) + kv_head;
  float cosines[PAIRS], sines[PAIRS];
  EACH(i, PAIRS) {
    const float angle = float(position) * constants[lane * PAIRS + i];
    const float turns = RINT(angle * 0.15915494f);
    // Without whole turns: 2 pi is 6.2831855 as a float, and 1.7484556e-7 less.
    const float rest = FMA(turns, 1.7484556e-7f, FMA(-turns, 6.2831855f, angle));
    cosines[i] = COS(rest); sines[i] = SIN(rest);
  }
  for (int head = WARP; head < HEADS + FRESH; head += WARPS) {
    const bool is_key = head == HEADS, is_value = FRESH > 1 && head > HEADS;
    const int source = is_value ? value_head : is_key ? kv_heads * GROUP + kv_head
                                                      : kv_head * GROUP + head0 + (head < here ? head : 0);
    const T* from = given + (size_t)source * KEY_DIM + lane * PAIRS;
    float a[PAIRS], b[PAIRS];
    EACH(i, PAIRS) { a[i] = float(from[i]); b[i] = float(from[KEY_DIM / 2 + i]); }
    @NORM@
    EACH(i, PAIRS) {
      const int d = lane * PAIRS + i;
      const float x = a[i] * cosines[i] - b[i] * sines[i], y = b[i] * cosines[i] + a[i] * sines[i];
      if (is_value) { fresh[KEY_DIM + d] = T(a[i]); fresh[KEY_DIM + KEY_DIM / 2 + d] = T(b[i]); }
      else if (is_key) { fresh[d] = T(x); fresh[KEY_DIM / 2 + d] = T(y); }
      else {
        staged[head * QUERY_ROW + d] = C(head < here ? x : 0.0f);
        staged[head * QUERY_ROW + KEY_DIM / 2 + d] = C(head < here ? y : 0.0f);
      }
    }
  }
  if (FRESH == 1)
    for (int i = TID; i < VALUE_DIM; i += THREADS) fresh[KEY_DIM + i] = given[(size_t)value_head * KEY_DIM + i];
"""

NORM = r"""
    float square = 0.0f;
    EACH(i, PAIRS) square += a[i] * a[i] + b[i] * b[i];
    EACH(k, 5) square += SHFL_XOR(square, 16 >> k);
    const float scaled = RSQRT(square / KEY_DIM + CONSTANT(EPS));
    EACH(i, PAIRS) {
      const int d = lane * PAIRS + i;
      const float* gain = constants + KEY_DIM / 2 + (is_key ? KEY_DIM : 0) + d;
      a[i] *= is_value ? scaled : scaled * gain[0];
      b[i] *= is_value ? scaled : scaled * gain[KEY_DIM / 2];
    }
"""
