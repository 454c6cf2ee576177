"""A model without its weights: mlx-lm's own class, built lazily, so that its shapes can be asked for."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from engine.errors import ModelLoadError
from engine.models.model_config import ModelConfig, text_config
from engine.runner.load.weight_types import DTYPES

_SAFETENSORS_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


@dataclass(frozen=True, slots=True)
class AbstractModel:
    """A model without weights, and the bytes that they would take."""

    model: nn.Module
    num_bytes: int


def build_abstract_model(config: ModelConfig, dtype: mx.Dtype | None = None) -> nn.Module:
    """The model of ``config`` with unevaluated parameters, quantized as its config says. Takes no memory.

    ``dtype`` None: the type that the config names.
    """
    check_architecture(config)
    from mlx_lm.utils import _get_classes

    hf_config = dict(config.hf_config)
    try:
        kind, args = _get_classes(hf_config)
        model: nn.Module = kind(args.from_dict(hf_config))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelLoadError(f"{config.name}: config.json is incomplete ({type(error).__name__}: {reason})") from error
    model.set_dtype(dtype or _declared_dtype(hf_config))
    quantization = hf_config.get("quantization") or {}
    if "bits" in quantization:
        _quantize(model, quantization)
    return model


def check_architecture(config: ModelConfig) -> None:
    """Refuse a model type that mlx-lm does not have."""
    utils = importlib.import_module("mlx_lm.utils")
    if config.hf_config.get("model_file"):
        return
    try:
        utils._get_classes(dict(config.hf_config))
    except ValueError:
        raise ModelLoadError(
            f"{config.name}: model_type {config.model_type!r} is not supported by mlx-lm "
            f"{metadata.version('mlx-lm')}; a newer mlx-lm may have it"
        ) from None
    except SystemExit:  # so olmo's file in mlx-lm ends the process where its package is missing
        raise ModelLoadError(
            f"{config.name}: mlx-lm's {config.model_type} needs a package that is not installed (ai2-olmo for olmo)"
        ) from None


def _quantize(model: nn.Module, quantization: Mapping[str, Any]) -> None:
    group_size, bits = quantization.get("group_size", 64), quantization["bits"]

    def wanted(path: str, module: nn.Module) -> bool | dict[str, Any]:
        own = quantization.get(path)
        if own is not None:
            return own  # type: ignore[no-any-return]
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0

    nn.quantize(model, group_size, bits, mode=quantization.get("mode", "affine"), class_predicate=wanted)


def _declared_dtype(config: Mapping[str, Any]) -> mx.Dtype:
    text = text_config(config)
    name = text.get("torch_dtype") or text.get("dtype") or "bfloat16"
    return DTYPES.get(str(name), mx.bfloat16)
