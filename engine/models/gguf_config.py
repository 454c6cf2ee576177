"""``config.json`` of a GGUF file, made from its metadata: what mlx-lm's models are built from."""

import math
from collections.abc import Callable
from typing import Any

from engine.errors import ModelLoadError
from engine.models.gguf_architectures import ARCHITECTURES, Architecture
from engine.models.gguf_fields import Fields
from engine.models.gguf_file import GGUFFile
from engine.models.gguf_rope import rope_scaling

_SHAPE_ONLY = ("attention.value_length",)


def architecture_of(file: GGUFFile) -> Architecture:
    """The architecture of ``file``. Raises :class:`ModelLoadError` naming it."""
    known = ARCHITECTURES.get(file.architecture)
    if known is None:
        raise ModelLoadError(
            f"{file.path.name}: GGUF architecture {file.architecture!r} is not supported "
            f"({', '.join(ARCHITECTURES)} are); load the model's safetensors folder instead"
        )
    return known(Fields(file)) if callable(known) else known


def gguf_config(file: GGUFFile) -> dict[str, Any]:
    """The configuration in the words of ``config.json``.

    Raises :class:`ModelLoadError` naming an architecture, or what the metadata say, that is not understood.
    """
    try:
        return _config(file)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise ModelLoadError(
            f"{file.path.name}: the metadata of {file.architecture} have a value that cannot be one ({said}); "
            "fetch the file again"
        ) from error


def _config(file: GGUFFile) -> dict[str, Any]:
    architecture = architecture_of(file)
    fields = Fields(file)
    config: dict[str, Any] = {"model_type": architecture.model_type}
    config |= {word: value(fields) for word, value in _COMMON.items()}
    config["intermediate_size"] = _feed_forward(fields)
    config |= {word: fields.need(key) for word, key in architecture.fields.items()}
    _check_heads(fields, config, architecture)
    if architecture.more is not None:
        config |= architecture.more(fields, config)
    _check_sizes(fields, config)
    if config["intermediate_size"] is None:
        raise fields.error(f"{fields.name('feed_forward_length')} is missing or differs between layers")
    if "rope_parameters" not in config and "rope_scaling" not in config:
        scaling = rope_scaling(fields, config, architecture.rope_scalings)
        config |= {} if scaling is None else {"rope_scaling": scaling}
    fields.expect("attention.causal", True)
    fields.refuse_unread()
    return config


def _layers(fields: Fields) -> int:
    """Layers of the model itself: those that only guess further tokens come after them."""
    count = int(fields.need("block_count")) - int(fields.get("nextn_predict_layers", 0))
    if count < 1:
        raise fields.error(f"{fields.name('block_count')} leaves {count} layers")
    if count > fields.num_blocks:
        raise fields.error(f"{fields.name('block_count')} says {count} layers and the file has {fields.num_blocks}")
    return count


def _key_value_heads(fields: Fields) -> int | None:
    """One number, or the one of all layers that have attention; None where they differ."""
    counts = {int(count) for count in fields.layers("attention.head_count_kv", _layers(fields))} - {0}
    if not counts:
        return int(fields.need("attention.head_count"))
    return counts.pop() if len(counts) == 1 else None


def _head_dim(fields: Fields) -> int:
    return int(fields.get("attention.key_length") or fields.need("embedding_length") // _heads(fields))


def _heads(fields: Fields) -> int:
    return int(fields.need("attention.head_count"))


def _vocab_size(fields: Fields) -> int:
    size = fields.rows("token_embd.weight")
    if size is None:
        raise fields.error("it has no token_embd.weight")
    return size


def _feed_forward(fields: Fields) -> int | None:
    """Of all layers; None where they differ or there are only experts."""
    sizes = {int(size) for size in fields.layers("feed_forward_length", _layers(fields))}
    return sizes.pop() if len(sizes) == 1 else None


def _norm_eps(fields: Fields) -> float:
    """Of norms of the root mean square, or of layer norms where a file has only theirs."""
    layer_norm = fields.get("attention.layer_norm_epsilon")
    value = fields.get("attention.layer_norm_rms_epsilon", layer_norm)
    if value is None:
        raise fields.error(f"{fields.name('attention.layer_norm_rms_epsilon')} is missing")
    return float(value)


_COMMON: dict[str, Callable[[Fields], Any]] = {
    "hidden_size": lambda fields: fields.need("embedding_length"),
    "num_hidden_layers": _layers,
    "num_attention_heads": _heads,
    "num_key_value_heads": _key_value_heads,
    "head_dim": _head_dim,
    "rms_norm_eps": _norm_eps,
    "vocab_size": _vocab_size,
    "max_position_embeddings": lambda fields: fields.need("context_length"),
    "rope_theta": lambda fields: fields.get("rope.freq_base", 10000.0),
    "attention_bias": lambda fields: "blk.0.attn_q.bias" in fields.file.tensors,
    "mlp_bias": lambda fields: "blk.0.ffn_up.bias" in fields.file.tensors,
    "tie_word_embeddings": lambda fields: "output.weight" not in fields.file.tensors,
    "eos_token_id": lambda fields: sorted(fields.file.end_token_ids()),
}
"""Words that all architectures have."""


_PRODUCTS = (
    ("num_attention_heads", "head_dim"),
    ("num_key_value_heads", "head_dim"),
    ("linear_num_key_heads", "linear_key_head_dim"),
    ("linear_num_value_heads", "linear_value_head_dim"),
    ("moe_intermediate_size",),
)
"""Words whose product counts rows of a tensor."""
_ALWAYS_FINE = 1 << 20
"""Rows that may be counted whatever the file holds: what does not fit is refused by name later."""


def _check_sizes(fields: Fields, config: dict[str, Any]) -> None:
    """Refuse sizes that no tensor of the file has room for, before rows are counted one by one."""
    largest = max((size for info in fields.file.tensors.values() for size in info.shape), default=0)
    largest = max(largest, _ALWAYS_FINE)
    for words in _PRODUCTS:
        sizes = [config.get(word) for word in words]
        if all(isinstance(size, int) for size in sizes) and math.prod(sizes) > largest:  # type: ignore[arg-type]
            said = " x ".join(f"{word} {size}" for word, size in zip(words, sizes, strict=True))
            raise fields.error(f"its metadata say {said}, for which no tensor has room")


def _check_heads(fields: Fields, config: dict[str, Any], architecture: Architecture) -> None:
    """Refuse heads of sizes that mlx-lm's model does not take; set how much of them rotates where it does."""
    if architecture.own_heads:
        return
    dim = config["head_dim"]
    for key in _SHAPE_ONLY:
        fields.expect(key, dim)
    if architecture.derives_head_dim and dim * config["num_attention_heads"] != config["hidden_size"]:
        raise fields.error(f"{fields.name('attention.key_length')} = {dim} is not supported by this architecture")
    if config["num_key_value_heads"] is None and architecture.more is None:
        raise fields.error(f"{fields.name('attention.head_count_kv')} differs between layers")
    rotated = int(fields.get("rope.dimension_count") or dim)
    if architecture.partial_rotary:
        config["partial_rotary_factor"] = rotated / dim
    elif rotated != dim:
        raise fields.error(f"{fields.name('rope.dimension_count')} = {rotated} of heads of {dim} is not supported")
