"""Weights of a GGUF file as an mlx-lm model, exact against the file.

Blocks that are MLX's packing with another layout of bits can stay packed; all other kinds are dequantized. Nothing is
ever quantized anew. What the file's tensors are in the model: ``engine/models/gguf_sources.py``.
"""

import math
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from engine.errors import ModelLoadError
from engine.models.gguf_file import GGUFFile, open_gguf
from engine.models.gguf_rope import FREQUENCY_FACTORS
from engine.models.gguf_sources import Source, blocks_of, sources, values_of
from engine.models.local import ResolvedModel
from engine.models.model_config import ModelConfig
from engine.models.pypi import Progress
from engine.params.engine_args import EngineArgs
from engine.runner.device.cgroups import usable_cpus
from engine.runner.device.devices import Device
from engine.runner.load.abstract_model import AbstractModel, build_abstract_model
from engine.runner.load.gguf_blocks import PACKINGS, Packing, leaves_groups_whole, pack, take_columns
from engine.runner.load.host_work import in_order
from engine.runner.load.pieces import Pieces
from engine.runner.load.weight_reader import PreparedWeights, WeightReader
from engine.runner.load.weight_types import DTYPES, describe_weights, unpacks_easily

_WIDE = ("BF16", "MXFP4", "NVFP4")
"""Types of models made with bfloat16, whose numbers float16 does not hold."""
_MOST_THREADS = 8
_LEAST_HOST_BYTES, _MOST_HOST_BYTES = 1 << 27, 1 << 30
"""Of unpacked or rearranged tensors that wait on the host: an eighth of the file, within these."""


class GGUFWeights(WeightReader):
    """Weights of one GGUF file, tensor by tensor."""

    def abstract(self, resolved: ResolvedModel, config: ModelConfig, args: EngineArgs, device: Device) -> AbstractModel:
        """From the file's header."""
        choice = choose(open_gguf(resolved.path), config, args, device)
        return AbstractModel(_abstract(config, choice), choice.num_bytes)

    def prepare(
        self, resolved: ResolvedModel, config: ModelConfig, args: EngineArgs, device: Device
    ) -> PreparedWeights:
        """Packed or not, as the device takes it."""
        file = open_gguf(resolved.path)
        choice = choose(file, config, args, device)
        return PreparedWeights(
            choice.num_bytes,
            partial(_abstract, config, choice),
            partial(load_gguf, file, config, choice),
            lambda _: _describe(file, choice),
        )


@dataclass(frozen=True)
class Choice:
    """How a file is loaded: its parameters as ``dtype``, modules that stay ``packed``, ``num_bytes`` of memory."""

    dtype: mx.Dtype
    sources: list[Source]
    packed: dict[str, Packing]
    num_bytes: int


def choose(file: GGUFFile, config: ModelConfig, args: EngineArgs, device: Device) -> Choice:
    """float32 on CPUs; elsewhere the type in which the file's scales or values are exact."""
    if args.dtype != "auto":
        dtype = DTYPES[args.dtype]
    elif device.kind == "cpu":
        dtype = mx.float32
    else:
        dtype = mx.bfloat16 if any(info.type.name in _WIDE for info in file.tensors.values()) else mx.float16
    unpacked = choice_of(file, config, dtype, keep_packed=False)
    packed = choice_of(file, config, dtype, keep_packed=True)
    keep = device.runs_packed_weights_fast or not unpacks_easily(unpacked.num_bytes, device)
    return packed if keep else unpacked


def choice_of(file: GGUFFile, config: ModelConfig, dtype: mx.Dtype, *, keep_packed: bool) -> Choice:
    """Loading with all that MLX can compute on left packed, or nothing."""
    parameters = sources(file, config.hf_config)
    packed = _packable(parameters, build_abstract_model(config)) if keep_packed else {}
    num_bytes = 0
    for source in parameters:
        packing, num_values = packed.get(source.path), math.prod(source.shape)
        if packing is None or source.leaf != "weight":
            num_bytes += num_values * dtype.size
        else:
            num_bytes += packing.num_bytes(num_values, dtype.size)
    return Choice(dtype, parameters, packed, num_bytes)


def _packable(parameters: list[Source], model: nn.Module) -> dict[str, Packing]:
    """Modules whose matrices MLX computes on as they are in the file."""
    modules = {path for path, module in model.named_modules() if hasattr(module, "to_quantized")}
    return {
        source.path: PACKINGS[source.tensors[0].type]
        for source in parameters
        if source.leaf == "weight" and source.path in modules and _stays_packed(source)
    }


