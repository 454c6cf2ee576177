"""The texts of gated delta nets over slots: what stands before the recurrence, its step for many rows, its scan.

A state is float32 [heads, DV, DK] of a slot, a convolution's the last TAPS - 1 of its inputs [TAPS - 1, channels].
``slots`` int32 [2, n] has the slot that each sequence reads, and the one that it writes: -1 reads zeros and writes
nothing, and they differ where the state before is kept. Per head and token

    state = g * state;  delta = (v - state k) * beta;  state += delta k^T;  y = state q

The convolution's state is read by one launch and written by the next, since blocks share it. A row of a state is held
in registers by a team of ``LANES`` lanes, ``ROWS`` rows at once. The scan has a block's keys and queries come into
shared memory ``STAGE`` tokens at a time, the next ones on their way meanwhile. All tokens of a stage have their outputs
summed over a team together, each lane of which ends with some of them.

Template arguments
    T, HK, HV, DK, DV, TAPS   element type, heads of keys and of values, their sizes, inputs of a convolution's output
    INTERLEAVED               whether projections are joined by key head: (q, k, v.., z..) and (b.., a..)
    TEAM, TILE, THREADS       before: lanes of a head, tokens and threads of a block
    LANES, ROWS, WARPS, STAGE geometry
    EPS                       of the output's norm, as the bits of a float32
"""

from engine.runner.kernels.paged_attention_text import SHARED_FUNCTIONS

VECTORS = (
    SHARED_FUNCTIONS
    + r"""
template <typename T> FUNCTION unsigned word_of(PRIVATE const float* f) {
  alignas(4) T few[4 / sizeof(T)];
#pragma unroll
  for (int i = 0; i < 4 / int(sizeof(T)); ++i) few[i] = T(f[i]);
  return *(PRIVATE const unsigned*)few;
}
template <typename T> FUNCTION uint4 vector_of(PRIVATE const float* f) {
  constexpr int PER_WORD = 4 / int(sizeof(T));
  uint4 raw = ZERO4;
  raw.x = word_of<T>(f);
  raw.y = word_of<T>(f + PER_WORD);
  raw.z = word_of<T>(f + 2 * PER_WORD);
  raw.w = word_of<T>(f + 3 * PER_WORD);
  return raw;
}
FUNCTION float sigmoid_of(float x) { return 1.0f / (1.0f + EXP2(-x * LOG2E)); }
FUNCTION float silu_of(float x) { return x / (1.0f + EXP2(-x * LOG2E)); }
FUNCTION float softplus_of(float x) {
  const float size = x < 0.0f ? -x : x;
  return FMAX(x, 0.0f) + LOG2(1.0f + EXP2(-size * LOG2E)) / LOG2E;
}
FUNCTION float decay_of(float step, float a_log) {
  return EXP2(-EXP2(a_log * LOG2E) * softplus_of(step) * LOG2E);
}
"""
)
FUNCTIONS = (
    VECTORS
    + r"""
#define CHANNELS (2 * HK * DK + HV * DV)
#define SHARE (HV / HK)
#define GROUPED (2 * DK + 2 * SHARE * DV)
#define X_WIDTH (INTERLEAVED ? HK * GROUPED : CHANNELS)
// Where channel c lies in a row of x; a vector of channels lies together.
#define V_PART(c) ((c) - 2 * HK * DK)
#define X_OF(c) (!INTERLEAVED ? (c) : (c) < HK * DK ? (c) / DK * GROUPED + (c) % DK \
: (c) < 2 * HK * DK ? ((c) - HK * DK) / DK * GROUPED + DK + (c) % DK \
: V_PART(c) / (SHARE * DV) * GROUPED + 2 * DK + V_PART(c) % (SHARE * DV))
#define Z_OF(row, head) (!INTERLEAVED ? ((size_t)(row) * HV + (head)) * DV : (size_t)(row) * HK * GROUPED \
+ (head) / SHARE * GROUPED + 2 * DK + SHARE * DV + (head) % SHARE * DV)
#define GATE_OF(row, head) (!INTERLEAVED ? (row) * HV + (head) : \
(row) * 2 * HV + (head) / SHARE * 2 * SHARE + (head) % SHARE)
#define A_AFTER_B (INTERLEAVED ? SHARE : 0)

// A vector of the convolution's input at token t of a sequence; before its first token from the slot that it reads.
#define TAP(t, c) ((t) >= 0 ? *(GLOBAL const uint4*)(x + ((size_t)sequence * tokens + (t)) * X_WIDTH + X_OF(c)) \
: from >= 0 ? *(GLOBAL const uint4*)(conv_states + ((size_t)from * (TAPS - 1) + TAPS - 1 + (t)) * CHANNELS + (c)) \
: ZERO4)
"""
)

