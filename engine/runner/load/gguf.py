"""Weights of a GGUF file as an mlx-lm model, exact against the file.

Blocks of 32 with one scale (Q4_0, Q4_1, Q8_0) are MLX's affine quantization with another layout of
bits, so they can stay packed; all other kinds are dequantized. Nothing is ever quantized anew.
"""

import importlib
import math
import re
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType as Type

from engine.errors import ModelLoadError
from engine.models.gguf_file import GGUFFile, TensorInfo, open_gguf
from engine.models.local import ResolvedModel
from engine.models.model_config import ModelConfig
from engine.models.pypi import Progress
from engine.params.engine_args import EngineArgs
from engine.runner.device.cgroups import usable_cpus
from engine.runner.device.devices import Device
from engine.runner.load.abstract_model import AbstractModel, build_abstract_model
from engine.runner.load.host_work import in_order
from engine.runner.load.pieces import Pieces
from engine.runner.load.weight_reader import PreparedWeights, WeightReader
from engine.runner.load.weight_types import DTYPES, describe_weights, unpacks_easily

GROUP_SIZE = 32
PACKED_BITS = {Type.Q4_0: 4, Type.Q4_1: 4, Type.Q8_0: 8}
"""Kinds that MLX can compute on as they are, with their bits."""
_COMMON = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA3 = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_ROPE_FACTORS = "rope_freqs.weight"
_MOST_THREADS = 8
_LEAST_HOST_BYTES, _MOST_HOST_BYTES = 1 << 27, 1 << 30
"""Of unpacked or rearranged tensors that wait on the host: an eighth of the file, within these."""


class GGUFWeights(WeightReader):
    """Weights of one GGUF file, tensor by tensor."""

    def abstract(self, resolved: ResolvedModel, config: ModelConfig, args: EngineArgs, device: Device) -> AbstractModel:
        """From the file's header."""
        choice = _choose(open_gguf(resolved.path), args, device)
        return AbstractModel(build_abstract_model(config, choice.dtype), choice.num_bytes)

    def prepare(
        self, resolved: ResolvedModel, config: ModelConfig, args: EngineArgs, device: Device
    ) -> PreparedWeights:
        """Packed or not, as the device takes it."""
        file = open_gguf(resolved.path)
        choice = _choose(file, args, device)
        kinds = {info.type.name for info in file.tensors.values()} - {"F32"}
        return PreparedWeights(
            choice.num_bytes,
            partial(build_abstract_model, config, choice.dtype),
            partial(load_gguf, file, dict(config.hf_config), dtype=choice.dtype, keep_packed=choice.keep_packed),
            lambda _: describe_weights(choice.dtype, sorted(kinds), choice.keep_packed),
        )


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor of a file, and where it goes in the model."""

    info: TensorInfo
    path: str
    leaf: str
    keep_packed: bool

    @property
    def stays_packed(self) -> bool:
        """Whether MLX computes on its blocks as they are."""
        return self.keep_packed and self.info.type in PACKED_BITS and self.leaf == "weight"

    def host_bytes(self) -> int:
        """Bytes on the host before it goes to the device."""
        return 2 * self.info.num_bytes if self.stays_packed else 4 * math.prod(self.info.shape)


@dataclass(frozen=True, slots=True)
class _Choice:
    """How a file is loaded: ``num_bytes`` in memory, packed matrices left so where ``keep_packed``."""

    dtype: mx.Dtype
    keep_packed: bool
    num_bytes: int


def _choose(file: GGUFFile, args: EngineArgs, device: Device) -> _Choice:
    """float32 on CPUs; elsewhere the type in which the file's scales or values are exact."""
    if args.dtype != "auto":
        dtype = DTYPES[args.dtype]
    elif device.kind == "cpu":
        dtype = mx.float32
    else:
        dtype = mx.bfloat16 if any(info.type.name == "BF16" for info in file.tensors.values()) else mx.float16
    unpacked = sum(math.prod(info.shape) for info in file.tensors.values()) * dtype.size
    saved = sum(
        math.prod(info.shape) * dtype.size - _packed_bytes(math.prod(info.shape), PACKED_BITS[info.type], dtype)
        for info in file.tensors.values()
        if info.type in PACKED_BITS
    )
    keep = bool(saved) and (device.runs_packed_weights_fast or not unpacks_easily(unpacked, device))
    return _Choice(dtype, keep, unpacked - saved if keep else unpacked)


def _packed_bytes(num_values: int, bits: int, dtype: mx.Dtype) -> int:
    """Bytes of MLX's affine packing: the integers, a scale and a bias for each group."""
    return num_values * bits // 8 + 2 * (num_values // GROUP_SIZE) * dtype.size


def load_gguf(
    file: GGUFFile, config: dict[str, Any], report: Progress, *, dtype: mx.Dtype, keep_packed: bool
) -> nn.Module:
    """The model of ``file`` with its weights evaluated, piece by piece: about one copy in memory.

    ``keep_packed`` leaves Q4_0, Q4_1 and Q8_0 as they are, with scales of ``dtype``.
    """
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config))
    weights, packed = _read(file, config, report, dtype=dtype, keep_packed=keep_packed)
    weights = model.sanitize(weights) if hasattr(model, "sanitize") else weights
    nn.quantize(model, class_predicate=lambda path, _: packed.get(path, False))
    model.eval()
    _assign(model, weights, file)
    if _ROPE_FACTORS in file.tensors:
        _set_rope_factors(model, file, config)
    return model


