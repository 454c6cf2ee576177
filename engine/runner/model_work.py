"""What a model's weights cost a step: bytes that are read and products that are computed, asked of the model itself."""

import itertools
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from engine.memory.roofline import ModelWork

_CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "top_k", "moe_topk", "moe_top_k", "top_k_experts")
"""Names under which models keep how many experts a token takes."""


def model_work(model: nn.Module, vocab_size: int) -> ModelWork:
    """The work of ``model``, whose logits are ``vocab_size`` wide. Computes nothing."""
    named = [(name, module) for name, module in model.named_modules() if isinstance(module.get("weight"), mx.array)]
    embeddings = [(name, module) for name, module in named if isinstance(module, nn.Embedding | nn.QuantizedEmbedding)]
    heads = [module for name, module in named if _is_head(name, module, vocab_size)]
    # Without a head of its own a model multiplies by its embedding, which is then read as a whole.
    heads = heads or [module for _, module in embeddings if module["weight"].shape[0] == vocab_size][:1]
    looked_up = [module for _, module in embeddings if not any(module is head for head in heads)]
    experts = [module for _, module in named if isinstance(module, SwitchLinear | QuantizedSwitchLinear)]
    apart = {id(module) for module in (*looked_up, *experts, *heads)}
    others = [module for _, module in named if id(module) not in apart and module["weight"].ndim > 1]
    total = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    expert_bytes = sum(map(_num_bytes, experts))
    return ModelWork(
        dense_bytes=total - expert_bytes - sum(map(_num_bytes, looked_up)),
        expert_bytes=expert_bytes,
        num_experts=max((module["weight"].shape[0] for module in experts), default=0),
        chosen=_chosen(model) if experts else 0,
        dense_products=sum(map(_products, others)),
        expert_products=sum(map(_products, experts)),
        head_products=sum(map(_products, heads)),
        pair_products=_pair_products(model),
        dtype=_dtype(named),
        packed=any("scales" in module for _, module in named),
    )


def _is_head(name: str, module: nn.Module, vocab_size: int) -> bool:
    """Whether a module makes the logits: a product outside the layers that is as wide as they are."""
    weight = module["weight"]
    linear = isinstance(module, nn.Linear | nn.QuantizedLinear)
    return linear and weight.shape[0] == vocab_size and "layers" not in name


def _num_bytes(module: nn.Module) -> int:
    return sum(array.nbytes for _, array in tree_flatten(module.parameters()))


def _products(module: nn.Module) -> int:
    """Elements of a module's weights, which may be packed in words of 32 bits."""
    weight = module["weight"]
    if "scales" not in module:
        return int(weight.size)
    found: Any = module
    return int(weight.size) * 32 // int(found.bits)


def _chosen(model: nn.Module) -> int:
    """How many experts a token takes, as the model's own modules or arguments say; 0 if none of them does."""
    holders: Iterator[Any] = itertools.chain((module for _, module in model.named_modules()), [_arguments(model)])
    for holder in holders:
        for name in _CHOSEN:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return 0


def _arguments(model: nn.Module) -> Any:
    return getattr(model, "args", None) or getattr(getattr(model, "language_model", None), "args", None)


def _pair_products(model: nn.Module) -> int:
    """A query's products with a key and with a value, of all heads of one layer; 0 where heads are not told."""
    arguments = _arguments(model)
    heads = getattr(arguments, "num_attention_heads", None) or getattr(arguments, "n_heads", None)
    width = getattr(arguments, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(width, int) or not heads:
        return 0
    size = getattr(arguments, "head_dim", None)
    return 2 * heads * (size if isinstance(size, int) else width // heads)


def _dtype(named: list[tuple[str, nn.Module]]) -> str:
    """The element type that most weights are computed in."""
    sizes: dict[str, int] = {}
    for _, module in named:
        array = module["scales"] if "scales" in module else module["weight"]
        name = str(array.dtype).rpartition(".")[2]
        sizes[name] = sizes.get(name, 0) + array.size
    return max(sizes, key=lambda name: sizes[name]) if sizes else "float32"