INPUTS = r"""
  constexpr int VEC = 16 / int(sizeof(T)), WIDEST = DK > DV ? DK : DV;
  constexpr int LOADS = (WIDEST / VEC + TEAM - 1) / TEAM, PART = LOADS * VEC, HEADS = 2 * HK + HV;
  const int sequence = BLK_Z, tokens = x_shape[1], in_team = TID % TEAM;
  const int from = slots[sequence], to = slots[slots_shape[1] + sequence];
  if (from < 0 && to < 0) return;                                   // a padding row
  const int asked = (BLK_X * THREADS + TID) / TEAM, head = asked < HEADS ? asked : HEADS - 1;
  const bool is_value = head >= 2 * HK;
  const int dim = is_value ? DV : DK, channel = is_value ? 2 * HK * DK + (head - 2 * HK) * DV : head * DK;
  const int first = BLK_Y * TILE, last = first + TILE < tokens ? first + TILE : tokens;

  float weights[PART * TAPS], taps[TAPS][PART];
#pragma unroll
  for (int l = 0; l < LOADS; ++l) {
    const int i = (l * TEAM + in_team) * VEC;
#pragma unroll
    for (int j = 0; j < TAPS; ++j)                                  // those of a vector of channels lie together
      unpack_vector<T>(i < dim ? *(GLOBAL const uint4*)(conv_weight + (channel + i) * TAPS + j * VEC) : ZERO4,
                       &weights[(l * TAPS + j) * VEC]);
#pragma unroll
    for (int tap = 0; tap < TAPS - 1; ++tap)
      unpack_vector<T>(i < dim ? TAP(first + tap - TAPS + 1, channel + i) : ZERO4, &taps[tap][l * VEC]);
  }
  for (int t = first; t < last; ++t) {
    float out[PART], squares = 0.0f;
#pragma unroll
    for (int l = 0; l < LOADS; ++l) {
      const int i = (l * TEAM + in_team) * VEC;
      unpack_vector<T>(i < dim ? TAP(t, channel + i) : ZERO4, &taps[TAPS - 1][l * VEC]);
    }
#pragma unroll
    for (int i = 0; i < PART; ++i) {
      float sum = 0.0f;
#pragma unroll
      for (int tap = 0; tap < TAPS; ++tap) sum = FMA(weights[i * TAPS + tap], taps[tap][i], sum);
      out[i] = silu_of(sum);
      squares += out[i] * out[i];
#pragma unroll
      for (int tap = 0; tap < TAPS - 1; ++tap) taps[tap][i] = taps[tap + 1][i];
    }
#pragma unroll
    for (int mask = TEAM / 2; mask > 0; mask >>= 1) squares += SHFL_XOR(squares, mask);
    if (asked >= HEADS) continue;
    if (!is_value) {
      const float length = RSQRT(squares + 1e-6f), scaled = head < HK ? length * RSQRT(float(DK)) : length;
#pragma unroll
      for (int i = 0; i < PART; ++i) out[i] *= scaled;
    } else if (in_team == 0) {
      const int own = head - 2 * HK, row = sequence * tokens + t;
      const float step = float(a[GATE_OF(row, own) + A_AFTER_B]) + float(dt_bias[own]);
      gates[2 * (row * HV + own)] = decay_of(step, float(a_log[own]));
      gates[2 * (row * HV + own) + 1] = sigmoid_of(float(b[GATE_OF(row, own)]));
    }
#pragma unroll
    for (int l = 0; l < LOADS; ++l) {
      const int i = (l * TEAM + in_team) * VEC;
      GLOBAL T* given = mixed + ((size_t)sequence * tokens + t) * CHANNELS + channel + i;
      if (i < dim) *(GLOBAL uint4*)given = vector_of<T>(&out[l * VEC]);
    }
  }
"""