def _stays_packed(source: Source) -> bool:
    """Whether its blocks are one matrix of one type, moved but otherwise as they are."""
    packing = PACKINGS.get(source.tensors[0].type)
    if packing is None or not source.one_type or source.change is not None or source.scale is not None:
        return False
    return source.columns is None or leaves_groups_whole(source.columns, packing.group_size)


def _abstract(config: ModelConfig, choice: Choice) -> nn.Module:
    """The model without weights, with packed matrices where the loaded one has them."""
    model = build_abstract_model(config, choice.dtype)
    _quantize(model, choice)
    return model


def _quantize(model: nn.Module, choice: Choice) -> None:
    if choice.packed:
        parameters = {path: packing.parameters for path, packing in choice.packed.items()}
        nn.quantize(model, class_predicate=lambda path, _: parameters.get(path, False))


def load_gguf(file: GGUFFile, config: ModelConfig, choice: Choice, report: Progress) -> nn.Module:
    """The model of ``file`` with its weights evaluated, piece by piece: about one copy in memory."""
    model = _abstract(config, choice)
    weights = _read(file, choice, report)
    if hasattr(model, "sanitize"):
        weights = model.sanitize(weights)  # the names are the model's; some leave out an output matrix only here
    model.eval()
    try:
        model.load_weights(list(weights.items()), strict=True)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        way_out = "fetch the file again" if "Missing" in reason else "load the model's safetensors folder instead"
        raise ModelLoadError(f"{file.path.name}: {reason}; {way_out}") from None
    if FREQUENCY_FACTORS in file.tensors:
        _set_rope_factors(model, file, config.hf_config["rope_theta"])
    return model


def _read(file: GGUFFile, choice: Choice, report: Progress) -> dict[str, mx.array]:
    """Weights by their names in the model."""
    weights: dict[str, mx.array] = {}
    done, total = 0.0, sum(info.num_bytes for info in file.tensors.values())
    pieces = Pieces(total)
    work = partial(_on_host, file, choice)
    threads = min(_MOST_THREADS, usable_cpus())
    most = min(_MOST_HOST_BYTES, max(_LEAST_HOST_BYTES, total // 8))
    ready = in_order(work, choice.sources, partial(_host_bytes, choice), threads=threads, most_bytes=most)
    with closing(ready):
        for source, parts in ready:
            arrays = {name: _on_device(values, choice.dtype) for name, values in parts.items()}
            weights |= arrays
            pieces.add(*arrays.values())
            done += source.file_bytes
            report("load", min(int(done), total), total)
    pieces.finish()
    report("load", total, total)
    return weights


def _describe(file: GGUFFile, choice: Choice) -> str:
    """``float16 (Q4_0 weights kept packed, Q6_K unpacked exactly)``."""
    packed = sorted({source.tensors[0].type.name for source in choice.sources if _is_packed(choice, source)})
    others = sorted({info.type.name for info in file.tensors.values()}.difference(packed, ("F32",)))
    if not packed or not others:
        return describe_weights(choice.dtype, packed or others, bool(packed))
    return f"{describe_weights(choice.dtype, packed, True)[:-1]}, {', '.join(others)} unpacked exactly)"


def _is_packed(choice: Choice, source: Source) -> bool:
    return source.leaf == "weight" and source.path in choice.packed


def _host_bytes(choice: Choice, source: Source) -> int:
    """Bytes on the host before a parameter goes to the device."""
    return int(2 * source.file_bytes) if _is_packed(choice, source) else 4 * math.prod(source.shape)


def _on_host(file: GGUFFile, choice: Choice, source: Source) -> dict[str, npt.NDArray[Any]]:
    """A parameter, or those it becomes where it stays packed, by their names in the model."""
    if not _is_packed(choice, source):
        return {source.name: values_of(file, source)}
    packed = pack(np.asarray(blocks_of(file, source)), source.tensors[0].type)
    if source.columns is not None:
        packed = take_columns(packed, source.columns, choice.packed[source.path].group_size)
    return {f"{source.path}.{name}": values for name, values in packed.items()}


def _on_device(values: npt.NDArray[Any], dtype: mx.Dtype) -> mx.array:
    """``values`` as they are where they are packed, else as ``dtype``."""
    array = mx.array(values)
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array


def _set_rope_factors(model: nn.Module, file: GGUFFile, base: float) -> None:
    """Put the file's own frequency factors (Llama 3.1's scaling) in place of recomputed ones."""
    factors = mx.array(file.values(FREQUENCY_FACTORS))
    dims = 2 * factors.size
    frequencies = base ** (mx.arange(0, dims, 2) / dims) * factors
    mx.eval(frequencies)
    for layer in model.layers:
        rope: Any = getattr(getattr(layer, "self_attn", None), "rope", None)
        if type(rope).__name__ == "Llama3RoPE":
            rope._freqs = frequencies
