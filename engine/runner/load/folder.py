"""Weights of a folder with safetensors, through mlx-lm's own loading."""

from contextlib import nullcontext
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from engine.models.folder import stored_weights
from engine.models.local import ResolvedModel
from engine.models.model_config import ModelConfig
from engine.models.pypi import Progress
from engine.models.quantization import check_quantization, has_fp8, quantization_of
from engine.params.engine_args import EngineArgs
from engine.runner.device.cgroups import usable_cpus
from engine.runner.device.devices import Device
from engine.runner.load.abstract_model import AbstractModel, build_abstract_model, check_architecture
from engine.runner.load.lazy_model import check_readers, lazy_model
from engine.runner.load.parallel_read import ParallelRead, loading_by, parallel_read
from engine.runner.load.pieces import evaluate, in_file_order
from engine.runner.load.weight_reader import PreparedWeights, WeightReader
from engine.runner.load.weight_types import Converted, convert, describe_weights, main_dtype

_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
"""Floating types by their names in safetensors headers."""


class FolderWeights(WeightReader):
    """Weights that mlx-lm loads lazily, converted before they are read."""

    def abstract(self, resolved: ResolvedModel, config: ModelConfig, args: EngineArgs, device: Device) -> AbstractModel:
        """As a load would give it where all files are here, else from the config and the headers of those that are."""
        files = stored_weights(resolved.path)
        check_architecture(config)
        if files.complete and not config.hf_config.get("model_file"):
            return _without_files(convert(lazy_model(config, files, args), args, device))
        found = quantization_of(config.hf_config, config.path)
        check_quantization(config.name, found, files.tensors)
        floating = {name: size for name, size in files.bytes_by_dtype.items() if name in _DTYPES}
        most = max(floating, key=lambda name: floating[name], default=None)
        dtype = None if most is None or found.unpacks else _DTYPES[most]
        model = build_abstract_model(config, dtype)
        check_readers(config, model, found)
        converted = convert(model, args, device)
        size = converted.num_bytes
        if converted.as_stored and files.num_bytes and not found.unpacks:
            # Of what the files hold, a language model leaves vision and speech aside.
            partial_load = dtype is not None or "text_config" in config.hf_config
            size = min(size, files.num_bytes) if partial_load else files.num_bytes
        return AbstractModel(converted.model, size)

    def prepare(
        self, resolved: ResolvedModel, config: ModelConfig, args: EngineArgs, device: Device
    ) -> PreparedWeights:
        """The lazily loaded model, converted."""
        reader = parallel_read(mx.gpu, usable_cpus()) if device.kind == "cuda" else None
        files = stored_weights(resolved.path)
        with loading_by(reader) if reader else nullcontext():
            converted = convert(lazy_model(config, files, args), args, device)
        return PreparedWeights(
            converted.num_bytes,
            lambda: converted.model,
            partial(_materialise, converted.model, files.names, reader),
            partial(_describe, converted, fp8=has_fp8(files.tensors)),
        )


def _without_files(converted: Converted) -> AbstractModel:
    """Its shapes alone: stored arrays would keep their files open."""
    model = converted.model
    model.update(tree_map(lambda value: mx.zeros(value.shape, value.dtype), model.parameters()))
    return AbstractModel(model, converted.num_bytes)


def _materialise(model: nn.Module, names: tuple[str, ...], reader: ParallelRead | None, report: Progress) -> nn.Module:
    """Read the weights as they lie in the files, piece by piece: progress shows and an interrupt is noticed."""
    parameters = in_file_order(tree_flatten(model.parameters()), names)
    total = sum(value.nbytes for value in parameters)
    done = 0

    def read(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        report("load", done, total)

    if reader is not None:
        parameters = reader.read(parameters, read)
    evaluate(parameters, read)
    report("load", total, total)
    return model


def _describe(converted: Converted, model: nn.Module, *, fp8: bool) -> str:
    text = describe_weights(converted.dtype or main_dtype(model), list(converted.kinds), converted.keep_packed)
    if fp8 and not converted.kinds:
        text += " (dequantized from FP8)"
    return f"{text}; activations are rounded as in a GPU's products" if converted.rounds_inputs else text
