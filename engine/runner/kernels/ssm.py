"""A Mamba 2 layer's single step over slots that kernels read and write in place: two launches between its projections.

What :mod:`engine.runner.kernels.paged_attention` says of order holds here: whatever touches the states takes an input
that was computed from an output of the launch before.
"""

from dataclasses import dataclass

import mlx.core as mx

from engine.runner.kernels import ssm_text as text
from engine.runner.kernels.dialect import float_bits, make_kernel
from engine.runner.kernels.gated_delta import ELEMENT_TYPES, MOST_ELEMENTS, whole_head

_THREADS = 64
"""Of a block of the convolution."""


@dataclass(frozen=True, slots=True)
class SsmShape:
    """Layers that share kernels: ``heads`` of ``head_dim`` rows of ``state_dim``, whose B and C come by ``groups``.

    ``taps``: inputs of one output of the convolution, ``biased`` or not. ``limit``: bounds of a time step.
    """

    dtype: mx.Dtype
    groups: int
    heads: int
    state_dim: int
    head_dim: int
    taps: int
    biased: bool
    limit: tuple[float, float]

    @property
    def channels(self) -> int:
        """Of the convolution: x, B and C."""
        return self.heads * self.head_dim + 2 * self.groups * self.state_dim

    @property
    def conv_shape(self) -> tuple[int, int]:
        """Of a slot's last inputs of the convolution."""
        return self.taps - 1, self.channels

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """Of a slot's state."""
        return self.heads, self.head_dim, self.state_dim

    @property
    def problem(self) -> str | None:
        """Why there are no kernels for this, None if there are."""
        if self.dtype not in ELEMENT_TYPES:
            return f"state spaces in {self.dtype}"
        if not 2 <= self.taps <= 8:
            return f"a convolution over {self.taps} inputs"
        if self.heads % self.groups:
            return f"{self.heads} heads over {self.groups} groups"
        if self.state_dim % 16 or self.state_dim > 256 or self.state_dim * self.head_dim > MOST_ELEMENTS:
            return f"states of {self.head_dim} x {self.state_dim}"
        return f"{self.channels} channels" if self.channels * self.dtype.size % 16 else None


def conv_step(x: mx.array, weight: mx.array, bias: mx.array | None, conv_states: mx.array, slots: mx.array) -> mx.array:
    """A causal convolution's next output [B, 1, channels] after silu, of ``x`` [B, 1, channels].

    ``weight`` [channels, taps, 1], ``bias`` [channels]. ``conv_states`` [slots, taps - 1, channels] are moved on in
    place. ``slots`` int32 [2, B or more] as in :mod:`engine.runner.kernels.state_slots`.
    """
    sequences, _, channels = x.shape
    vectors = channels * x.dtype.size // 16
    (out,) = make_kernel(
        "conv_step", ("x", "weight", "bias", "conv_states", "slots"), ("out",), text.CONV, text.CONV_FUNCTIONS
    )(
        inputs=[x, weight, weight if bias is None else bias, conv_states, slots],
        template=[
            ("T", x.dtype), ("CHANNELS", channels), ("TAPS", weight.shape[1]), ("BIASED", int(bias is not None)),
            ("THREADS", _THREADS),
        ],
        grid=(-(-vectors // _THREADS) * _THREADS, sequences, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )  # fmt: skip
    return out


def ssm_step(
    mixed: mx.array,
    dt: mx.array,
    a_log: mx.array,
    dt_bias: mx.array,
    d: mx.array,
    states: mx.array,
    slots: mx.array,
    shape: SsmShape,
) -> mx.array:
    """One token of each sequence: [B, 1, heads * head_dim]; ``states`` are moved on in place.

    ``mixed`` [B, 1, channels] as :func:`conv_step` gave it, ``dt`` [B, 1, heads]; ``a_log``, ``dt_bias`` and ``d``
    [heads]; ``states`` float32 [slots, heads, head_dim, state_dim].
    """
    geometry = whole_head(shape.state_dim, shape.head_dim)
    inputs = ("mixed", "dt", "a_log", "dt_bias", "d", "states", "slots")
    (out,) = make_kernel("ssm_step", inputs, ("out",), text.SSM, text.SSM_FUNCTIONS)(
        inputs=[mixed, dt, a_log, dt_bias, d, states, slots],
        template=[
            ("T", shape.dtype), ("HK", shape.groups), ("HV", shape.heads), ("DK", shape.state_dim),
            ("DV", shape.head_dim), ("LANES", geometry.lanes), ("ROWS", geometry.rows), ("WARPS", geometry.warps),
            ("LOW", float_bits(shape.limit[0])), ("HIGH", float_bits(shape.limit[1])),
        ],
        grid=(shape.heads * 32 * geometry.warps, mixed.shape[0], 1),
        threadgroup=(32 * geometry.warps, 1, 1),
        output_shapes=[(mixed.shape[0], 1, shape.heads * shape.head_dim)],
        output_dtypes=[shape.dtype],
    )  # fmt: skip
    return out
