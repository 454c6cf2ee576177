"""A decoder layer in few launches: what mlx-lm's block of Llama, Qwen 2 and Qwen 3 computes for one token of each row.

At few rows on CUDA five launches: norm with the joined product of queries, keys and values; head norms, rotation, the
write into pages and attention; output with its residual; norm with gate and up and what joins them; down with its
residual (float16 is normalized apart). Else MLX's own products over the same joined weights; up to 32 rows on CUDA
output and down split K instead, if they are not packed, and what adds up the parts of down normalizes for the next
layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama, qwen2, qwen3
from mlx_lm.models.activations import swiglu

from engine.runner.kernels.fused_rows import Norm
from engine.runner.kernels.handover import Handover
from engine.runner.kernels.joined_attention import HeadConstants, HeadNorms, rotates
from engine.runner.kernels.split_k import silu_and_mul
from engine.runner.kv.joined_modules import OwnProducts
from engine.runner.kv.joined_weights import JoinedWeights, joining_problem
from engine.runner.kv.kernel_cache import KernelLayerCache
from engine.runner.kv.rotation import frequencies_of

_MODULES = {module.TransformerBlock: module for module in (llama, qwen2, qwen3)}
"""mlx-lm's blocks that compute the same, but for norms of heads and biases. Mistral's is Llama's."""
_TRUNKS = llama.LlamaModel, qwen2.Qwen2Model, qwen3.Qwen3Model
_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


@dataclass(frozen=True, slots=True)
class Rows:
    """What passes from layer to layer: ``plain`` [rows, hidden], and normalized by ``norm``, if that was given."""

    plain: mx.array
    normed: mx.array | None = None
    norm: Norm | None = None

    def normalized(self, norm: Norm) -> mx.array:
        """As they came, if they came normalized by ``norm``; else by a launch of its own."""
        if self.normed is not None and self.norm is norm:
            return self.normed
        normed: mx.array = mx.fast.rms_norm(self.plain, *norm)
        return normed


@dataclass(frozen=True, slots=True)
class FusedBlock:
    """One layer's weights, as its launches take them.

    ``few_rows`` and ``split_rows``: the most rows for kernels of few rows, and for narrow products that split K.
    """

    qkv: JoinedWeights
    output: JoinedWeights
    gate_up: JoinedWeights
    down: JoinedWeights
    input_norm: Norm
    mlp_norm: Norm
    head_constants: HeadConstants
    heads: int
    scale: float
    few_rows: int
    split_rows: int

    @classmethod
    def of(cls, layer: Any, own: OwnProducts) -> "FusedBlock":
        """Of a layer that :func:`fusing_problem` allows; joins its weights."""
        attention, mlp, on_cuda = layer.self_attn, layer.mlp, own != "none"
        qkv = JoinedWeights.of([attention[name] for name in _QKV], on_cuda=on_cuda)
        gate_up = JoinedWeights.of([mlp[name] for name in _GATE_UP], on_cuda=on_cuda)
        output, down = (JoinedWeights.of([one], on_cuda=on_cuda) for one in (attention.o_proj, mlp.down_proj))
        turns = frequencies_of(attention.rope, head_dim(attention))
        assert turns is not None, "a rotation of its own"
        constants = HeadConstants.of(mx.array(turns), _head_norms(attention))
        every = (qkv, output, gate_up, down)
        return cls(
            qkv, output, gate_up, down, _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm),
            constants, attention.n_heads, attention.scale,
            min(some.most_few_rows for some in every) if on_cuda else 0,
            min(some.most_split_rows for some in every) if own == "all" else 0,
        )  # fmt: skip

    def __call__(self, x: Rows, cache: KernelLayerCache, next_norm: Norm | None = None) -> Rows:
        """``x`` after the layer; normalized by ``next_norm`` too where that costs no launch."""
        num_rows = x.plain.shape[0]
        if num_rows <= self.few_rows:
            return self._few(x, cache)
        return self._split(x, cache, next_norm) if num_rows <= self.split_rows else self._many(x, cache)

    def _few(self, x: Rows, cache: KernelLayerCache) -> Rows:
        attended = self._attend(self.qkv.few(x.plain, norm=self.input_norm), cache)
        plain = self.output.few(attended, residual=x.plain)
        return Rows(self.down.few(self.gate_up.few(plain, norm=self.mlp_norm, gated="silu"), residual=plain))

    def _split(self, x: Rows, cache: KernelLayerCache, next_norm: Norm | None) -> Rows:
        attended = self._attend(self.qkv.many(x.normalized(self.input_norm)), cache)
        plain, normed = self.output.onto(x.plain, attended, self.mlp_norm)
        plain, normed = self.down.onto(plain, silu_and_mul(self.gate_up.many(normed)), next_norm)
        return Rows(plain, normed, next_norm)

    def _many(self, x: Rows, cache: KernelLayerCache) -> Rows:
        attended = self._attend(self.qkv.many(x.normalized(self.input_norm)), cache)
        plain = self.output.many(attended, x.plain)
        gate, up = mx.split(self.gate_up.many(mx.fast.rms_norm(plain, *self.mlp_norm)), 2, axis=-1)
        return Rows(self.down.many(swiglu(gate, up), plain))

    def _attend(self, joined: mx.array, cache: KernelLayerCache) -> mx.array:
        return cache.attend_joined(joined, self.head_constants, heads=self.heads, scale=self.scale)


