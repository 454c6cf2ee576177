"""Weights of a folder with safetensors, through mlx-lm's own loading."""

from contextlib import nullcontext
from functools import partial

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from engine.errors import ModelLoadError
from engine.models.folder import stored_weights
from engine.models.local import ResolvedModel
from engine.models.model_config import ModelConfig
from engine.models.pypi import Progress
from engine.params.engine_args import EngineArgs
from engine.runner.device.cgroups import usable_cpus
from engine.runner.device.devices import Device
from engine.runner.load.abstract_model import AbstractModel, build_abstract_model
from engine.runner.load.parallel_read import ParallelRead, loading_by, parallel_read
from engine.runner.load.pieces import evaluate, in_file_order
from engine.runner.load.rope_layers import honour_rope
from engine.runner.load.weight_reader import PreparedWeights, WeightReader
from engine.runner.load.weight_types import Converted, convert, describe_weights, main_dtype

_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
"""Floating types by their names in safetensors headers."""


class FolderWeights(WeightReader):
    """Weights that mlx-lm loads lazily, converted before they are read."""

    def abstract(self, resolved: ResolvedModel, config: ModelConfig, args: EngineArgs, device: Device) -> AbstractModel:
        """From the headers of the files, as far as they are here, and the config."""
        files = stored_weights(resolved.path)
        floating = {name: size for name, size in files.bytes_by_dtype.items() if name in _DTYPES}
        most = max(floating, key=lambda name: floating[name], default=None)
        dtype = None if most is None else _DTYPES[most]
        converted = convert(build_abstract_model(config, dtype), args, device)
        size = converted.num_bytes
        if converted.as_stored and files.num_bytes:
            # Of what the files hold, a language model leaves vision and speech aside.
            partial_load = dtype is not None or "text_config" in config.hf_config
            size = min(size, files.num_bytes) if partial_load else files.num_bytes
        return AbstractModel(converted.model, size)

    def prepare(
        self, resolved: ResolvedModel, config: ModelConfig, args: EngineArgs, device: Device
    ) -> PreparedWeights:
        """The lazily loaded model, converted."""
        reader = parallel_read(mx.gpu, usable_cpus()) if device.kind == "cuda" else None
        with loading_by(reader) if reader else nullcontext():
            converted = convert(_lazy_model(resolved, config, args), args, device)
        return PreparedWeights(
            converted.num_bytes,
            lambda: converted.model,
            partial(_materialise, converted.model, stored_weights(resolved.path).names, reader),
            partial(_describe, converted),
        )


def _lazy_model(resolved: ResolvedModel, config: ModelConfig, args: EngineArgs) -> nn.Module:
    """mlx-lm's model with weights that are read when evaluated."""
    from mlx_lm.utils import load_model as load

    try:
        model: nn.Module = load(
            resolved.path,
            lazy=True,
            model_config=dict(config.hf_config),
            trust_remote_code=args.trust_remote_code,
        )[0]
    except (ValueError, KeyError, TypeError, FileNotFoundError, RuntimeError) as error:
        if config.hf_config.get("model_file") and not args.trust_remote_code:
            raise ModelLoadError(
                f"{resolved.name} runs its own Python file {config.hf_config['model_file']!r}; "
                "read it, then load with --trust-remote-code"
            ) from None
        reason = " ".join(str(error).split())[:200]
        raise ModelLoadError(f"{resolved.name}: {type(error).__name__}: {reason}; fetch the model again") from error
    honour_rope(model, config)
    return model


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


def _describe(converted: Converted, model: nn.Module) -> str:
    bits = [f"{bits}-bit" for bits in converted.bits]
    return describe_weights(converted.dtype or main_dtype(model), bits, converted.keep_packed)
