"""A model without its weights: mlx-lm's own class, built lazily, so that its shapes can be asked for."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from engine.errors import ModelLoadError
from engine.format.text import shortened
from engine.models.model_config import ModelConfig, text_config
from engine.models.quantization import Quantization, leaves_out, quantization_of
from engine.runner.load.rope_layers import honour_rope, readable_config
from engine.runner.load.unpack import QuantizedInputLinear, packed_kind
from engine.runner.load.weight_types import DTYPES


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
    model = plain_model(config)
    model.set_dtype(dtype or _declared_dtype(config.hf_config))
    quantize_as_told(model, quantization_of(config.hf_config, config.path))
    return model


def plain_model(config: ModelConfig) -> nn.Module:
    """mlx-lm's model of ``config`` before any quantization. Raises ModelLoadError where entries are missing."""
    from mlx_lm.utils import _get_classes

    hf_config = dict(config.hf_config)
    try:
        kind, args = _get_classes(hf_config)
        model: nn.Module = kind(args.from_dict(readable_config(hf_config, args)))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelLoadError(f"{config.name}: config.json is incomplete ({type(error).__name__}: {reason})") from error
    honour_rope(model, config)
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
            f"{config.name}: model_type {shortened(config.model_type, 60)!r} is not supported by mlx-lm "
            f"{metadata.version('mlx-lm')}; a newer mlx-lm may have it"
        ) from None
    except SystemExit:  # so olmo's file in mlx-lm ends the process where its package is missing
        raise ModelLoadError(
            f"{config.name}: mlx-lm's {config.model_type} needs a package that is not installed (ai2-olmo for olmo)"
        ) from None


def quantize_as_told(model: nn.Module, found: Quantization) -> None:
    """Quantize as a load would, as far as a configuration tells it without the weights' files."""
    if "bits" in found.mlx:
        _quantize(model, found.mlx, lambda *_: True)
    elif found.method == "bitnet":
        from mlx_lm.models.bitlinear_layers import bitnet_quantize

        bitnet_quantize(model, dict(found.settings))
    elif found.settings and (mode := _mode(found)):
        _quantize(model, mode, lambda path, module: _is_linear(path, module) and not leaves_out(found, path))


def quantize_like(model: nn.Module, other: nn.Module) -> None:
    """Quantize the modules of ``model`` as those of ``other`` with the same paths are, and give arrays their types."""
    modules = dict(other.named_modules())
    leaves = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    model.update_modules(tree_unflatten([(path, _like(module, modules.get(path))) for path, module in leaves]))
    types = {name: value.dtype for name, value in tree_flatten(other.parameters())}
    arrays = tree_flatten(model.parameters())
    model.update(tree_unflatten([(name, value.astype(types.get(name, value.dtype))) for name, value in arrays]))


def _like(module: nn.Module, like: nn.Module | None) -> nn.Module:
    """``module``, of other sizes perhaps, as one of the kind of ``like``."""
    from mlx_lm.models.bitlinear_layers import BitLinear

    if isinstance(module, BitLinear) and isinstance(like, nn.Linear):
        return nn.Linear(module.in_features, module.out_features, module.get("bias") is not None)
    if isinstance(like, BitLinear) and isinstance(module, nn.Linear):
        rows, columns = module.weight.shape
        return BitLinear(columns, rows, "bias" in module, like.invert_weight_scales)
    rounds = isinstance(like, nn.QQLinear | QuantizedInputLinear)
    if like is None or not hasattr(module, "to_quantized") or not (rounds or packed_kind(like)):
        return module
    if module.weight.shape[-1] % like.group_size:
        return module
    bits = like.input_bits if isinstance(like, QuantizedInputLinear) else like.bits
    more = {} if like.get("global_scale") is None else {"global_scale": True}
    packed: nn.Module = module.to_quantized(group_size=like.group_size, bits=bits, mode=like.mode, **more)
    if not rounds:
        return packed
    layer = _rounding_inputs(packed)
    if isinstance(like, nn.QQLinear):
        return layer
    return QuantizedInputLinear(layer, None if "scales" in like else like.weight.dtype)


def _mode(found: Quantization) -> dict[str, Any] | None:
    """The entry ``quantization`` of MLX's own tools that mlx-lm makes of other settings; None: weights stay plain."""
    settings = found.settings.get("quantization") or found.settings
    if found.method == "awq":
        return {"group_size": settings.get("group_size", 128), "bits": 4}
    if found.is_mxfp8:
        return {"group_size": 32, "bits": 8, "mode": "mxfp8"}
    form = str(settings.get("format") or "")
    if found.method == "mxfp4" or form.startswith("mxfp4"):
        return {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    if found.method == "modelopt" or form.startswith("nvfp4"):
        return {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    if found.method == "compressed-tensors":
        groups = (settings.get("config_groups") or {}).values()
        sizes = [group["weights"]["group_size"] for group in groups if (group.get("weights") or {}).get("group_size")]
        return {"group_size": min(sizes, default=32), "bits": 4}
    return None


def _is_linear(path: str, module: nn.Module) -> bool:
    """Whether other tools than MLX's quantize a module: no embeddings, heads and routers."""
    return not isinstance(module, nn.Embedding) and path.rpartition(".")[2] not in ("lm_head", "gate", "router")


def _quantize(model: nn.Module, quantization: Mapping[str, Any], others: Callable[[str, nn.Module], bool]) -> None:
    group_size, bits = quantization.get("group_size", 64), quantization["bits"]

    def wanted(path: str, module: nn.Module) -> bool | dict[str, Any]:
        own = quantization.get(path)
        if own is not None:
            return dict(own) if isinstance(own, Mapping) else bool(own)
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0 and others(path, module)

    nn.quantize(model, group_size, bits, mode=quantization.get("mode", "affine"), class_predicate=wanted)


def _rounding_inputs(packed: nn.Module) -> nn.Module:
    """A quantized layer as one that quantizes its inputs too."""
    rows, words = packed.weight.shape
    layer = nn.QQLinear(words * 32 // packed.bits, rows, packed.group_size, packed.bits, packed.mode)
    layer.eval()
    layer.weight, layer.scales = packed.weight, packed.scales
    return layer


def _declared_dtype(config: Mapping[str, Any]) -> mx.Dtype:
    text = text_config(config)
    name = text.get("torch_dtype") or text.get("dtype") or "bfloat16"
    return DTYPES.get(str(name), mx.bfloat16)
