"""Gemma 2's attention with kernels: mlx-lm computes it in the layer itself, since scores are capped.

Everything but a call of single rows over pages that kernels read is left to mlx-lm's own code.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma2

from engine.runner.kernels.swapped_modules import SwappedModules
from engine.runner.kv import attention_patch
from engine.runner.kv.attention_patch import AttentionCall
from engine.runner.kv.kernel_cache import KernelLayerCache


class CappedAttention(gemma2.Attention):  # type: ignore[misc]
    """The layer with its scores capped by the kernel."""

    def __call__(self, x: mx.array, mask: mx.array | None = None, cache: Any = None) -> mx.array:
        """As in mlx-lm; ``x`` [rows, 1, hidden] in a call of single rows."""
        cap = float(self.attn_logit_softcapping)
        attention_patch.note(cache, AttentionCall(self.n_heads, x.dtype, self.scale, softcap=cap))
        if not (isinstance(cache, KernelLayerCache) and cache.flat):
            output: mx.array = super().__call__(x, mask, cache)
            return output
        queries, keys, values = (
            project(x).reshape(x.shape[0], 1, heads, -1).transpose(0, 2, 1, 3)
            for project, heads in (
                (self.q_proj, self.n_heads), (self.k_proj, self.n_kv_heads), (self.v_proj, self.n_kv_heads),
            )
        )  # fmt: skip
        queries, keys = (self.rope(some, offset=cache.offset) for some in (queries, keys))
        cache.update_and_fetch(keys, values)
        seen = cache.attend(queries, self.scale, softcap=cap)
        capped: mx.array = self.o_proj(seen.reshape(x.shape[0], 1, -1))
        return capped


def install(model: nn.Module) -> SwappedModules:
    """Have the layers of ``model`` that cap their scores call the kernel, until that is undone."""
    layers = SwappedModules()
    for _, layer in model.named_modules():
        if type(layer) is gemma2.Attention:
            layers.swap_class(layer, CappedAttention)
    return layers
