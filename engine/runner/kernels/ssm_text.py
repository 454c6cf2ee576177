"""The texts of a Mamba 2 layer's single step over slots: its convolution, and its recurrence.

Slots are those of :mod:`engine.runner.kernels.gated_delta_text`, and so is the way in which a block holds a head's
state [DV, DK] in registers. Here no two threads share a part of the convolution's state, so one launch reads and
writes it. Per head, with ``mixed`` = (x [HV, DV], B [HK, DK], C [HK, DK]),

    step = clip(softplus(dt + dt_bias));  state = exp(-exp(a_log) * step) * state + step * x B^T;  y = state C + d x

Template arguments
    T, CHANNELS, TAPS, BIASED, THREADS         of the convolution
    T, HK, HV, DK, DV, LANES, ROWS, WARPS      groups, heads, size of a state's row, rows; geometry
    LOW, HIGH                                  bits of the bounds of a step
"""

from engine.runner.kernels.gated_delta_text import COLUMN, READ_STATE, VECTORS, WRITE_STATE

CONV_FUNCTIONS = VECTORS
CONV = r"""
  constexpr int VEC = 16 / int(sizeof(T));
  const int row = BLK_Y, c = (BLK_X * THREADS + TID) * VEC;
  if (c >= CHANNELS) return;
  const int from = slots[row], to = slots[slots_shape[1] + row];
  GLOBAL uint4* given = (GLOBAL uint4*)(out + (size_t)row * CHANNELS + c);
  if (from < 0 && to < 0) { *given = ZERO4; return; }                // a padding row
  uint4 raw[TAPS];
#pragma unroll
  for (int tap = 0; tap < TAPS - 1; ++tap)
    raw[tap] = from < 0 ? ZERO4
      : *(GLOBAL const uint4*)(conv_states + ((size_t)from * (TAPS - 1) + tap) * CHANNELS + c);
  raw[TAPS - 1] = *(GLOBAL const uint4*)(x + (size_t)row * CHANNELS + c);
  float sum[VEC], f[VEC], weights[VEC * TAPS];
#pragma unroll
  for (int tap = 0; tap < TAPS; ++tap)
    unpack_vector<T>(*(GLOBAL const uint4*)(weight + c * TAPS + tap * VEC), &weights[tap * VEC]);
#pragma unroll
  for (int i = 0; i < VEC; ++i) sum[i] = BIASED ? float(bias[c + i]) : 0.0f;
#pragma unroll
  for (int tap = 0; tap < TAPS; ++tap) {
    unpack_vector<T>(raw[tap], f);
#pragma unroll
    for (int i = 0; i < VEC; ++i) sum[i] = FMA(weights[i * TAPS + tap], f[i], sum[i]);
  }
#pragma unroll
  for (int i = 0; i < VEC; ++i) sum[i] = silu_of(sum[i]);
  *given = vector_of<T>(sum);
  if (to < 0) return;
  GLOBAL T* kept = const_cast<GLOBAL T*>(conv_states) + (size_t)to * (TAPS - 1) * CHANNELS + c;
#pragma unroll
  for (int tap = 0; tap < TAPS - 1; ++tap) *(GLOBAL uint4*)(kept + tap * CHANNELS) = raw[tap + 1];
"""

SSM_FUNCTIONS = VECTORS + COLUMN + "#define ROW(r) ((r) * TEAMS + team)\n"
SSM = (
    r"""
  constexpr int OWN = DK / LANES, QUADS = OWN / 4, TEAMS = 32 / LANES * WARPS, THREADS = 32 * WARPS;
  const int head = BLK_X, row = BLK_Y, in_team = TID % LANES, team = TID / LANES;
  const int from = slots[row], to = slots[slots_shape[1] + row];
  const size_t result = ((size_t)row * HV + head) * DV;
  if (from < 0 && to < 0) {                                         // a padding row
    for (int i = TID; i < DV; i += THREADS) out[result + i] = T(0.0f);
    return;
  }
"""
    + READ_STATE
    + r"""
  GLOBAL const T* given = mixed + (size_t)row * (HV * DV + 2 * HK * DK);
  GLOBAL const T* group = given + HV * DV + head / (HV / HK) * DK;
  const float plus = softplus_of(float(dt[row * HV + head]) + float(dt_bias[head]));
  const float above = FMAX(plus, CONSTANT(LOW)), step = above < CONSTANT(HIGH) ? above : CONSTANT(HIGH);
  const float decay = EXP2(-EXP2(float(a_log[head]) * LOG2E) * step * LOG2E), skip = float(d[head]);
  float b[OWN], c[OWN];
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    b[i] = float(group[COLUMN(i / 4) + i % 4]);
    c[i] = float(group[HK * DK + COLUMN(i / 4) + i % 4]);
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const float x = ROW(r) < DV ? float(given[head * DV + ROW(r)]) : 0.0f;
    float y = 0.0f;
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      s[r][i] = FMA(step * x, b[i], decay * s[r][i]);
      y = FMA(s[r][i], c[i], y);
    }
#pragma unroll
    for (int mask = LANES / 2; mask > 0; mask >>= 1) y += SHFL_XOR(y, mask);
    if (r % LANES == in_team && ROW(r) < DV) out[result + ROW(r)] = T(FMA(skip, x, y));
  }
"""
    + WRITE_STATE
)
