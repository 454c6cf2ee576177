"""Gemma 4's attention in few launches: what mlx-lm's module computes for one token of each row.

The joined product of queries, keys and values; norms of all heads, rotation, the write into pages and attention; and
the module's own output. Where a layer has no values of its own, they are made of its keys in the second launch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.gemma4_text import Attention, RMSNormNoScale

from engine.runner.kernels.joined_attention import HeadConstants, HeadNorms, rotates
from engine.runner.kernels.joined_attention_text import ValueHeads
from engine.runner.kv.joined_modules import OwnProducts
from engine.runner.kv.joined_weights import JoinedWeights
from engine.runner.kv.joined_weights import joining_problem as weights_problem
from engine.runner.kv.kernel_cache import KernelLayerCache
from engine.runner.kv.rotation import frequencies_of


@dataclass(frozen=True, slots=True)
class GemmaAttention:
    """One layer's weights, as its launches take them; ``few_rows``: the most rows for kernels of few rows."""

    qkv: JoinedWeights
    head_constants: HeadConstants
    heads: int
    scale: float
    few_rows: int

    @classmethod
    def of(cls, attention: Any, own: OwnProducts) -> "GemmaAttention":
        """Of an attention that :func:`joining_problem` allows; joins its weights."""
        qkv = JoinedWeights.of(joined_modules(attention), on_cuda=own == "few")
        turns = frequencies_of(attention.rope, attention.head_dim)
        assert turns is not None, "a rotation of its own"
        norms = HeadNorms(attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.eps)
        constants = HeadConstants.of(mx.array(turns), norms, value_heads(attention))
        few_rows = qkv.most_few_rows if own == "few" else 0
        return cls(qkv, constants, int(attention.n_heads), float(attention.scale), few_rows)

    def __call__(self, x: mx.array, cache: KernelLayerCache) -> mx.array:
        """What the heads of ``x`` [rows, hidden] attend to [rows, heads * dim]; the output's product is left."""
        joined = self.qkv.few(x) if x.shape[0] <= self.few_rows else self.qkv.many(x)
        return cache.attend_joined(joined, self.head_constants, heads=self.heads, scale=self.scale)


def is_joinable(module: nn.Module) -> bool:
    """Whether ``module`` is Gemma 4's attention in a model where no layer attends to the keys of another."""
    return type(module) is Attention and not module.config.num_kv_shared_layers


def joined_modules(attention: Any) -> list[nn.Module]:
    """The modules whose products become one."""
    names = ("q_proj", "k_proj") if attention.use_k_eq_v else ("q_proj", "k_proj", "v_proj")
    return [attention[name] for name in names]


def value_heads(attention: Any) -> ValueHeads:
    """What an attention's values are."""
    return "normalized keys" if attention.use_k_eq_v else "normalized"


def joining_problem(attention: Any) -> str | None:
    """Why an attention cannot be computed in few launches, None if it can."""
    modules = joined_modules(attention)
    if problem := weights_problem(modules):
        return problem
    dtype = modules[0]["scales" if "scales" in modules[0] else "weight"].dtype
    norms = attention.q_norm, attention.k_norm
    if {norm.weight.dtype for norm in norms} != {dtype}:
        return "weights of several element types"
    if type(attention.v_norm) is not RMSNormNoScale or len({one.eps for one in (*norms, attention.v_norm)}) > 1:
        return "norms of several kinds"
    dim = int(attention.head_dim)
    if frequencies_of(attention.rope, dim) is None or not rotates(dim, dtype.size):
        return f"a rotation of its own ({type(attention.rope).__name__} of {dim})"
    return None


def joined_call(fused: GemmaAttention) -> Callable[..., tuple[mx.array, Any, Any]]:
    """What a layer's attention does when called: single rows over pages that kernels read go to ``fused``.

    Keys and values do not leave their pages then, and nobody asks for them.
    """

    def call(
        self: Any, x: mx.array, mask: Any = None, cache: Any = None, shared_kv: Any = None, offset: Any = None
    ) -> tuple[mx.array, Any, Any]:
        flat = isinstance(cache, KernelLayerCache) and cache.flat
        if not flat or shared_kv is not None or x.dtype != fused.qkv.dtype:
            usual: tuple[mx.array, Any, Any] = Attention.__call__(self, x, mask, cache, shared_kv, offset)
            return usual
        attended = fused(x.reshape(-1, x.shape[-1]), cache)
        return self.o_proj(attended.reshape(*x.shape[:-1], -1)), None, cache.offset

    return call