_SETUP = r"""
  constexpr int VEC = 16 / int(sizeof(T)), OWN = DK / LANES, QUADS = OWN / 4;
  constexpr int TEAMS = 32 / LANES * WARPS, THREADS = 32 * WARPS;
  const int head = @HEAD@, sequence = @SEQUENCE@, key_head = head / SHARE, tokens = x_shape[1];
  const int from = slots[sequence], to = slots[slots_shape[1] + sequence];
  const int in_team = TID % LANES, team = TID / LANES;
"""

# By the thread that reads them, row after row: where a slot is read and written, rows move towards the first.
_KEEP = r"""
  if (to >= 0) {
    GLOBAL T* kept = const_cast<GLOBAL T*>(conv_states) + (size_t)to * (TAPS - 1) * CHANNELS;
    for (int c = (@BLOCK@ * THREADS + TID) * VEC; c < CHANNELS; c += @BLOCKS@ * THREADS * VEC)
      for (int tap = 0; tap < TAPS - 1; ++tap) {
        const uint4 raw = TAP(tokens + tap - TAPS + 1, c);
        *(GLOBAL uint4*)(kept + tap * CHANNELS + c) = raw;
      }
  }
"""

READ_STATE = r"""
  float s[ROWS][OWN];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const size_t at = (((size_t)from * HV + head) * DV + ROW(r)) * DK;
#pragma unroll
    for (int i = 0; i < QUADS; ++i) {
      const bool there = from >= 0 && ROW(r) < DV;
      unpack_vector<float>(there ? *(GLOBAL const uint4*)(states + at + COLUMN(i)) : ZERO4, &s[r][4 * i]);
    }
  }
"""
WRITE_STATE = r"""
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const size_t at = (((size_t)to * HV + head) * DV + ROW(r)) * DK;
#pragma unroll
    for (int i = 0; i < QUADS; ++i)
      if (to >= 0 && ROW(r) < DV)
        *(GLOBAL uint4*)(const_cast<GLOBAL float*>(states) + at + COLUMN(i)) = vector_of<float>(&s[r][4 * i]);
  }
"""

COLUMN = "#define COLUMN(i) (((i) * LANES + in_team) * 4)\n"
_MOVE_ON = (
    r"""
  BARRIER;
  float y[ROWS], k[OWN], squares = 0.0f;
#pragma unroll
  for (int i = 0; i < QUADS; ++i) unpack_vector<float>(shared_rows[i * LANES + in_team], &k[4 * i]);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < OWN; ++i) sum = FMA(s[r][i], k[i], sum);
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask >>= 1) sum += SHFL_XOR(sum, mask);
    const float delta = (value[r] - decay * sum) * beta;
#pragma unroll
    for (int i = 0; i < OWN; ++i) s[r][i] = FMA(k[i], delta, decay * s[r][i]);
  }
"""
    + WRITE_STATE
    + r"""
#pragma unroll
  for (int i = 0; i < QUADS; ++i) unpack_vector<float>(shared_rows[DK / 4 + i * LANES + in_team], &k[4 * i]);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    y[r] = 0.0f;
#pragma unroll
    for (int i = 0; i < OWN; ++i) y[r] = FMA(s[r][i], k[i], y[r]);
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask >>= 1) y[r] += SHFL_XOR(y[r], mask);
    squares += y[r] * y[r];                                         // rows past the last are zeros
  }
#pragma unroll
  for (int mask = 16; mask >= LANES; mask >>= 1) squares += SHFL_XOR(squares, mask);
  if (LANE == 0) shared_sums[WARP] = squares;
  BARRIER;
  squares = 0.0f;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) squares += shared_sums[WARP / WARPS * WARPS + w];
  const float scaled = RSQRT(squares / DV + CONSTANT(EPS));
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
    if (r % LANES == in_team && ROW(r) < DV) {
      const float gate = float(z[Z_OF(sequence, head) + ROW(r)]);
      out[result + ROW(r)] = T(y[r] * scaled * float(gain[ROW(r)]) * silu_of(gate));
    }
"""
)

