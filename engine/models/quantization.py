"""What a model's files say of its quantization, in the words of many tools: no MLX, no weights read."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ModelLoadError
from engine.models.folder import StoredTensor
from engine.models.weight_format import read_json

ADVICE = "take an MLX or GGUF version of the model, or convert the original with `mlx_lm.convert -q`"
_MODES = {
    "affine": ((1, 2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
    "mxfp8": ((8,), (32,)),
}
"""MLX's modes: their bits, and their groups of values that share a scale."""
_METHODS = ("awq", "bitnet", "compressed-tensors", "fp8", "modelopt", "mxfp4", "mxfp8")
"""``quant_method`` of those that mlx-lm reads, of some models at least."""
_TITLES = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "autoround": "AutoRound",
    "awq": "AWQ",
    "bitnet": "BitNet",
    "bitsandbytes": "bitsandbytes",
    "eetq": "EETQ",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "fbgemm_fp8": "FBGEMM FP8",
    "fp8": "FP8",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "modelopt": "ModelOpt",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "quanto": "Quanto",
    "quark": "Quark",
    "quip": "QuIP#",
    "spqr": "SpQR",
    "torchao": "TorchAO",
    "vptq": "VPTQ",
}
_PACKED_FORMATS = ("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")
"""Of compressed-tensors, those that mlx-lm maps to a mode of MLX."""
_LEFT_OUT = ("ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules")
"""Entries that list modules which stay as they are, by tool."""
PLAIN_TYPES = ("F32", "F16", "BF16")
_UNREADABLE = {
    "F64": "save them as float32",
    "F8_E5M2": "only FP8 of the kind E4M3 is read; " + ADVICE,
    "F4": ADVICE,
    "F6_E2M3": ADVICE,
    "F6_E3M2": ADVICE,
}
"""Element types of safetensors that MLX does not read, and what to do."""
FP8 = "F8_E4M3"
FP8_BLOCK = 128
"""Rows and columns that share a scale, in every model of mlx-lm that dequantizes FP8."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a model's weights are packed, as its configuration says it.

    ``mlx``: the entry ``quantization`` of MLX's own tools, {} if there is none. ``settings``: what stands in
    ``quantization_config`` or ``hf_quant_config.json``, {} if MLX's own entry comes first. ``method`` is theirs.
    """

    mlx: Mapping[str, Any]
    settings: Mapping[str, Any]
    method: str

    @property
    def exists(self) -> bool:
        """Whether the configuration speaks of one."""
        return bool(self.mlx or self.settings)

    @property
    def unpacks(self) -> bool:
        """Whether what is loaded takes more bytes than the files: mlx-lm dequantizes FP8, but for that of MXFP8."""
        return self.method == "fp8" and not self.is_mxfp8

    @property
    def is_mxfp8(self) -> bool:
        """FP8 with one power of two for a block of 32 by 32, or MXFP8 by its name: MLX computes on it as it is."""
        blocks = list(self.settings.get("weight_block_size") or ())
        return self.method == "mxfp8" or (
            self.method == "fp8" and self.settings.get("scale_fmt") == "ue8m0" and blocks == [32, 32]
        )

    @property
    def title(self) -> str:
        """Its name for people, before "weights": ``compressed-tensors pack-quantized``."""
        if self.mlx:
            return f"MLX {self.mlx.get('mode', 'affine')}"
        name = _TITLES.get(self.method, self.method or "unnamed")
        if self.method == "compressed-tensors":
            return f"{name} {self.settings.get('format')}"
        return f"{name} {algorithm(self.settings)}" if self.method == "modelopt" else name


