"""RoPE scaling of a GGUF file in the words of ``config.json``."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from engine.models.gguf_fields import Fields

FREQUENCY_FACTORS = "rope_freqs.weight"
"""By what each frequency is divided: the result of Llama 3.1's scaling, in place of its numbers."""
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (FREQUENCY_FACTORS, LONG_FACTORS, SHORT_FACTORS)
"""Tensors that are no weights."""
ALL_SCALINGS = frozenset(("linear", "yarn", "llama3"))
"""Kinds that rotary layers of any model can be made to follow."""
_TOLERANCE = 1e-3


def rope_scaling(fields: Fields, config: Mapping[str, Any], allowed: frozenset[str]) -> dict[str, Any] | None:
    """``rope_scaling``, None where there is none. Refuses a kind that is not ``allowed`` for the architecture."""
    kind = _kind(fields)
    if kind is None:
        return None
    if kind not in allowed:
        raise fields.error(f"RoPE scaling {kind!r} is not supported for architecture {fields.file.architecture!r}")
    return {"rope_type": kind, "type": kind, **_SCALINGS[kind](fields, config)}


def _kind(fields: Fields) -> str | None:
    tensors = fields.file.tensors
    factor = fields.get("rope.scaling.factor")
    fields.get("rope.scaling.original_context_length")  # says nothing where nothing is scaled
    scales = factor not in (None, 0, 1)
    kind = str(fields.get("rope.scaling.type", "linear" if scales else "none"))
    if FREQUENCY_FACTORS in tensors:
        if kind != "none":
            raise fields.error(f"it has {FREQUENCY_FACTORS} and RoPE scaling {kind!r}, which is not supported")
        return "llama3"
    if LONG_FACTORS in tensors:
        return "longrope"
    if kind not in ("none", *_SCALINGS):
        raise fields.error(f"RoPE scaling {kind!r} is not supported")
    return kind if scales or kind == "longrope" else None


def _llama3(fields: Fields, _config: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers that the loader replaces by the factors themselves."""
    return {
        "factor": float(fields.file.values(FREQUENCY_FACTORS).max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _linear(fields: Fields, _config: Mapping[str, Any]) -> dict[str, Any]:
    return {"factor": float(fields.need("rope.scaling.factor"))}


def _yarn(fields: Fields, _config: Mapping[str, Any]) -> dict[str, Any]:
    factor = float(fields.need("rope.scaling.factor"))
    fields.expect("rope.scaling.yarn_ext_factor", 1.0)
    usual = 0.1 * math.log(factor) + 1.0
    attention = fields.get("rope.scaling.yarn_attn_factor")
    if attention is not None and not math.isclose(attention, usual, rel_tol=_TOLERANCE):
        raise fields.error(f"{fields.name('rope.scaling.yarn_attn_factor')} = {attention:g} is not supported")
    words = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
    more = {word: fields.get(f"rope.scaling.{key}") for word, key in words.items()}
    original = fields.need("rope.scaling.original_context_length")
    return {"factor": factor, "original_max_position_embeddings": original} | {k: v for k, v in more.items() if v}


def _longrope(fields: Fields, config: Mapping[str, Any]) -> dict[str, Any]:
    original = int(fields.need("rope.scaling.original_context_length"))
    factor = config["max_position_embeddings"] / original
    usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    attention = fields.get("rope.scaling.attn_factor", usual)
    if not math.isclose(attention, usual, rel_tol=_TOLERANCE):
        raise fields.error(f"{fields.name('rope.scaling.attn_factor')} = {attention:g} is not supported")
    if any(name not in fields.file.tensors for name in (LONG_FACTORS, SHORT_FACTORS)):
        raise fields.error(f"RoPE scaling 'longrope' without {LONG_FACTORS} and {SHORT_FACTORS}")
    return {
        "long_factor": fields.file.values(LONG_FACTORS).tolist(),
        "short_factor": fields.file.values(SHORT_FACTORS).tolist(),
        "original_max_position_embeddings": original,
    }


_SCALINGS: dict[str, Callable[[Fields, Mapping[str, Any]], dict[str, Any]]] = {
    "linear": _linear,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
