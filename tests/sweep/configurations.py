"""A tiny configuration for any model file of mlx-lm, derived from its ``ModelArgs``.

Fields are known by name (``_BY_NAME``), then by type; ``OVERRIDES`` holds the values that names and types do not
tell. What has a default and is not known by name keeps it.
"""

import dataclasses
import importlib
import re
import types
import typing
from typing import Any

from tests.sweep.overrides import OVERRIDES

VOCAB = 199
NUM_LAYERS = 4
WINDOW = 24

_BY_NAME: tuple[tuple[str, float], ...] = (
    (r"hidden_(size|dim)|d_model|n_embd|model_dim|block_dim", 64),
    (r"num_(hidden_|transformer_)?layers|n_layers?", NUM_LAYERS),
    (r"vocab_size(_per_layer_input)?|num_vocab", VOCAB),
    (r"max_position_embeddings|n_positions|n_ctx|model_max_length|block_size", 4096),
    (r".*experts_per_tok(en)?|(moe_)?top_?k(_experts)?|moe_k", 2),
    (r"(num|n)_shared_experts?|moe_num_shared_experts", 1),
    (r"(moe_)?(num|n)_(local_|routed_)?experts", 4),
    (r"n_group|topk_group|num_expert_group|moe_layer_(freq|interval)|decoder_sparse_step", 1),
    (r"first_k_dense_replace|num_dense_layers|num_nextn_predict_layers", 1),
    (r".*(moe|shared|expert).*(intermediate|hidden)_(size|dim)|share_expert_dim", 32),
    (r".*intermediate_size.*|ffn_hidden_size|n_inner|block_ff_dim", 96),
    (r".*(key_value|kv)_heads", 2),
    (r"mamba_(n|num)_heads", 8),
    (r"((num|n|swa_num|index_n)_(attention_)?heads?)|linear_num_.*_heads", 4),
    (r"qk_rope_head_dim|.*rotary_dim", 8),
    (r".*head_dim|mamba_d_head|hidden_size_per_head|kv_channels", 16),
    (r".*lora_rank", 32),
    (r".*low_rank_dim|.*state_size|.*d_state", 16),
    (r".*(sliding_window|window_size|chunk_size)", WINDOW),
    (r"sliding_window_(pattern|size)|full_attention_interval|layer_group_size|.*_layer_period", 2),
    (r".*layer_offset", 1),
    (r".*(conv_kernel|d_conv|conv_L_cache|conv_window|conv1d_width|kernel_size|conv_kernel_dim)", 4),
    (r".*norm.*_(eps|epsilon)|norm_epsilon", 1e-5),
    (r".*(rope_theta|rotary_emb_base|base_freq)", 10000.0),
    (r".*(rotary_factor|rotary_pct)", 0.5),
    (r".*(multiplier|scaling|factor|scale|scale_emb|scale_depth)", 1.0),
    (r"index_topk", 16),
    (r".*soft_?cap(ping)?", 30.0),
)
"""Pattern of a name -> value; the first that matches. Numbers with a point only where a field has no default."""


def tiny_config(name: str) -> dict[str, Any]:
    """``config.json`` of a tiny model of ``mlx_lm.models.<name>``."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    config = {**_derive(module.ModelArgs, module), "model_type": name}
    known = dict(OVERRIDES.get(name, {}))
    text = config.get("text_config")
    if isinstance(text, dict):
        inner = known.pop("text_config", known)
        config["text_config"] = {**text, **inner}
        return config
    return {**config, **known}


def _derive(kind: type, module: Any) -> dict[str, Any]:
    """Entries of a dataclass: what its fields need."""
    hints = typing.get_type_hints(kind)
    config = {}
    for field in dataclasses.fields(kind):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        value = _value(field.name, hints.get(field.name, field.type), module, required=required)
        if value is not None:
            config[field.name] = value
    return config


def _value(name: str, hint: Any, module: Any, *, required: bool) -> Any:
    kinds = set(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else {hint}
    if name == "text_config":
        return _text_config(kinds, module)
    if kinds & {int, float}:
        return _number(name, kinds, required=required)
    if not required:
        return None
    if bool in kinds:
        return False
    if str in kinds:
        return name
    return [] if any(typing.get_origin(kind) is list or kind is list for kind in kinds) else {}


def _number(name: str, kinds: set[Any], *, required: bool) -> float | None:
    for pattern, value in _BY_NAME:
        if re.fullmatch(pattern, name) and (required or isinstance(value, int)):
            return value if float in kinds else int(value)
    return 2 if required else None


def _text_config(kinds: set[Any], module: Any) -> dict[str, Any]:
    """Of the class that the field names or the file has, else of the last model file that the file imports."""
    own = [vars(module)[name] for name in ("TextArgs", "TextConfig", "TextModelArgs") if name in vars(module)]
    for kind in (*kinds, *own):
        if dataclasses.is_dataclass(kind):
            return _derive(kind, module)  # type: ignore[arg-type]
    files = [value for value in vars(module).values() if isinstance(value, types.ModuleType)]
    names = [file.__name__ for file in files if hasattr(file, "ModelArgs")]
    names += [kind.__module__ for kind in module.Model.__mro__[1:] if kind.__name__ == "Model"]
    config = tiny_config(names[-1].rpartition(".")[2])
    text: dict[str, Any] = config.get("text_config", config)
    return text