STEP_FUNCTIONS = FUNCTIONS + COLUMN + "#define ROW(r) ((r) * TEAMS + team)\n"
STEP = (
    _SETUP.replace("@HEAD@", "BLK_X").replace("@SEQUENCE@", "BLK_Y")
    + r"""
  SHARED uint4 shared_rows[2 * DK / 4];                             // the row's key and query
  SHARED float shared_sums[WARPS];
  const size_t result = ((size_t)sequence * HV + head) * DV;
  if (to < 0 && from < 0) {                                         // a padding row
    for (int i = TID; i < DV; i += THREADS) out[result + i] = T(0.0f);
    return;
  }
"""
    + READ_STATE
    + r"""
  for (int u = TID; u < 2 * DK / VEC; u += THREADS) {
    const int c = u < DK / VEC ? HK * DK + key_head * DK + u * VEC : key_head * DK + u * VEC - DK;
    float f[VEC];
    unpack_vector<T>(*(GLOBAL const uint4*)(mixed + (size_t)sequence * CHANNELS + c), f);
#pragma unroll
    for (int i = 0; i < VEC / 4; ++i) shared_rows[u * VEC / 4 + i] = vector_of<float>(f + 4 * i);
  }
  const float decay = gates[2 * (sequence * HV + head)], beta = gates[2 * (sequence * HV + head) + 1];
  float value[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
    value[r] = ROW(r) < DV ? float(mixed[(size_t)sequence * CHANNELS + 2 * HK * DK + head * DV + ROW(r)]) : 0.0f;
"""
    + _KEEP.replace("@BLOCK@", "head").replace("@BLOCKS@", "HV")
    + _MOVE_ON
)

ALONE = (
    r"""
  constexpr int VEC = 16 / int(sizeof(T)), OWN = DK / LANES, QUADS = OWN / 4;
  constexpr int TEAMS = 32 / LANES * WARPS, TEAM = DK / VEC, UNITS = (2 * DK + SHARE * DV) / VEC, tokens = 1;
  SHARED uint4 shared_rows[2 * DK / 4];                             // the row's key and query
  SHARED float shared_values[SHARE * DV], shared_gates[2 * SHARE], shared_sums[SHARE * WARPS];
  const int key_head = BLK_X, sequence = BLK_Y, own = WARP / WARPS, head = key_head * SHARE + own;
  const int from = slots[sequence], to = slots[slots_shape[1] + sequence];
  const int in_team = TID % LANES, team = TID % (32 * WARPS) / LANES;
  const size_t result = ((size_t)sequence * HV + head) * DV;
  if (to < 0 && from < 0) {                                         // a padding row
    for (int i = TID % (32 * WARPS); i < DV; i += 32 * WARPS) out[result + i] = T(0.0f);
    return;
  }
"""
    + READ_STATE
    + r"""
  if (WARP < (UNITS + 31) / 32) {                                   // whole warps, since lanes exchange sums
    const int part = TID < UNITS ? TID * VEC : 0;
    const bool is_value = part >= 2 * DK;
    const int c = part < DK ? key_head * DK + part : part < 2 * DK ? (HK + key_head - 1) * DK + part
      : 2 * HK * DK + key_head * SHARE * DV + part - 2 * DK;
    uint4 raw[TAPS];
    float f[VEC], sum[VEC], weights[VEC * TAPS], squares = 0.0f;
#pragma unroll
    for (int tap = 0; tap < TAPS; ++tap) {
      raw[tap] = TAP(tap - TAPS + 1, c);
      unpack_vector<T>(*(GLOBAL const uint4*)(conv_weight + c * TAPS + tap * VEC), &weights[tap * VEC]);
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) sum[i] = 0.0f;
#pragma unroll
    for (int tap = 0; tap < TAPS; ++tap) {
      unpack_vector<T>(raw[tap], f);
#pragma unroll
      for (int i = 0; i < VEC; ++i) sum[i] = FMA(weights[i * TAPS + tap], f[i], sum[i]);
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) {
      sum[i] = silu_of(sum[i]);
      squares += sum[i] * sum[i];
    }
#pragma unroll
    for (int mask = TEAM / 2; mask > 0; mask >>= 1) squares += SHFL_XOR(squares, mask);
    if (TID < UNITS) {
      const float length = is_value ? 1.0f : RSQRT(squares + 1e-6f);
      const float scaled = part < DK ? length * RSQRT(float(DK)) : length;
#pragma unroll
      for (int i = 0; i < VEC; ++i) sum[i] = float(T(sum[i] * scaled));
#pragma unroll
      for (int i = 0; i < VEC; ++i)
        if (is_value) shared_values[part - 2 * DK + i] = sum[i];
#pragma unroll
      for (int i = 0; i < VEC / 4; ++i)
        if (!is_value) shared_rows[(part < DK ? DK + part : part - DK) / 4 + i] = vector_of<float>(sum + 4 * i);
      GLOBAL T* kept = const_cast<GLOBAL T*>(conv_states) + (size_t)to * (TAPS - 1) * CHANNELS + c;
#pragma unroll
      for (int tap = 0; tap < TAPS - 1; ++tap)
        if (to >= 0) *(GLOBAL uint4*)(kept + tap * CHANNELS) = raw[tap + 1];
    }
  }
  if (TID % (32 * WARPS) == 0) {
    const float step = float(a[GATE_OF(sequence, head) + A_AFTER_B]) + float(dt_bias[head]);
    shared_gates[2 * own] = decay_of(step, float(a_log[head]));
    shared_gates[2 * own + 1] = sigmoid_of(float(b[GATE_OF(sequence, head)]));
  }
  BARRIER;
  const float decay = shared_gates[2 * own], beta = shared_gates[2 * own + 1];
  float value[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) value[r] = ROW(r) < DV ? shared_values[own * DV + ROW(r)] : 0.0f;
"""
    + _MOVE_ON
)

