"""A folder's model as mlx-lm builds it from the headers of its files: weights that are read when evaluated."""

import copy
import re

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from engine.errors import ModelLoadError
from engine.models.entries import LAYER_KEYS
from engine.models.folder import StoredWeights
from engine.models.model_config import ModelConfig, text_config
from engine.models.quantization import (
    ADVICE,
    Quantization,
    check_quantization,
    describe_packing,
    fp8_fault,
    has_fp8,
    quantization_of,
)
from engine.params.engine_args import EngineArgs
from engine.runner.load.abstract_model import plain_model
from engine.runner.load.rope_layers import honour_rope, readable_config
from engine.runner.load.unpack import packed_kind

FP8_READERS = {
    "deepseek_v3": True,
    "deepseek_v32": True,
    "mimo_v2_flash": True,
    "minimax": True,
    "mistral4": False,
}
"""mlx-lm's models that dequantize FP8 weights, and whether by scales of blocks only."""
FP8_PACKERS = ("deepseek_v41", "minimax_m3_vl")
"""Those that keep FP8 weights packed, as mxfp8."""
PACKED_READERS = {
    "compressed-tensors pack-quantized": ("deepseek_v3", "mistral4"),
    "compressed-tensors mxfp4-pack-quantized": ("kimi_k3",),
    "compressed-tensors nvfp4-pack-quantized": (),
    "ModelOpt NVFP4": ("muse_spark",),
}
"""Those that know the tensors of other tools, by the format."""


def lazy_model(config: ModelConfig, files: StoredWeights, args: EngineArgs) -> nn.Module:
    """mlx-lm's model of ``config.path``; nothing is read but headers.

    Raises ModelLoadError in one line for what mlx-lm would refuse, and for what it would take for something else.
    """
    check_layers(config, files)
    found = quantization_of(config.hf_config, config.path)
    check_quantization(config.name, found, files.tensors)
    model = _load(config, found, files, args)
    honour_rope(model, config)
    if not config.hf_config.get("model_file"):  # which may do as it likes
        if has_fp8(files.tensors):
            _check_fp8(config, model, found, files)
        _check_types(config, model, files)
    return model


def check_layers(config: ModelConfig, files: StoredWeights) -> None:
    """Refuse more layers than the files have tensors of, before they are built one by one.

    Up to twice as many are left to mlx-lm, which names the first parameter that is missing: a layer may have none.
    """
    text, there = text_config(config.hf_config), files.num_layers
    for key in LAYER_KEYS:
        said = text.get(key)
        if files.complete and there and isinstance(said, int) and said > 2 * there:
            raise ModelLoadError(
                f"{config.name}: config.json has {key} {said}, and the weights have {there} layers; they are not of "
                "one model: fetch config.json again"
            )


def check_readers(config: ModelConfig, model: nn.Module, found: Quantization) -> None:
    """Refuse a format that ``model`` does not read, as far as the configuration tells without the files."""
    kinds = _sanitizers(model)
    known: tuple[str, ...] | None = PACKED_READERS.get(found.title)
    if found.method == "fp8":
        known = (*FP8_READERS, *FP8_PACKERS)
    if known is not None and not kinds & set(known):
        raise ModelLoadError(
            f"{config.name}: {found.title} weights are not read by mlx-lm's {config.model_type}; {ADVICE}"
        )


def _load(config: ModelConfig, found: Quantization, files: StoredWeights, args: EngineArgs) -> nn.Module:
    from mlx_lm.utils import _get_classes
    from mlx_lm.utils import load_model as load

    # mlx-lm changes entries as it reads them, and asks for a method that ModelOpt's own file leaves out.
    settings = {"quantization_config": copy.deepcopy(dict(found.settings))} if found.settings else {}
    entries = {**config.hf_config, **settings}
    if "quantization" in entries:
        entries["quantization"] = copy.deepcopy(entries["quantization"])
    trust = args.trust_remote_code
    try:
        if not config.hf_config.get("model_file"):
            entries = readable_config(entries, _get_classes(entries)[1])
        loaded = load(config.path, lazy=True, model_config=entries, trust_remote_code=trust)
        model: nn.Module = loaded[0]
    except Exception as error:
        if config.hf_config.get("model_file") and not args.trust_remote_code:
            raise ModelLoadError(
                f"{config.name} runs its own Python file {config.hf_config['model_file']!r}; "
                "read it, then load with --trust-remote-code"
            ) from None
        if not config.hf_config.get("model_file"):
            plain_model(config)  # which says so where the configuration alone is at fault
        raise ModelLoadError(f"{config.name}: {_reason(config, found, files, error)}") from error
    return model


