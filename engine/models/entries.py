"""Entries of ``config.json`` from which the engine itself computes: each is what its name asks for, or is refused.

What mlx-lm's models alone read is theirs to check.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from engine.errors import ModelLoadError
from engine.format.text import shortened
from engine.models.rope import BASE_KEYS, LENGTH_KEYS, ORIGINAL_LENGTH_KEY, PART_KEYS, TYPE_KEYS

Entries = Mapping[str, Any]


def check_entries(config: Entries) -> None:
    """Raise :class:`ModelLoadError` for an entry of ``config``, or of its ``text_config``, of another kind than meant.

    Entries that are missing, null, false or empty are left to those who read them.
    """
    _check(config, _ENTRIES, "")
    text = config.get("text_config") or {}
    _check(text, _ENTRIES, "text_config.")
    _check_lists(config, "")
    _check_lists(text, "text_config.")
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
        raise ModelLoadError(
            f"config.json has {where}{name} {shortened(str(value), 60)!r}, which is not {words}; fetch the file again"
        )


def _check_lists(entries: Entries, where: str) -> None:
    """Refuse lists (and patterns, a letter a layer) of more layers than any model has; some are built by them."""
    for name, value in entries.items():
        if _OF_LAYERS.search(name) and isinstance(value, list | str) and len(value) > MOST_LAYERS:
            raise ModelLoadError(
                f"config.json has {where}{shortened(name, 60)} of {len(value)} layers, more than {MOST_LAYERS}; fetch "
                "the file again"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _each(value: Any) -> list[Any]:
    """The values of each layer, or the one of all."""
    return value if isinstance(value, list) else [value]


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _whole(least: int, most: int) -> tuple[str, Callable[[Any], bool]]:
    """A whole number of that range, or a list of one for each layer."""

    def fits(value: Any) -> bool:
        if isinstance(value, list):
            return len(value) <= MOST_LAYERS and all(one is None or fits(one) for one in value)
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most

    return f"a whole number from {least} to {most}", fits


_OBJECT, _LIST = "an object", "a list of names"
_NUMBER = ("a number", _is_number)
_POSITIVE = ("a number above 0", lambda value: _is_number(value) and value > 0)
_PER_LAYER = (
    "a number above 0, or a list of one for each layer",
    lambda value: isinstance(value, list) or (_is_number(value) and value > 0),
)
_PARTS = ("a part of a head, from 0 to 1", lambda value: all(_is_number(one) and 0 <= one <= 1 for one in _each(value)))
_NUMBERS = ("a list of numbers", lambda value: isinstance(value, list) and all(map(_is_number, value)))

LAYER_KEYS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
"""Names of the number of layers, by model."""
_OF_LAYERS = re.compile("layer|block|pattern|idx|heads")
MOST_LAYERS = 1000
"""More than any model has; mlx-lm's classes are built layer by layer."""
_MOST_HEADS, _MOST_EXPERTS, _WIDEST, _MOST_TOKENS = 1 << 14, 1 << 16, 1 << 22, 1 << 27
"""More than any model has: of queries, of experts, of rows, of a vocabulary."""
_NEEDED = {
    **dict.fromkeys(LAYER_KEYS, MOST_LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), _MOST_HEADS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "model_dim"), _WIDEST),
    "vocab_size": _MOST_TOKENS,
}
"""Most of what every model has one of at least."""
_OPTIONAL = {
    **dict.fromkeys(("num_key_value_heads", "n_head_kv", "num_kv_heads", "num_query_heads"), _MOST_HEADS),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "mamba_num_heads"), _MOST_HEADS),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "n_inner", "moe_intermediate_size"), _WIDEST),
    **dict.fromkeys(("head_dim", "global_head_dim", "linear_key_head_dim", "linear_value_head_dim"), _WIDEST),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), _WIDEST),
    **dict.fromkeys(("shared_expert_intermediate_size", "expert_ffn_hidden_size", "ffn_dim"), _WIDEST),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), _MOST_EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "n_shared_experts"), _MOST_EXPERTS),
    **dict.fromkeys(("num_moe_experts", "num_shared_experts", "num_nextn_predict_layers"), _MOST_EXPERTS),
}
"""Most of what a model may have none of."""

_ENTRIES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(LENGTH_KEYS, _NUMBER),
    **dict.fromkeys(BASE_KEYS, _PER_LAYER),
    **dict.fromkeys(PART_KEYS, _PARTS),
    **{name: _whole(1, most) for name, most in _NEEDED.items()},
    **{name: _whole(0, most) for name, most in _OPTIONAL.items()},
    ORIGINAL_LENGTH_KEY: _POSITIVE,
    **dict.fromkeys(
        ("text_config", "rope_scaling", "rope_parameters", "quantization", "quantization_config", "per_layer_config"),
        (_OBJECT, _is_object),
    ),
    **dict.fromkeys(("layer_types", "layers_block_type"), (_LIST, _are_names)),
}
_ROPE: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(TYPE_KEYS, ("a name", lambda value: isinstance(value, str))),
    **dict.fromkeys(BASE_KEYS, _PER_LAYER),
    **dict.fromkeys(PART_KEYS, _PARTS),
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
