"""Entries of ``config.json`` from which the engine itself computes: each is what its name asks for, or is refused.

What mlx-lm's models alone read is theirs to check.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from engine.errors import ModelLoadError
from engine.models.rope import BASE_KEYS, LENGTH_KEYS, ORIGINAL_LENGTH_KEY, PART_KEYS, TYPE_KEYS

Entries = Mapping[str, Any]


def check_entries(config: Entries) -> None:
    """Raise :class:`ModelLoadError` for an entry of ``config``, or of its ``text_config``, of another kind than meant.

    Entries that are missing, null, false or empty are left to those who read them.
    """
    _check(config, _ENTRIES, "")
    text = config.get("text_config") or {}
    _check(text, _ENTRIES, "text_config.")
    for where, entries in (("", config), ("text_config.", text)):
        for name in ("rope_scaling", "rope_parameters"):
            words = entries.get(name) or {}
            _check(words, _ROPE, f"{where}{name}.")
            for kind, own in words.items():
                if isinstance(own, Mapping):
                    _check(own, _ROPE, f"{where}{name}.{kind}.")


def _check(entries: Entries, meant: Mapping[str, tuple[str, Callable[[Any], bool]]], where: str) -> None:
    for name, (words, fits) in meant.items():
        value = entries.get(name)
        if value is None or (words in (_OBJECT, _LIST) and not value) or fits(value):
            continue
        raise ModelLoadError(f"config.json has {where}{name} {str(value)[:60]!r}, which is not {words}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


_OBJECT, _LIST = "an object", "a list of names"
_NUMBER = ("a number", _is_number)
_POSITIVE = ("a number above 0", lambda value: _is_number(value) and value > 0)
_PER_LAYER = ("a number, or a list of one for each layer", lambda value: isinstance(value, list) or _is_number(value))
_NUMBERS = ("a list of numbers", lambda value: isinstance(value, list) and all(map(_is_number, value)))

_ENTRIES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys((*LENGTH_KEYS, "vocab_size"), _NUMBER),
    **dict.fromkeys((*BASE_KEYS, *PART_KEYS, "hidden_size", "intermediate_size", "num_attention_heads"), _PER_LAYER),
    ORIGINAL_LENGTH_KEY: _POSITIVE,
    **dict.fromkeys(
        ("text_config", "rope_scaling", "rope_parameters", "quantization", "quantization_config", "per_layer_config"),
        (_OBJECT, _is_object),
    ),
    **dict.fromkeys(("layer_types", "layers_block_type"), (_LIST, _are_names)),
}
_ROPE: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(TYPE_KEYS, ("a name", lambda value: isinstance(value, str))),
    **dict.fromkeys((*BASE_KEYS, *PART_KEYS), _PER_LAYER),
    **dict.fromkeys(("factor", "beta_fast", "beta_slow", ORIGINAL_LENGTH_KEY), _POSITIVE),
    **dict.fromkeys(
        (
            "alpha",
            "attention_factor",
            "high_freq_factor",
            "long_mscale",
            "low_freq_factor",
            "mscale",
            "mscale_all_dim",
            "short_mscale",
        ),
        _NUMBER,
    ),
    **dict.fromkeys(("long_factor", "short_factor"), _NUMBERS),
}