def _reason(config: ModelConfig, found: Quantization, files: StoredWeights, error: Exception) -> str:
    """What went wrong, and what to do about it."""
    said = f"{type(error).__name__}: {_in_short(str(error))}"
    if isinstance(error, FileNotFoundError) or "safetensor" in said:
        return f"{said}; fetch the model again"
    if isinstance(error, RuntimeError):
        return said
    if config.hf_config.get("quantize_activations") and "activation quantization" in said:
        return f"{said}; set quantize_activations to false in config.json"
    packing = describe_packing(found, files.tensors)
    if packing is None or found.mlx:
        return f"{said}; config.json and the weights are not of one model, or a newer mlx-lm reads it"
    return f"{packing} are not read by mlx-lm's {config.model_type} ({said}); {ADVICE}"


def _in_short(said: str) -> str:
    """An error of mlx-lm in one line; of a list of tensors its first name."""
    text = " ".join(said.split())
    listed = re.match(r"((?:Received|Missing) \d+ parameters[^:]*): ([^,\s]+),", text)
    return f"{listed[1]}: {listed[2]} …" if listed else text[:200]


def _sanitizers(model: nn.Module) -> set[str]:
    """Files of mlx-lm whose classes arrange the weights of ``model`` and of models in it."""
    kinds = {kind for part in model.modules() for kind in type(part).__mro__ if "sanitize" in vars(kind)}
    return {kind.__module__.rpartition(".")[2] for kind in kinds}


def _check_fp8(config: ModelConfig, model: nn.Module, found: Quantization, files: StoredWeights) -> None:
    """Refuse FP8 weights that the model takes for integers, or scales that it does not apply as they are meant."""
    kinds = _sanitizers(model)
    if not kinds.isdisjoint(FP8_PACKERS):
        return
    readers = [blocks for kind, blocks in FP8_READERS.items() if kind in kinds]
    if not readers:
        packing = describe_packing(found, files.tensors)
        raise ModelLoadError(f"{config.name}: {packing} are not dequantized by mlx-lm's {config.model_type}; {ADVICE}")
    fault = fp8_fault(files.tensors, all(readers))
    if fault:
        raise ModelLoadError(f"{config.name}: {fault}, which mlx-lm would take for something else; {ADVICE}")


def _check_types(config: ModelConfig, model: nn.Module, files: StoredWeights) -> None:
    """Refuse integers where the model computes with floats, and packed weights of another kind than MLX's."""
    packed = {path: kind for path, module in model.named_modules() if (kind := packed_kind(module))}
    odd: dict[str, mx.Dtype] = {}
    for name, value in tree_flatten(model.parameters()):
        path, _, key = name.rpartition(".")
        allowed = _packed_types(packed[path]).get(key) if path in packed else None
        if value.dtype not in allowed if allowed else not mx.issubdtype(value.dtype, mx.inexact):
            odd[name] = value.dtype
    if odd:
        plain = dict(tree_flatten(plain_model(config).parameters()))
        odd = {
            name: dtype
            for name, dtype in odd.items()
            if name.rpartition(".")[0] in packed or (name in plain and mx.issubdtype(plain[name].dtype, mx.inexact))
        }
        for name, dtype in odd.items():
            kept = next((tensor.dtype for tensor in files.tensors if tensor.name == name), None)
            stored = kept or str(dtype).rpartition(".")[2]
            needed = "packed words" if name.rpartition(".")[0] in packed else "floats"
            raise ModelLoadError(
                f"{config.name}: {name} is stored as {stored}, where mlx-lm's {config.model_type} "
                f"computes with {needed}; {ADVICE}"
            )


def _packed_types(kind: str) -> dict[str, tuple[mx.Dtype, ...]]:
    """Element types of the arrays of a packed module."""
    floats = (mx.float32, mx.float16, mx.bfloat16)
    if kind == "ternary":
        return {"weight": (mx.uint8,), "weight_scale": floats}
    scales = floats if kind == "affine" else (mx.uint8,)
    return {"weight": (mx.uint32,), "scales": scales, "biases": floats, "global_scale": floats}
