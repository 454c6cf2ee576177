"""A small model of the same kind as a large one: the same architecture, element types and heads, but few layers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from engine.models.local import ResolvedModel
from engine.models.model_config import ModelConfig
from engine.params.engine_args import EngineArgs
from engine.runner.device.devices import Device
from engine.runner.load.abstract_model import plain_model, quantize_like
from engine.runner.load.loader import WEIGHT_READERS
from engine.runner.load.weight_types import main_dtype, parameter_bytes

_LAYERS = (6, 2)
"""Six show all kinds of layers where a configuration does not tell after how many they repeat."""
_VOCAB_SIZE = 512
_INTERMEDIATE_SIZE = 512
_MOST_BYTES = 1 << 30
_PERIODS = ("sliding_window_pattern", "full_attention_interval")
"""Entries that tell it."""
_SPREAD = 0.02
"""Of random weights, as models are trained from."""
_SMALL_SCALE = 0x26
"""As E4M3 0.05; as a power of two (E8M0) almost nothing; as four ternary values 1, 0, 1, -1."""


def small_model(resolved: ResolvedModel, config: ModelConfig, args: EngineArgs, device: Device) -> nn.Module | None:
    """The model with its weights evaluated on this thread; None where even that would take much memory."""
    large = WEIGHT_READERS[resolved.kind].abstract(resolved, config, args, device).model
    for layers in _LAYERS:
        model = plain_model(dataclasses.replace(config, hf_config=small_config(config.hf_config, layers)))
        model.set_dtype(main_dtype(large))
        quantize_like(model, large)
        if parameter_bytes(model) <= _MOST_BYTES:
            _fill(model)
            return model
    return None


def small_config(config: Mapping[str, Any], layers: int = _LAYERS[0]) -> dict[str, Any]:
    """``config.json`` of about so many layers, and of small matrices where no kernel depends on them."""
    small = {key: small_config(value, layers) if key == "text_config" else value for key, value in config.items()}
    own = config.get("num_hidden_layers")
    if isinstance(own, int):
        few = min(own, max([layers, *(config[key] for key in _PERIODS if isinstance(config.get(key), int))]))
        for key, value in config.items():
            if isinstance(value, list) and len(value) == own:
                small[key] = value[:few]
        small["num_hidden_layers"] = few
    for key, most in (("vocab_size", _VOCAB_SIZE), ("intermediate_size", _INTERMEDIATE_SIZE)):
        if isinstance(config.get(key), int):
            small[key] = min(config[key], most)
    return small


def _fill(model: nn.Module) -> None:
    """Random weights with a key of their own: nobody else's random numbers change."""
    parameters = tree_flatten(model.parameters())
    keys = mx.random.split(mx.random.key(0), max(1, len(parameters)))
    model.update(
        tree_unflatten([(name, _random(value, key)) for (name, value), key in zip(parameters, keys, strict=False)])
    )
    mx.eval(model.parameters())


def _random(like: mx.array, key: mx.array) -> mx.array:
    if like.dtype == mx.uint32:  # packed
        return mx.random.randint(0, 1 << 30, like.shape, key=key).astype(like.dtype)
    if like.dtype == mx.uint8:  # scales, or ternary values: small and finite in every format
        return mx.full(like.shape, _SMALL_SCALE, like.dtype)
    if not mx.issubdtype(like.dtype, mx.floating):
        return like
    if like.ndim < 2:
        return mx.ones(like.shape, like.dtype)
    return (mx.random.normal(like.shape, key=key) * _SPREAD).astype(like.dtype)
