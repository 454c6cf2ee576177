"""A model without its weights: mlx-lm's own class, built lazily, so that its shapes can be asked for."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from engine.config import ModelConfig
from engine.errors import ModelLoadError
from engine.hub import ResolvedModel
from engine.runner.loader import DTYPES, check_architecture


def build_skeleton(config: ModelConfig, dtype: str = "auto") -> nn.Module:
    """The model of ``config`` with unevaluated parameters, quantized as its config says. Takes no memory."""
    check_architecture(config)
    from mlx_lm.utils import _get_classes

    hf_config = dict(config.hf_config)
    try:
        kind, args = _get_classes(hf_config)
        model: nn.Module = kind(args.from_dict(hf_config))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelLoadError(f"{config.name}: config.json is incomplete ({type(error).__name__}: {reason})") from error
    model.set_dtype(DTYPES.get(dtype) or _stored_dtype(hf_config))
    quantization = hf_config.get("quantization") or {}
    if "bits" in quantization:
        _quantize(model, quantization)
    return model


def weight_bytes(resolved: ResolvedModel, model: nn.Module, *, converted: bool = False) -> int:
    """Bytes of the weights: from the safetensors index or headers where there are any, else of the skeleton.

    ``converted``: loading makes them the skeleton's element type, so that the files do not say.
    """
    if resolved.path.is_dir() and not converted:
        index = resolved.path / "model.safetensors.index.json"
        if index.is_file():
            total = json.loads(index.read_text(encoding="utf-8")).get("metadata", {}).get("total_size")
            if total:
                return int(total)
        files = sorted(resolved.path.glob("model*.safetensors"))
        if files:
            return sum(_tensor_bytes(path) for path in files)
    return sum(int(value.nbytes) for _, value in tree_flatten(model.parameters()))


def _quantize(model: nn.Module, quantization: Mapping[str, Any]) -> None:
    group_size, bits = quantization.get("group_size", 64), quantization["bits"]

    def wanted(path: str, module: nn.Module) -> bool | dict[str, Any]:
        own = quantization.get(path)
        if own is not None:
            return own  # type: ignore[no-any-return]
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0

    nn.quantize(model, group_size, bits, mode=quantization.get("mode", "affine"), class_predicate=wanted)


def _stored_dtype(config: Mapping[str, Any]) -> mx.Dtype:
    text = {**config, **(config.get("text_config") or {})}
    name = text.get("torch_dtype") or text.get("dtype") or "bfloat16"
    return DTYPES.get(str(name), mx.bfloat16)


def _tensor_bytes(path: Path) -> int:
    """Bytes of the tensors in a safetensors file, from its header."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    return sum(
        entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"
    )
