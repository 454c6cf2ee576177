"""``config.json`` in the words that mlx-lm's models read, whatever words today's tools wrote it in.

transformers 5 renames entries when it saves a configuration, and mlx-lm, which reads the files as their authors wrote
them, finds its own names missing: it refuses, or takes a default without a word.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import ModelLoadError
from engine.models.entries import check_entries
from engine.models.rope import FULL, with_rope

_RENAMED: dict[str, dict[str, str]] = {
    "bailing_hybrid": {
        "max_position_embeddings": "model_max_length",
        "norm_topk_prob": "moe_renormalize",
        "n_group": "num_expert_group",
        "num_experts_per_tok": "num_experts_per_token",
    },
    "exaone": {"num_layers": "num_hidden_layers", "layer_norm_epsilon": "rms_norm_eps"},
    "internlm3": {"qkv_bias": "attention_bias", "bias": "mlp_bias"},
    **{name: {"num_experts": "num_local_experts"} for name in ("mellum", "qwen3_moe", "qwen3_vl_moe_text")},
    "step3p5": {
        "num_attention_groups": "num_key_value_heads",
        "moe_num_experts": "n_routed_experts",
        "moe_top_k": "num_experts_per_tok",
    },
}
"""Model type -> mlx-lm's name of an entry -> transformers 5's."""
_KINDS = {"linear_attention": "mamba", "full_attention": "attention"}
_WITH_OLD_KINDS = {"granitemoehybrid": "layer_types", "nemotron_h": "layers_block_type"}
"""Model type -> the list of its layers' kinds, which mlx-lm knows by their older names."""
_PATTERNS = {
    **dict.fromkeys(("cohere2", "gemma3_text"), "sliding_window_pattern"),
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text"), "full_attention_interval"
    ),
}
"""Model type -> the entry that tells mlx-lm after how many layers one sees the whole sequence."""
_PER_LAYER = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
"""Of ``per_layer_config`` of Gemma 4's layers that see the whole sequence: mlx-lm's entry for all of them."""
_NOT_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def with_every_spelling(config: Mapping[str, Any], max_model_len: int | None = None) -> dict[str, Any]:
    """``config``, and its ``text_config``, with what they tell in the words that mlx-lm's models read as well.

    ``max_model_len``: the longest sequence that will be asked for, where the user named one. Raises
    :class:`ModelLoadError` for what has no words there, and for entries that are not what they should be.
    """
    config = _with_numbers(config)
    check_entries(config)
    spelled = _spelled(config, max_model_len)
    if isinstance(config.get("text_config"), Mapping):
        text = {"model_type": config.get("model_type"), **config["text_config"]}
        spelled["text_config"] = {**config["text_config"], **_spelled(text, max_model_len)}
        if "model_type" not in config["text_config"]:
            del spelled["text_config"]["model_type"]
    return spelled


def _spelled(config: Mapping[str, Any], max_model_len: int | None) -> dict[str, Any]:
    spelled = with_rope(config, max_model_len)
    model_type = str(config.get("model_type"))
    for ours, theirs in _RENAMED.get(model_type, {}).items():
        if ours not in config and theirs in config:
            spelled[ours] = config[theirs]
    kinds = _WITH_OLD_KINDS.get(model_type)
    if kinds is not None and kinds in config:
        spelled[kinds] = [_KINDS.get(kind, kind) for kind in config[kinds]]
    listed, pattern = config.get("layer_types"), _PATTERNS.get(model_type)
    if pattern is not None and pattern not in config and isinstance(listed, list):
        spelled[pattern] = _interval(listed, model_type)
    if model_type == "exaone4" and isinstance(listed, list):
        spelled["sliding_window_pattern"] = "".join("G" if kind == FULL else "L" for kind in listed)
    return spelled | _of_single_layers(config, model_type)


def _interval(kinds: Sequence[Any], model_type: str) -> int:
    """After how many layers one is full, as far as ``kinds`` repeat. Raises ModelLoadError where they do not."""
    interval = kinds.index(FULL) + 1 if FULL in kinds else len(kinds) + 1
    if any((kind == FULL) != ((number + 1) % interval == 0) for number, kind in enumerate(kinds)):
        raise ModelLoadError(
            f"config.json lists layer_types that do not repeat, and mlx-lm's {model_type} can only repeat a pattern"
        )
    return interval


def _of_single_layers(config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """What ``per_layer_config`` says of single layers, as entries for all of their kind."""
    single = config.get("per_layer_config")
    if not isinstance(single, Mapping) or not single:
        return {}
    kinds = config.get("layer_types") or []
    own = [entry if isinstance(entry, Mapping) else {str(entry): None} for _, entry in sorted(single.items())]
    full = sorted(str(number) for number, kind in enumerate(kinds) if kind == FULL)
    known = model_type.startswith("gemma4") and sorted(map(str, single)) == full and own[0].keys() <= _PER_LAYER.keys()
    if not known or any(entry != own[0] for entry in own):
        names = ", ".join(sorted({str(name) for entry in own for name in entry}))
        raise ModelLoadError(
            f"config.json has a per_layer_config ({names} of single layers), which mlx-lm's {model_type} does not take"
        )
    return {_PER_LAYER[name]: value for name, value in own[0].items()}


def _with_numbers(value: Any) -> Any:
    """``value`` with the numbers that JSON has no word for, which transformers writes as ``{"__float__": …}``."""
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"} and value["__float__"] in _NOT_FINITE:
            return _NOT_FINITE[value["__float__"]]
        return {name: _with_numbers(own) for name, own in value.items()}
    return [_with_numbers(own) for own in value] if isinstance(value, list) else value
