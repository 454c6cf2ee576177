"""A model without its weights: mlx-lm's own class, built lazily, so that its shapes can be asked for."""

import json
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn

from engine.errors import ModelLoadError
from engine.models.gguf_file import open_gguf
from engine.models.local import ResolvedModel, missing_shards
from engine.models.model_config import ModelConfig, read_json
from engine.params.engine_args import EngineArgs
from engine.runner.device.devices import Device
from engine.runner.load.architecture import check_architecture
from engine.runner.load.weight_types import DTYPES, choose_for_file, convert

_SAFETENSORS_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


@dataclass(frozen=True, slots=True)
class AbstractModel:
    """A model without weights, and the bytes that they would take."""

    model: nn.Module
    num_bytes: int


def abstract_model_as_loaded(
    resolved: ResolvedModel, config: ModelConfig, args: EngineArgs, device: Device
) -> AbstractModel:
    """The model of ``resolved`` as :func:`load_model` would hold it on ``device``. Reads headers, no weights."""
    if resolved.kind == "gguf":
        choice = choose_for_file(open_gguf(resolved.path), args, device)
        return AbstractModel(build_abstract_model(config, choice.dtype), choice.num_bytes)
    files = _StoredWeights.of(resolved.path)
    converted = convert(build_abstract_model(config, files.dtype), args, device)
    size = converted.num_bytes
    if converted.as_stored and files.num_bytes:
        # Of what the files hold, a language model leaves vision and speech aside.
        partial = files.dtype is not None or "text_config" in config.hf_config
        size = min(size, files.num_bytes) if partial else files.num_bytes
    return AbstractModel(converted.model, size)


def build_abstract_model(config: ModelConfig, dtype: mx.Dtype | None = None) -> nn.Module:
    """The model of ``config`` with unevaluated parameters, quantized as its config says. Takes no memory.

    ``dtype`` None is what the config says.
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
    model.set_dtype(dtype or _said_dtype(hf_config))
    quantization = hf_config.get("quantization") or {}
    if "bits" in quantization:
        _quantize(model, quantization)
    return model


@dataclass(frozen=True, slots=True)
class _StoredWeights:
    """What safetensors files say of themselves: the type of most floating values, and bytes. Either may be unknown."""

    dtype: mx.Dtype | None = None
    num_bytes: int = 0

    @classmethod
    def of(cls, folder: Path) -> Self:
        """From the headers of the files where all are here, else from the index."""
        sizes: Counter[str] = Counter()
        for path in folder.glob("model*.safetensors"):
            sizes += _bytes_by_dtype(path)
        floating = {name: size for name, size in sizes.items() if name in _SAFETENSORS_DTYPES}
        most = max(floating, key=lambda name: floating[name], default="")
        if missing_shards(folder):
            metadata = read_json(folder / "model.safetensors.index.json").get("metadata") or {}
            return cls(_SAFETENSORS_DTYPES.get(most), int(metadata.get("total_size") or 0))
        return cls(_SAFETENSORS_DTYPES.get(most), sizes.total())


def _quantize(model: nn.Module, quantization: Mapping[str, Any]) -> None:
    group_size, bits = quantization.get("group_size", 64), quantization["bits"]

    def wanted(path: str, module: nn.Module) -> bool | dict[str, Any]:
        own = quantization.get(path)
        if own is not None:
            return own  # type: ignore[no-any-return]
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0

    nn.quantize(model, group_size, bits, mode=quantization.get("mode", "affine"), class_predicate=wanted)


def _said_dtype(config: Mapping[str, Any]) -> mx.Dtype:
    text = {**config, **(config.get("text_config") or {})}
    name = text.get("torch_dtype") or text.get("dtype") or "bfloat16"
    return DTYPES.get(str(name), mx.bfloat16)


def _bytes_by_dtype(path: Path) -> Counter[str]:
    """Bytes of the tensors in a safetensors file by their type's name, from its header."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    sizes: Counter[str] = Counter()
    for name, entry in header.items():
        if name != "__metadata__":
            sizes[entry["dtype"]] += entry["data_offsets"][1] - entry["data_offsets"][0]
    return sizes