def is_block(layer: nn.Module) -> bool:
    """Whether ``layer`` is one of the blocks that may be fused."""
    return type(layer) in _MODULES


def passes_rows_on(trunk: nn.Module) -> bool:
    """Whether ``trunk`` calls its ``layers`` as mlx-lm's own models do, with what the one before gave, unchanged."""
    return any(isinstance(trunk, kind) and type(trunk).__module__ == kind.__module__ for kind in _TRUNKS)


def fusing_problem(layer: Any) -> str | None:
    """Why a block of mlx-lm's cannot be fused, None if it can."""
    module, attention, mlp = _MODULES[type(layer)], layer.self_attn, layer.mlp
    if type(attention) is not module.Attention or type(mlp) is not module.MLP:
        return "a block with other parts than mlx-lm's"
    if problem := _weights_problem(attention, mlp):
        return problem
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [attention[name] for name in ("q_norm", "k_norm") if name in attention]
    dtype = _dtype(attention.q_proj)
    packed = [one["biases"] for one in _projections(attention, mlp) if "scales" in one]  # one array with the scales
    if {_dtype(one) for one in (*norms, *_projections(attention, mlp))} | {one.dtype for one in packed} != {dtype}:
        return "weights of several element types"
    dim = head_dim(attention)
    if frequencies_of(attention.rope, dim) is None or not rotates(dim, dtype.size):
        return f"a rotation of its own ({type(attention.rope).__name__} of {dim})"
    return None


def head_dim(attention: Any) -> int:
    """Elements of one of an attention's heads."""
    return int(attention.q_proj.weight.shape[0]) // int(attention.n_heads)


def fused_call(
    kind: type[nn.Module], block: FusedBlock, handover: Handover[Rows], next_norm: Norm | None
) -> Callable[..., mx.array]:
    """What a layer of ``kind`` does when called: single rows over pages that kernels read go to ``block``.

    ``next_norm`` is that of the fused layer behind it; None: there is none, and nothing is left in ``handover``.
    """
    own: Callable[..., mx.array] = kind.__call__

    def call(self: nn.Module, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if isinstance(cache, KernelLayerCache) and cache.flat and x.dtype == block.qkv.dtype:
            rows = block(handover.take(x) or Rows(x.reshape(-1, x.shape[-1])), cache, next_norm)
            return handover.leave(rows.plain.reshape(x.shape), None if next_norm is None else rows)
        return own(self, x, mask, cache)

    return call


def _projections(attention: nn.Module, mlp: nn.Module) -> list[nn.Module]:
    return [attention[name] for name in (*_QKV, "o_proj")] + [mlp[name] for name in (*_GATE_UP, "down_proj")]


def _weights_problem(attention: nn.Module, mlp: nn.Module) -> str | None:
    qkv, gate_up = [attention[name] for name in _QKV], [mlp[name] for name in _GATE_UP]
    others = [[attention["o_proj"]], gate_up, [mlp["down_proj"]]]
    if problem := next(filter(None, (joining_problem(some, biased=True) for some in (qkv, *others))), None):
        return problem
    if any("bias" in one for some in others for one in some) or len({"bias" in one for one in qkv}) > 1:
        return "biases behind its output or in its MLP"
    return None


def _dtype(module: nn.Module) -> mx.Dtype:
    dtype: mx.Dtype = module["scales" if "scales" in module else "weight"].dtype
    return dtype


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.eps)


def _head_norms(attention: Any) -> HeadNorms | None:
    if "q_norm" not in attention:
        return None
    return HeadNorms(attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.eps)