def quantization_of(config: Mapping[str, Any], folder: Path) -> Quantization:
    """From ``config.json`` or, as ModelOpt writes it, from a file of its own beside it."""
    mlx = config.get("quantization")
    if isinstance(mlx, Mapping) and mlx:
        return Quantization(mlx, {}, "mlx")
    settings = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if not settings:
        settings = read_json(folder / "hf_quant_config.json")
        if settings and "quant_method" not in settings:
            settings = {**settings, "quant_method": "modelopt"}
    if not isinstance(settings, Mapping):
        settings = {}
    told = {key: value for key, value in settings.items() if value is not None}  # mlx-lm takes null for a list
    _check_settings(told)
    return Quantization({}, told, _method(told))


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings that are of other types than any tool writes. Raises ModelLoadError."""

    def check(name: str, value: Any, kind: type, words: str) -> None:
        if value and not isinstance(value, kind):
            raise ModelLoadError(f"quantization_config has {name} {str(value)[:60]!r}, which is not {words}")

    check("quantization", settings.get("quantization"), Mapping, "an object")
    check("config_groups", settings.get("config_groups"), Mapping, "an object")
    for words in (settings, settings.get("quantization") or {}):
        check("group_size", words.get("group_size"), int, "a whole number")
        for key in (*_LEFT_OUT, "weight_block_size"):
            check(key, words.get(key), list, "a list")
            for one in (words.get(key) or ()) if key in _LEFT_OUT else ():
                check(f"in {key}", one, str, "a name")
    for name, group in (settings.get("config_groups") or {}).items():
        check(f"config_groups.{name}", group, Mapping, "an object")
        weights = (group or {}).get("weights")
        check(f"config_groups.{name}.weights", weights, Mapping, "an object")
        check(f"config_groups.{name}.weights.group_size", (weights or {}).get("group_size"), int, "a whole number")


def algorithm(settings: Mapping[str, Any]) -> str:
    """ModelOpt's ``quant_algo``, which one of its files nests."""
    return str((settings.get("quantization") or settings).get("quant_algo"))


def check_quantization(name: str, found: Quantization, tensors: Sequence[StoredTensor]) -> None:
    """Refuse by name what MLX or mlx-lm cannot read of any model. ``tensors``: those of the files that are here.

    Raises ModelLoadError in one line.
    """
    for dtype, advice in _UNREADABLE.items():
        named = [tensor.name for tensor in tensors if tensor.dtype == dtype]
        if named:
            raise ModelLoadError(f"{name}: {len(named)} {dtype} tensors ({named[0]}), which MLX cannot read: {advice}")
    if found.mlx:
        _check_mlx(name, found.mlx)
    elif found.settings and (not tensors or any(tensor.dtype not in PLAIN_TYPES for tensor in tensors)):
        reason = _refusal(found, tensors)
        if reason:
            raise ModelLoadError(f"{name}: {reason}; {ADVICE}")


