"""What flags and settings are given as text, read as values. Raises ValueError for what cannot be read."""

import json
import re
from collections.abc import Mapping
from typing import Any, Literal

_UNITS = {"k": 1_000, "m": 1_000_000, "g": 1_000_000_000, "K": 1024, "M": 1024**2, "G": 1024**3}


Auto = Literal["auto"]


def human_int(text: str | int) -> int:
    """Read an integer as vLLM does: ``32768``, ``32K`` = 32768, ``32k`` = 32000, ``1.5k`` = 1500."""
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgG]?)\s*", str(text))
    if not match:
        raise ValueError(f"{text!r} is not a whole number such as 32768 or 32K")
    number, unit = match.groups()
    if "." in number and unit not in ("k", "m", "g"):
        raise ValueError(f"{text!r}: a decimal needs a decimal unit (k, m or g)")
    return round(float(number) * _UNITS[unit]) if unit else int(number)


def int_or_auto(text: str | int) -> int | Auto:
    """:func:`human_int`, or ``auto`` (also -1, as in vLLM)."""
    if str(text).strip().lower() in ("auto", "-1"):
        return "auto"
    return human_int(text)


def fraction_or_auto(text: str | float) -> float | Auto:
    """A memory fraction in (0, 1], or ``auto``."""
    if isinstance(text, str) and text.strip().lower() == "auto":
        return "auto"
    return float(text)


def json_object(text: str | Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object given as text or as a mapping."""
    if isinstance(text, Mapping):
        return dict(text)
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object such as {{}}, got {text!r}")
    return value


def modality_limits(text: str | Mapping[str, int]) -> dict[str, int]:
    """``image=0,audio=0`` or a JSON object: how many of each kind a prompt may carry."""
    if isinstance(text, str) and not text.lstrip().startswith("{"):
        pairs = [part.split("=", 1) for part in text.split(",") if part.strip()]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"expected image=0,audio=0 or JSON, got {text!r}")
        return {name.strip(): int(count) for name, count in pairs}
    return {name: int(count) for name, count in json_object(text).items()}


def reasoning_config(text: str | Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object that may hold ``reasoning_start_str`` and ``reasoning_end_str``, both texts."""
    value = json_object(text)
    for key, marker in value.items():
        if key not in ("reasoning_start_str", "reasoning_end_str"):
            raise ValueError(f"{key!r} is not known; it takes reasoning_start_str and reasoning_end_str")
        if not isinstance(marker, str) or not marker:
            raise ValueError(f"{key} must be a string such as </think>, got {marker!r}")
    return value
