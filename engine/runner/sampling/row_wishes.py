"""What each row of a batch asks for, as a kernel that samples takes it."""

from collections.abc import Sequence
from functools import cached_property

import mlx.core as mx
import numpy as np

from engine.params.sampling_params import SamplingParams
from engine.runner.kernels.draw_rows import FEWEST_ROWS, KEEP_ALL, LOG2_E, NUM_WISHES
from engine.runner.kv.kernel_cache import on_device
from engine.runner.sampling.sampling_parts import Draws, Float32, PenaltyRows


class RowWishes:
    """The rows' wishes, on the device from the first step that asks for them until the batch changes."""

    def __init__(
        self, params: Sequence[SamplingParams], vocab_size: int, draws: Draws | None, penalties: PenaltyRows | None
    ) -> None:
        self._params = params
        self._vocab_size = vocab_size
        self._draws = draws
        self._penalties = penalties

    @cached_property
    def array(self) -> mx.array:
        """Float32 [R, 8], see :func:`engine.runner.kernels.draw_rows.draw_rows`."""
        wishes = np.zeros((len(self._params), NUM_WISHES), np.float32)
        wishes[:, :6] = [
            (
                0.0 if p.greedy else LOG2_E / p.temperature, p.min_p, p.top_p if p.top_p < 1 else KEEP_ALL,
                p.top_k if 0 < p.top_k < self._vocab_size else 0, p.frequency_penalty, p.presence_penalty,
            )
            for p in self._params
        ]  # fmt: skip
        wishes[:, 6] = -1
        if self._penalties is not None and self._penalties.by_kernel:
            numbers = self._penalties.rows.numbers
            wishes[numbers, 6] = np.arange(len(numbers))
        return on_device(wishes.view(np.int32)).view(mx.float32)

    def uniforms(self, drawn: Float32 | None) -> mx.array:
        """Pairs for all rows, and for as many as a kernel wants at least, from those of the ones ``drawn``."""
        draws = self._draws
        if draws is None or drawn is None:
            return self._no_uniforms
        if draws.rows.all and len(drawn) >= FEWEST_ROWS:
            return mx.array(drawn)
        pairs = np.zeros((max(len(self._params), FEWEST_ROWS), 2), np.float32)
        pairs[draws.rows.numbers] = drawn
        return mx.array(pairs)

    @cached_property
    def _no_uniforms(self) -> mx.array:
        return mx.zeros((max(len(self._params), FEWEST_ROWS), 2))
