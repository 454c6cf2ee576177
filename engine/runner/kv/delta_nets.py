"""Gated delta nets of mlx-lm's (Qwen3-Next, Qwen3.5) computed by kernels where their states lie in slots.

Their projections stay the modules' own. Between them are two launches, whatever the number of rows or tokens, or one
for single tokens where :attr:`engine.runner.kernels.gated_delta.DeltaShape.one_launch` says so.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5, qwen3_next

from engine.runner.kernels.gated_delta import DeltaShape
from engine.runner.kernels.state_kernels import StateKernels
from engine.runner.kv.state_cache import KernelStateCache

KINDS = qwen3_5.GatedDeltaNet, qwen3_next.Qwen3NextGatedDeltaNet
"""mlx-lm's modules."""


def delta_shape(module: Any) -> DeltaShape | str:
    """What a module's kernels are made for, or why it has none."""
    weight = module.conv1d.weight
    shape = DeltaShape(
        weight.dtype, module.num_k_heads, module.num_v_heads, module.head_k_dim, module.head_v_dim,
        module.conv_kernel_size, interleaved=isinstance(module, qwen3_next.Qwen3NextGatedDeltaNet),
    )  # fmt: skip
    if getattr(module, "sharding_group", None) is not None:
        return "sharded layers"
    if "bias" in module.conv1d:
        return "a convolution with a bias"
    return shape.problem or shape


def delta_call(kind: type[nn.Module], shape: DeltaShape, kernels: StateKernels) -> Callable[..., mx.array]:
    """What a module of ``kind`` does when called: over slots that kernels move on, theirs."""
    own: Callable[..., mx.array] = kind.__call__

    def call(self: Any, inputs: mx.array, mask: mx.array | None = None, cache: Any = None) -> mx.array:
        if not isinstance(cache, KernelStateCache) or mask is not None or inputs.dtype != shape.dtype:
            return own(self, inputs, mask, cache)
        project = _interleaved if shape.interleaved else _separate
        x, z, b, a = project(self, inputs)
        slots, (conv_states, states) = cache.rows.slots, cache.states
        tokens = inputs.shape[1]
        if tokens == 1 and shape.one_launch:
            out = kernels.delta_alone(
                x, b, a, z, self.conv1d.weight, self.A_log, self.dt_bias, self.norm.weight, conv_states, states, slots,
                shape, eps=self.norm.eps,
            )  # fmt: skip
            cache.moved_on(out)
            return self.out_proj(out)  # type: ignore[no-any-return]
        mixed, gates = kernels.delta_inputs(
            x, b, a, self.conv1d.weight, self.A_log, self.dt_bias, conv_states, slots, shape
        )
        if tokens == 1:
            out = kernels.delta_step(
                mixed, gates, x, z, self.norm.weight, conv_states, states, slots, shape, eps=self.norm.eps
            )
            cache.moved_on(out)
            return self.out_proj(out)  # type: ignore[no-any-return]
        out = kernels.delta_scan(mixed, gates, x, conv_states, states, slots, shape)
        cache.moved_on(out)
        heads = shape.key_heads if shape.interleaved else shape.value_heads
        width = shape.value_heads // heads * shape.value_dim
        gate = z.reshape(1, tokens, heads, -1)[..., -width:].reshape(out.shape)
        return self.out_proj(self.norm(out, gate).reshape(1, tokens, -1))  # type: ignore[no-any-return]

    return call


def _separate(module: Any, inputs: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    return module.in_proj_qkv(inputs), module.in_proj_z(inputs), module.in_proj_b(inputs), module.in_proj_a(inputs)


def _interleaved(module: Any, inputs: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    joined, gates = module.in_proj_qkvz(inputs), module.in_proj_ba(inputs)
    return joined, joined, gates, gates
