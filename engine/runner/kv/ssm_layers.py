"""Mamba 2 layers of mlx-lm's computed by kernels where their states lie in slots: single tokens of sequences.

Their convolution and their recurrence are methods of the modules, and those are exchanged; a chunk stays mlx-lm's own.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import falcon_h1, granitemoehybrid, mamba2, nemotron_h

from engine.runner.kernels.ssm import SsmShape
from engine.runner.kernels.state_kernels import StateKernels
from engine.runner.kv.state_cache import KernelStateCache

KINDS = (
    mamba2.Mamba2Block,
    nemotron_h.NemotronHMamba2Mixer,
    falcon_h1.FalconH1Mixer,
    granitemoehybrid.GraniteMoeHybridMamba2Mixer,
)
"""mlx-lm's modules, which have these two methods in common."""


def ssm_shape(module: Any) -> SsmShape | str:
    """What a module's kernels are made for, or why it has none."""
    low, high = module.time_step_limit
    shape = SsmShape(
        module.conv1d.weight.dtype, module.n_groups, module.num_heads, module.ssm_state_size, module.head_dim,
        module.conv_kernel_size, biased="bias" in module.conv1d, limit=(float(low), float(high)),
    )  # fmt: skip
    if module.conv_dim != shape.channels:
        return f"a convolution of {module.conv_dim} channels"
    return shape.problem or shape


def conv_call(kind: type[nn.Module], shape: SsmShape, kernels: StateKernels) -> Callable[..., mx.array]:
    """What a module of ``kind`` convolves with: for single tokens over slots that kernels move on, theirs."""
    own: Callable[..., mx.array] = kind._conv

    def convolve(self: Any, conv_input: mx.array, cache: Any, mask: mx.array | None) -> mx.array:
        if not _is_ours(cache, shape, conv_input, mask):
            return own(self, conv_input, cache, mask)
        out = kernels.conv_step(
            conv_input, self.conv1d.weight, self.conv1d.get("bias"), cache.states[0], cache.rows.slots
        )
        cache.moved_on(out)
        cache.mixed = out
        return out

    return convolve


def ssm_call(kind: type[nn.Module], shape: SsmShape, kernels: StateKernels) -> Callable[..., mx.array]:
    """What moves the states of a module of ``kind`` on; after :func:`conv_call`'s launch its own."""
    own: Callable[..., mx.array] = kind._ssm

    def move_on(
        self: Any, hidden_states: mx.array, b: mx.array, c: mx.array, dt: mx.array, cache: Any, mask: mx.array | None
    ) -> mx.array:  # fmt: skip
        mixed = cache.mixed if isinstance(cache, KernelStateCache) else None
        if mixed is None:
            return own(self, hidden_states, b, c, dt, cache, mask)
        # Of which the three are parts.
        out = kernels.ssm_step(
            mixed, dt, self.A_log, self.dt_bias, self.D, cache.states[1], cache.rows.slots, shape
        )  # fmt: skip
        cache.moved_on(out)
        return out

    return move_on


def _is_ours(cache: Any, shape: SsmShape, conv_input: mx.array, mask: mx.array | None) -> bool:
    if not isinstance(cache, KernelStateCache) or mask is not None or conv_input.shape[1] != 1:
        return False
    kinds = [states.dtype for states in cache.states]
    return conv_input.dtype == shape.dtype and kinds == [shape.dtype, mx.float32]
