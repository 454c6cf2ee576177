"""Gated delta nets (Qwen3-Next, Qwen3.5) over slots that kernels read and write in place: two launches a layer.

The first computes what stands before the recurrence: the convolution, normalized queries and keys, both gates. The
second is the recurrence, of one token of many sequences, with the gated norm behind it, or of many tokens of one. What
:mod:`engine.runner.kernels.paged_attention` says of order holds here: whatever touches the states takes an input that
was computed from an output of the launch before.
"""

from dataclasses import dataclass

import mlx.core as mx

from engine.runner.kernels import gated_delta_text as text
from engine.runner.kernels.dialect import Kernel, float_bits, make_kernel

ELEMENT_TYPES = (mx.bfloat16, mx.float16, mx.float32)
_THREADS = 128
"""Of a block before the recurrence."""
_TILE = 8
"""Tokens of one, in a chunk: the convolution's inputs are read once for all of them."""
_MOST_STATE = 64
"""Elements of the state that a thread holds."""
_MOST_WARPS = 16
MOST_ELEMENTS = 32 * _MOST_WARPS * _MOST_STATE
"""Of a head's state."""
_MOST_STAGE = 1024
"""Elements of the keys of a scan's stage: two stages with their queries are 16 KB, half of what Metal has."""


@dataclass(frozen=True, slots=True)
class DeltaShape:
    """Layers that share kernels. ``taps``: inputs of one output of the convolution.

    ``interleaved``: projections come by key head, as (q, k, v …, z …) and (b …, a …).
    """

    dtype: mx.Dtype
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    interleaved: bool = False

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys and values."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def conv_shape(self) -> tuple[int, int]:
        """Of a slot's last inputs of the convolution."""
        return self.taps - 1, self.channels

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Of a slot's state."""
        return self.value_heads, self.value_dim, self.key_dim

    @property
    def problem(self) -> str | None:
        """Why there are no kernels for this, None if there are."""
        dims = self.key_dim, self.value_dim
        if self.dtype not in ELEMENT_TYPES:
            return f"gated delta nets in {self.dtype}"
        if not 2 <= self.taps <= 8:
            return f"a convolution over {self.taps} inputs"
        if self.value_heads % self.key_heads:
            return f"{self.value_heads} value heads over {self.key_heads} key heads"
        if any(dim % 16 for dim in dims) or max(dims) > 256 or self.key_dim * self.value_dim > MOST_ELEMENTS:
            return f"heads of {dims[0]} and {dims[1]}"
        return None

    @property
    def one_launch(self) -> bool:
        """Whether a block may have all value heads of a key head: then a step is one launch."""
        share = self.value_heads // self.key_heads
        lanes = self.key_dim * self.dtype.size // 16
        threads = 32 * share * step_geometry(self).warps
        units = (2 * self.key_dim + share * self.value_dim) * self.dtype.size // 16
        return threads <= 32 * _MOST_WARPS and units <= threads and lanes <= 32 and lanes & (lanes - 1) == 0

    @property
    def template(self) -> list[tuple[str, mx.Dtype | int]]:
        """As the texts' template arguments."""
        return [
            ("T", self.dtype), ("HK", self.key_heads), ("HV", self.value_heads), ("DK", self.key_dim),
            ("DV", self.value_dim), ("TAPS", self.taps), ("INTERLEAVED", int(self.interleaved)),
        ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a block of the recurrence divides its work; the text says what each number means."""

    lanes: int
    rows: int
    warps: int

    @property
    def teams(self) -> int:
        """Of a block."""
        return 32 // self.lanes * self.warps


def step_geometry(shape: DeltaShape) -> Geometry:
    """For one token: a block has a whole head of a state."""
    return whole_head(shape.key_dim, shape.value_dim)


def whole_head(key_dim: int, value_dim: int) -> Geometry:
    """For a block that holds a state of ``value_dim`` rows of ``key_dim`` elements."""
    lanes, warps = lanes_of(key_dim), 1
    while key_dim * value_dim > 32 * warps * _MOST_STATE and warps < _MOST_WARPS:
        warps *= 2
    return Geometry(lanes, -(-value_dim * lanes // (32 * warps)), warps)


def scan_geometry(shape: DeltaShape) -> Geometry:
    """For many tokens: the rows of a head go to several blocks, about one block to each multiprocessor of a GPU."""
    lanes, rows, warps = lanes_of(shape.key_dim), 2, 4
    while warps > 1 and rows * warps * 32 // lanes > shape.value_dim:
        warps //= 2
    return Geometry(lanes, rows, warps)


def lanes_of(key_dim: int) -> int:
    """Lanes that share a row of a state: 16 elements each, or as near to that as its size allows."""
    lanes = 4
    while key_dim // lanes > 16 and key_dim % (8 * lanes) == 0:
        lanes *= 2
    return lanes


def delta_inputs(
    x: mx.array,
    b: mx.array,
    a: mx.array,
    conv_weight: mx.array,
    a_log: mx.array,
    dt_bias: mx.array,
    conv_states: mx.array,
    slots: mx.array,
    shape: DeltaShape,
) -> tuple[mx.array, mx.array]:
    """What the recurrence takes of ``x`` [B, S, channels]: mixed [B, S, channels], and gates float32 [B, S, heads, 2].

    Mixed are queries, keys and values after the convolution, with the queries' and keys' norms. Gates are the decay
    and beta, of ``a`` and ``b`` [B, S, heads], ``a_log`` and ``dt_bias`` [heads]. ``conv_weight`` [channels, taps, 1];
    ``conv_states`` [slots, taps - 1, channels] are read, not written. ``slots`` int32 [2, B or more]. Interleaved, x
    has z too, and ``b`` and ``a`` are one array.
    """
    sequences, tokens, _ = x.shape
    vectors = max(shape.key_dim, shape.value_dim) * shape.dtype.size // 16
    team = min(32, 1 << (vectors - 1).bit_length())
    heads = 2 * shape.key_heads + shape.value_heads
    tile = 1 if tokens == 1 else _TILE
    mixed, gates = _inputs_kernel()(
        inputs=[x, b, a, conv_weight, a_log, dt_bias, conv_states, slots],
        template=[*shape.template, ("TEAM", team), ("TILE", tile), ("THREADS", _THREADS)],
        grid=(-(-heads * team // _THREADS) * _THREADS, -(-tokens // tile), sequences),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(sequences, tokens, shape.channels), (sequences, tokens, shape.value_heads, 2)],
        output_dtypes=[shape.dtype, mx.float32],
    )
    return mixed, gates


def delta_step(
    mixed: mx.array,
    gates: mx.array,
    x: mx.array,
    z: mx.array,
    gain: mx.array,
    conv_states: mx.array,
    states: mx.array,
    slots: mx.array,
    shape: DeltaShape,
    *,
    eps: float,
    geometry: Geometry | None = None,
) -> mx.array:
    """One token of each sequence: [B, 1, heads * value_dim] after the gated norm; states are moved on in place.

    ``mixed`` [B, 1, channels] and ``gates`` as :func:`delta_inputs` gave them for ``x``; ``z`` [B, 1, heads *
    value_dim], or interleaved x; ``gain`` [value_dim] and ``eps`` of the norm. ``states`` float32 [slots, heads,
    value_dim, key_dim].
    """
    sequences = x.shape[0]
    used = geometry or step_geometry(shape)
    (out,) = _step_kernel()(
        inputs=[mixed, gates, x, z, gain, conv_states, states, slots],
        template=[
            *shape.template, ("LANES", used.lanes), ("ROWS", used.rows), ("WARPS", used.warps),
            ("EPS", float_bits(eps)),
        ],
        grid=(shape.value_heads * 32 * used.warps, sequences, 1),
        threadgroup=(32 * used.warps, 1, 1),
        output_shapes=[(sequences, 1, shape.value_heads * shape.value_dim)],
        output_dtypes=[shape.dtype],
    )  # fmt: skip
    return out


def delta_alone(
    x: mx.array,
    b: mx.array,
    a: mx.array,
    z: mx.array,
    conv_weight: mx.array,
    a_log: mx.array,
    dt_bias: mx.array,
    gain: mx.array,
    conv_states: mx.array,
    states: mx.array,
    slots: mx.array,
    shape: DeltaShape,
    *,
    eps: float,
) -> mx.array:
    """:func:`delta_inputs` and :func:`delta_step` in one launch, for a shape that is :attr:`DeltaShape.one_launch`.

    A block has all value heads of a key head, so that no two share a part of the convolution.
    """
    used = step_geometry(shape)
    threads = 32 * used.warps * (shape.value_heads // shape.key_heads)
    (out,) = _alone_kernel()(
        inputs=[x, b, a, z, conv_weight, a_log, dt_bias, gain, conv_states, states, slots],
        template=[
            *shape.template,
            ("LANES", used.lanes),
            ("ROWS", used.rows),
            ("WARPS", used.warps),
            ("EPS", float_bits(eps)),
        ],
        grid=(shape.key_heads * threads, x.shape[0], 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(x.shape[0], 1, shape.value_heads * shape.value_dim)],
        output_dtypes=[shape.dtype],
    )
    return out


def delta_scan(
    mixed: mx.array,
    gates: mx.array,
    x: mx.array,
    conv_states: mx.array,
    states: mx.array,
    slots: mx.array,
    shape: DeltaShape,
    *,
    geometry: Geometry | None = None,
) -> mx.array:
    """Any number of tokens of one sequence: [1, S, heads, value_dim]; its states are moved on in place.

    As :func:`delta_step`, without the norm.
    """
    tokens = x.shape[1]
    used = geometry or scan_geometry(shape)
    stage = 8 if shape.key_dim * 8 <= _MOST_STAGE else 4
    (out,) = _scan_kernel()(
        inputs=[mixed, gates, x, conv_states, states, slots],
        template=[
            *shape.template, ("LANES", used.lanes), ("ROWS", used.rows), ("WARPS", used.warps), ("STAGE", stage),
        ],
        grid=(-(-shape.value_dim // (used.teams * used.rows)) * 32 * used.warps, shape.value_heads, 1),
        threadgroup=(32 * used.warps, 1, 1),
        output_shapes=[(1, tokens, shape.value_heads, shape.value_dim)],
        output_dtypes=[shape.dtype],
    )  # fmt: skip
    return out


def _inputs_kernel() -> Kernel:
    inputs = ("x", "b", "a", "conv_weight", "a_log", "dt_bias", "conv_states", "slots")
    return make_kernel("gated_delta_inputs", inputs, ("mixed", "gates"), text.INPUTS, text.FUNCTIONS)


def _step_kernel() -> Kernel:
    inputs = ("mixed", "gates", "x", "z", "gain", "conv_states", "states", "slots")
    return make_kernel("gated_delta_step", inputs, ("out",), text.STEP, text.STEP_FUNCTIONS)


def _alone_kernel() -> Kernel:
    inputs = ("x", "b", "a", "z", "conv_weight", "a_log", "dt_bias", "gain", "conv_states", "states", "slots")
    return make_kernel("gated_delta_alone", inputs, ("out",), text.ALONE, text.STEP_FUNCTIONS)


def _scan_kernel() -> Kernel:
    inputs = ("mixed", "gates", "x", "conv_states", "states", "slots")
    return make_kernel("gated_delta_scan", inputs, ("out",), text.SCAN, text.SCAN_FUNCTIONS)