SCAN_FUNCTIONS = (
    FUNCTIONS
    + COLUMN
    + r"""
#define ROW(r) (first + team * ROWS + (r))
// A unit of the stage from token t0 on: VEC elements of a token's key, and then of its query.
#define UNIT(u) (TID + (u) * THREADS)
#define UNIT_TOKEN(u) (t0 + UNIT(u) / (2 * DK / VEC))
#define UNIT_CHANNEL(u) (UNIT(u) % (2 * DK / VEC) < DK / VEC \
? (HK + key_head) * DK + UNIT(u) % (2 * DK / VEC) * VEC : key_head * DK + UNIT(u) % (2 * DK / VEC) * VEC - DK)
"""
)
_FETCH = r"""
#pragma unroll
    for (int u = 0; u < PER_THREAD; ++u)
      held[u] = UNIT(u) < UNITS && UNIT_TOKEN(u) < tokens
        ? *(GLOBAL const uint4*)(mixed + (size_t)UNIT_TOKEN(u) * CHANNELS + UNIT_CHANNEL(u)) : ZERO4;
#pragma unroll
    for (int u = 0; u < VALUES_PER_THREAD; ++u) {
      const int t = t0 + UNIT(u) / BLOCK_ROWS, row = first + UNIT(u) % BLOCK_ROWS;
      held_values[u] = UNIT(u) < STAGE * BLOCK_ROWS && t < tokens && row < DV
        ? float(mixed[(size_t)t * CHANNELS + 2 * HK * DK + head * DV + row]) : 0.0f;
    }
    if (TID < 2 * STAGE) {                                          // past the last token a state stays
      const int t = t0 + TID / 2;
      held_gate = t < tokens ? gates[2 * (t * HV + head) + TID % 2] : TID % 2 ? 0.0f : 1.0f;
    }
"""
_PLACE = r"""
#pragma unroll
    for (int u = 0; u < PER_THREAD; ++u)
      if (UNIT(u) < UNITS) {
        float f[VEC];
        unpack_vector<T>(held[u], f);
#pragma unroll
        for (int i = 0; i < VEC / 4; ++i) shared_rows[side][UNIT(u) * VEC / 4 + i] = vector_of<float>(f + 4 * i);
      }
#pragma unroll
    for (int u = 0; u < VALUES_PER_THREAD; ++u)
      if (UNIT(u) < STAGE * BLOCK_ROWS) shared_values[side][UNIT(u)] = held_values[u];
    if (TID < 2 * STAGE) shared_gates[side][TID] = held_gate;
"""
SCAN = (
    _SETUP.replace("@HEAD@", "BLK_Y").replace("@SEQUENCE@", "0")
    + r"""
  constexpr int BLOCK_ROWS = TEAMS * ROWS, UNITS = STAGE * 2 * DK / VEC;
  constexpr int PER_THREAD = (UNITS + THREADS - 1) / THREADS;
  constexpr int VALUES_PER_THREAD = (STAGE * BLOCK_ROWS + THREADS - 1) / THREADS;
  SHARED uint4 shared_rows[2][STAGE * 2 * DK / 4];
  SHARED float shared_values[2][STAGE * BLOCK_ROWS];
  SHARED float shared_gates[2][2 * STAGE];
  const int first = BLK_X * BLOCK_ROWS;
"""
    + READ_STATE
    + _KEEP.replace("@BLOCK@", "(BLK_Y * GRID_X + BLK_X)").replace("@BLOCKS@", "(HV * GRID_X)")
    + r"""
  uint4 held[PER_THREAD];
  float held_values[VALUES_PER_THREAD], held_gate = 0.0f;
  {
    const int t0 = 0, side = 0;
"""
    + _FETCH
    + _PLACE
    + r"""
  }
  BARRIER;
  for (int start = 0, now = 0; start < tokens; start += STAGE, now ^= 1) {
    const int t0 = start + STAGE, side = now ^ 1;
"""
    + _FETCH
    + r"""
    float y[ROWS][STAGE];
#pragma unroll
    for (int t = 0; t < STAGE; ++t) {
      float k[OWN], q[OWN];
#pragma unroll
      for (int i = 0; i < QUADS; ++i) {
        unpack_vector<float>(shared_rows[now][t * 2 * DK / 4 + i * LANES + in_team], &k[4 * i]);
        unpack_vector<float>(shared_rows[now][(2 * t + 1) * DK / 4 + i * LANES + in_team], &q[4 * i]);
      }
      const float decay = shared_gates[now][2 * t], beta = shared_gates[now][2 * t + 1];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < OWN; ++i) sums[i % 4] = FMA(s[r][i], k[i], sums[i % 4]);
        float sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
#pragma unroll
        for (int mask = LANES / 2; mask > 0; mask >>= 1) sum += SHFL_XOR(sum, mask);
        const float value = shared_values[now][t * BLOCK_ROWS + team * ROWS + r];
        const float delta = (value - decay * sum) * beta;
        y[r][t] = 0.0f;
#pragma unroll
        for (int i = 0; i < OWN; ++i) {
          s[r][i] = FMA(k[i], delta, decay * s[r][i]);
          y[r][t] = FMA(s[r][i], q[i], y[r][t]);
        }
      }
    }
    // At every step a lane keeps the half of its tokens that its bit says, and gives the other half away.
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      int mine = 0;
#pragma unroll
      for (int mask = LANES / 2, left = STAGE; mask > 0; mask >>= 1) {
        const bool upper = in_team & mask;
        if (left > 1) {
          left /= 2;
#pragma unroll
          for (int i = 0; i < STAGE / 2; ++i)
            if (i < left) {
              const float given = upper ? y[r][i] : y[r][i + left], kept = upper ? y[r][i + left] : y[r][i];
              y[r][i] = kept + SHFL_XOR(given, mask);
            }
          mine += upper ? left : 0;
        } else {
          y[r][0] += SHFL_XOR(y[r][0], mask);
        }
      }
      constexpr int MINE = STAGE > LANES ? STAGE / LANES : 1, SAME = LANES > STAGE ? LANES / STAGE : 1;
#pragma unroll
      for (int i = 0; i < MINE; ++i)
        if (in_team % SAME == 0 && start + mine + i < tokens && ROW(r) < DV)
          out[((size_t)(start + mine + i) * HV + head) * DV + ROW(r)] = T(y[r][i]);
    }
"""
    + _PLACE
    + r"""
    BARRIER;
  }
"""
    + WRITE_STATE
)