def fp8_fault(tensors: Iterable[StoredTensor], blocks: bool) -> str | None:
    """Why FP8 weights would not be dequantized right, None if they are; ``blocks``: by scales of 128 by 128 only."""
    by_name = {tensor.name: tensor for tensor in tensors}
    for tensor in by_name.values():
        if tensor.dtype != FP8 or _is_scale(tensor.name):
            continue
        scale = by_name.get(f"{tensor.name}_scale_inv")
        if scale is None:
            return f"{tensor.name} is FP8 without a scale ({tensor.name}_scale_inv)"
        if scale.dtype not in PLAIN_TYPES:
            return f"{scale.name} is {scale.dtype}, not a float"
        whole = tuple(-(-size // FP8_BLOCK) for size in tensor.shape)
        if scale.shape != whole and (blocks or not _broadcasts(scale.shape, tensor.shape)):
            return f"{scale.name} has shape {list(scale.shape)}, not {list(whole)} (blocks of {FP8_BLOCK})"
    return None


def has_fp8(tensors: Iterable[StoredTensor]) -> bool:
    """Whether there are weights in FP8; scales of 4-bit weights in it do not count."""
    return any(tensor.dtype == FP8 and not _is_scale(tensor.name) for tensor in tensors)


def describe_packing(found: Quantization, tensors: Sequence[StoredTensor]) -> str | None:
    """``AWQ weights``: by the configuration or, failing that, by the tensors' names and types; None: plain floats."""
    if found.exists:
        return f"{found.title} weights"
    names = " ".join(tensor.name for tensor in tensors)
    for mark, title in (
        (r"\.weight_scale_inv", "FP8"),
        (r"\.weight_packed", "compressed-tensors"),
        (r"\.g_idx", "GPTQ"),
        (r"\.qweight", "AWQ or GPTQ"),
    ):
        if re.search(mark + r"(?:\s|$)", names):
            return f"{title} weights, of which config.json says nothing,"
    types = Counter(tensor.dtype for tensor in tensors if tensor.dtype not in (*PLAIN_TYPES, "I64", "I32", "BOOL"))
    return f"{types.most_common(1)[0][0]} weights, of which config.json says nothing," if types else None


def leaves_out(found: Quantization, path: str) -> bool:
    """Whether the settings leave the module ``path`` of mlx-lm (``model.layers.0.mlp.gate``) as it is."""
    settings = found.settings.get("quantization") or found.settings
    named: list[str] = []
    for key in _LEFT_OUT:
        named += settings.get(key) or ()
    in_files = path.replace("switch_mlp", "experts.0")  # mlx-lm's name for all of them
    return any(_matches(pattern, in_files) for pattern in named)


def _method(settings: Mapping[str, Any]) -> str:
    method = settings.get("quant_method")
    if method is None and any(key.startswith("load_in_") for key in settings):
        return "bitsandbytes"
    return str(method or "").lower()


def _check_mlx(name: str, quantization: Mapping[str, Any]) -> None:
    """Refuse bits, groups and modes that MLX does not have, of the whole or of a module."""
    nested = [(f" of {path}", own) for path, own in quantization.items() if isinstance(own, Mapping)]
    for where, own in [("", quantization), *nested]:
        mode = own.get("mode", "affine")
        if not isinstance(mode, str) or mode not in _MODES:
            raise ModelLoadError(f"{name}: quantization{where} has mode {mode!r}; MLX has {', '.join(_MODES)}")
        for key, allowed in zip(("bits", "group_size"), _MODES[mode], strict=True):
            if key not in own and where:
                continue
            if own.get(key) not in allowed:
                some = ", ".join(map(str, allowed))
                raise ModelLoadError(
                    f"{name}: quantization{where} has {key} {own.get(key)}; MLX's {mode} has {some}: {ADVICE}"
                )


def _refusal(found: Quantization, tensors: Sequence[StoredTensor]) -> str | None:
    """Why settings cannot be honoured, None if they can, of some models at least."""
    settings, method = found.settings, found.method
    if not method:
        return "quantization_config names no quant_method"
    if method == "gptq":
        indexed = any(tensor.name.endswith(".g_idx") for tensor in tensors)
        return f"GPTQ weights {'with g_idx ' if indexed else ''}are not read by mlx-lm"
    if method not in _METHODS:
        return f"{found.title} weights (quant_method {method!r}) are not read by mlx-lm"
    if method == "awq":
        layout = settings.get("version") or settings.get("format") or settings.get("checkpoint_format") or "gemm"
        if str(layout).lower() != "gemm":
            return f"AWQ weights in the layout {layout!r} are not read by mlx-lm, only 'gemm'"
        if settings.get("bits", 4) != 4:
            return f"AWQ weights of {settings['bits']} bits are not read by mlx-lm, only of 4"
    if method == "compressed-tensors":
        return _compressed_refusal(settings)
    if method == "modelopt" and algorithm(settings) != "NVFP4":
        return f"{found.title} weights are not read by mlx-lm, only NVFP4"
    return None


def _compressed_refusal(settings: Mapping[str, Any]) -> str | None:
    """Of compressed-tensors: a format, or a kind of integers, that mlx-lm does not read."""
    form = settings.get("format")
    if form not in _PACKED_FORMATS:
        return f"compressed-tensors {form} weights are not read by mlx-lm"
    if form != "pack-quantized":
        return None
    groups = [group.get("weights") or {} for group in (settings.get("config_groups") or {}).values()]
    allowed = {"num_bits": (4,), "symmetric": (True,), "group_size": _MODES["affine"][1]}  # mlx-lm takes all for these
    other = [f"{key} {own.get(key)}" for own in groups or [{}] for key in allowed if own.get(key) not in allowed[key]]
    if other:
        return f"compressed-tensors pack-quantized weights with {', '.join(other)} are not read by mlx-lm"
    return None


def _is_scale(name: str) -> bool:
    return bool(re.search(r"(?:^|[._])scales?(?:_inv|_2)?$", name))


def _broadcasts(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether a scale is one for the whole tensor, or for each matrix in it."""
    if len(scale) > len(weight):
        return False
    padded = (1,) * (len(weight) - len(scale)) + scale
    return padded[-2:] == (1,) * len(padded[-2:]) and all(s in (1, w) for s, w in zip(padded, weight, strict=True))


def _matches(pattern: str, path: str) -> bool:
    """Whether ``path`` is the module, or lies in the module, that ``pattern`` names: ``re:…``, with ``*``, or plain."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], path) is not None
    expression = re.escape(pattern).replace(r"\*", ".*")
    return re.search(rf"(?:^|\.){expression}(?:$|\.)", path) is not None