def _read(
    file: GGUFFile, config: dict[str, Any], report: Progress, *, dtype: mx.Dtype, keep_packed: bool
) -> tuple[dict[str, mx.array], dict[str, dict[str, int]]]:
    """Weights by their names in the model, and the bits of the modules whose matrices are left packed."""
    weights: dict[str, mx.array] = {}
    packed: dict[str, dict[str, int]] = {}
    done, total = 0, sum(info.num_bytes for info in file.tensors.values())
    pieces = Pieces(total)
    infos = sorted(file.tensors.values(), key=lambda info: info.offset)
    wanted = [info for info in infos if info.name != _ROPE_FACTORS]
    tensors = [_Tensor(info, *_module_path(info.name, file), keep_packed) for info in wanted]
    work = partial(_on_host, file, config)
    threads = min(_MOST_THREADS, usable_cpus())
    most = min(_MOST_HOST_BYTES, max(_LEAST_HOST_BYTES, total // 8))
    ready = in_order(work, tensors, _Tensor.host_bytes, threads=threads, most_bytes=most)
    with closing(ready):
        for tensor, parts in ready:
            if tensor.stays_packed:
                packed[tensor.path] = {"group_size": GROUP_SIZE, "bits": PACKED_BITS[tensor.info.type]}
            arrays = {part: _on_device(values, dtype) for part, values in parts.items()}
            weights |= {f"{tensor.path}.{part}": array for part, array in arrays.items()}
            pieces.add(*arrays.values())
            done += tensor.info.num_bytes
            report("load", done, total)
    pieces.finish()
    report("load", total, total)
    return weights, packed


def _assign(model: nn.Module, weights: dict[str, mx.array], file: GGUFFile) -> None:
    try:
        model.load_weights(list(weights.items()), strict=True)
    except ValueError as error:
        raise ModelLoadError(f"{file.path.name}: {' '.join(str(error).split())[:200]}; fetch the file again") from None


def _module_path(name: str, file: GGUFFile) -> tuple[str, str]:
    """mlx-lm's module path and parameter (``weight``, ``bias``) of a tensor."""
    table = {**_COMMON, **(_GEMMA3 if file.architecture == "gemma3" else {})}
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in table:
        raise ModelLoadError(f"{file.path.name}: tensor {name} is not known for architecture {file.architecture}")
    layer = f"model.layers.{match[1]}." if match[1] is not None else ""
    return layer + table[match[2]], match[3]


def _on_host(file: GGUFFile, config: dict[str, Any], tensor: _Tensor) -> dict[str, npt.NDArray[Any]]:
    """A tensor by the parameters it becomes, in MLX's row order: exact values, or blocks as MLX packs them."""
    name = tensor.info.name
    if tensor.stays_packed:
        rows = _rows_for_half_split_rope(file.blocks(name), name, file, config)
        return dict(zip(("weight", "scales", "biases"), repack(np.asarray(rows), tensor.info.type), strict=True))
    values = _rows_for_half_split_rope(file.values(name), name, file, config)
    if file.architecture == "gemma3" and name.endswith("norm.weight"):
        values = values - np.float32(1.0)  # GGUF stores 1 + w, the model keeps w
    return {tensor.leaf: values}


def _on_device(values: npt.NDArray[Any], dtype: mx.Dtype) -> mx.array:
    """``values`` as they are where they are packed, else as ``dtype``."""
    array = mx.array(values)
    return array if array.dtype == mx.uint32 else array.astype(dtype)


def repack(
    rows: npt.NDArray[np.uint8], kind: Type
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """GGUF blocks ``[rows, bytes]`` as MLX's ``weight`` (uint32), ``scales`` and ``biases`` (float32, exact).

    A value is ``scale * q + bias`` in MLX; in GGUF ``d * (q - 8)`` (Q4_0), ``d * q + m`` (Q4_1) and
    ``d * q`` with signed q (Q8_0).
    """
    header = 4 if kind == Type.Q4_1 else 2
    blocks = rows.reshape(rows.shape[0], -1, header + GROUP_SIZE * PACKED_BITS[kind] // 8)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16)[..., 0].astype(np.float32)
    data = blocks[..., header:]
    if kind == Type.Q8_0:
        quants = data ^ np.uint8(128)  # two's complement to offset 128
        biases = scales * np.float32(-128)
    else:
        # A GGUF byte holds values j and j + 16, an MLX byte 2j and 2j + 1.
        values = np.concatenate([data & 15, data >> 4], axis=-1)
        quants = values[..., 0::2] | (values[..., 1::2] << 4)
        minimum = np.ascontiguousarray(blocks[..., 2:4]).view(np.float16)[..., 0].astype(np.float32)
        biases = minimum if kind == Type.Q4_1 else scales * np.float32(-8)
    weight = np.ascontiguousarray(quants.reshape(rows.shape[0], -1)).view(np.uint32)
    return weight, scales, biases


def _rows_for_half_split_rope(
    rows: npt.NDArray[Any], name: str, file: GGUFFile, config: dict[str, Any]
) -> npt.NDArray[Any]:
    """Undo llama.cpp's order of query and key rows (pairs side by side): the model rotates half against half."""
    part = name.split(".")[-2]
    if file.architecture != "llama" or part not in ("attn_q", "attn_k"):
        return rows
    heads = config["num_attention_heads"] if part == "attn_q" else config["num_key_value_heads"]
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _set_rope_factors(model: nn.Module, file: GGUFFile, config: dict[str, Any]) -> None:
    """Put the file's own frequency factors (Llama 3.1's scaling) in place of recomputed ones."""
    factors = mx.array(file.values(_ROPE_FACTORS))
    dims = config["head_dim"]
    frequencies = config["rope_theta"] ** (mx.arange(0, dims, 2) / dims) * factors
    mx.eval(frequencies)
    for layer in model.layers:
        layer.self_attn.rope._freqs = frequencies
