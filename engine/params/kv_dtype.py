"""``--kv-cache-dtype``: its names, and how a key or value vector is kept under each. No MLX."""

from collections.abc import Iterable

from engine.errors import ConfigError, UnsupportedOptionError

QUANTIZED_BITS = {"int8": 8, "int4": 4}
"""Quantized pages: integers of so many bits, with a scale and a bias for each group of elements."""
KV_CACHE_DTYPES = ("auto", "float32", "float16", "bfloat16", *QUANTIZED_BITS)
VLLM_NAMES = {"int8": "int8_per_token_head", "int4": "int4_per_token_head"}
"""vLLM's names for integer pages. It has one scale for each token and head; ours are as fine or finer."""
_ALIASES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"} | {theirs: x for x, theirs in VLLM_NAMES.items()}
_INSTEAD = {"fp8": "int8", "mxfp8": "int8", "nvfp4": "int4", "mxfp4": "int4", "turboquant": "int4"}
"""Beginnings of vLLM's other values, and the nearest here."""
_ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
_GROUP_SIZES = (64, 32)


def kv_cache_dtype(name: str) -> str:
    """The name that the engine uses. Raises ConfigError for what it does not know or does not have."""
    known = _ALIASES.get(name, name)
    if known in KV_CACHE_DTYPES:
        return known
    for beginning, instead in _INSTEAD.items():
        if str(name).startswith(beginning):
            raise UnsupportedOptionError(
                f"--kv-cache-dtype {name} is not supported: pages are quantized to integers here; use {instead}",
                flag="kv_cache_dtype",
                value=name,
                allowed=", ".join(KV_CACHE_DTYPES),
            )
    raise ConfigError(
        f"--kv-cache-dtype {name}: must be one of {', '.join(KV_CACHE_DTYPES)}",
        flag="kv_cache_dtype",
        value=name,
        allowed=", ".join(KV_CACHE_DTYPES),
    )


def group_size(length: int) -> int | None:
    """Elements that share a scale in a quantized vector of ``length``; None where it cannot be quantized."""
    return next((size for size in _GROUP_SIZES if length and length % size == 0), None)


def vector_bytes(length: int, element_bytes: int, kv_cache_dtype: str) -> int:
    """Bytes of a key or value vector whose own elements take ``element_bytes``.

    Scales and biases have elements of that size too, and so has a vector that cannot be quantized.
    """
    bits, group = QUANTIZED_BITS.get(kv_cache_dtype), group_size(length)
    if bits is None or group is None:
        return length * _ELEMENT_BYTES.get(kv_cache_dtype, element_bytes)
    return length * bits // 8 + 2 * (length // group) * element_bytes


def unquantized_note(kv_cache_dtype: str, lengths: Iterable[int]) -> str | None:
    """A line for the user on vectors (of these ``lengths``) that stay unquantized. Raises ConfigError if all would."""
    if kv_cache_dtype not in QUANTIZED_BITS:
        return None
    found = {length for length in lengths if length}
    plain = sorted(length for length in found if group_size(length) is None)
    if not found:
        return f"--kv-cache-dtype {kv_cache_dtype}: this model keeps states, not pages, and states stay as they are"
    if not plain:
        return None
    said = f"--kv-cache-dtype {kv_cache_dtype}: head dimension {', '.join(map(str, plain))} is not a multiple of 32"
    if len(plain) == len(found):
        raise ConfigError(f"{said}; use auto, float16 or bfloat16", flag="kv_cache_dtype", value=kv_cache_dtype)
    return f"{said}: such keys or values keep the model's own element type"
