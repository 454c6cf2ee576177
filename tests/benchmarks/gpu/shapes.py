"""A model of random weights in a known shape, as a folder that this engine and mlx-lm both load."""

import copy
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import tokenizers
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes
from tokenizers import decoders, pre_tokenizers

GROUP_SIZE, BITS = 64, 4
"""Of the packed copy."""
_SHARD_BYTES = 3 << 30
_MEMORY_BACKED = Path("/dev/shm")
_SCALE = 0.02
_CONV_SCALE = 0.3
_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
_QWEN3: dict[str, Any] = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "max_position_embeddings": 40960, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
_QWEN3_5: dict[str, Any] = {
    "model_type": "qwen3_5_moe", "architectures": ["Qwen3_5MoeForConditionalGeneration"], "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}  # fmt: skip
_HYBRID: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text", "intermediate_size": 512, "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6,
    "full_attention_interval": 4, "max_position_embeddings": 262144, "decoder_sparse_step": 1, "norm_topk_prob": True,
    "tie_word_embeddings": False, "attention_bias": False, "rope_parameters": {
        "rope_type": "default", "type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10]},
}  # fmt: skip
_GEMMA4: dict[str, Any] = {
    "model_type": "gemma4", "architectures": ["Gemma4ForConditionalGeneration"], "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
}  # fmt: skip
_GEMMA4_TEXT: dict[str, Any] = {
    "model_type": "gemma4_text", "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "rms_norm_eps": 1e-6,
    "sliding_window_pattern": 6, "max_position_embeddings": 262144, "tie_word_embeddings": True,
    "attention_k_eq_v": True, "enable_moe_block": True, "final_logit_softcapping": 30.0, "use_double_wide_mlp": False,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-4b": {
        **_QWEN3, "hidden_size": 2560, "num_hidden_layers": 36, "intermediate_size": 9728, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    },
    "qwen3-0.6b": {
        **_QWEN3, "hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    },
    "tiny": {
        **_QWEN3, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 512,
    },
    "qwen3.5-35b-a3b": {**_QWEN3_5, "hidden_size": 2048, "vocab_size": 248320, "text_config": {
        **_HYBRID, "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16, "num_key_value_heads": 2,
        "head_dim": 256, "vocab_size": 248320, "linear_num_value_heads": 32, "linear_num_key_heads": 16,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "num_experts": 256, "num_experts_per_tok": 8,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    }},
    "gemma-4-26b-a4b": {**_GEMMA4, "vocab_size": 262144, "text_config": {
        **_GEMMA4_TEXT, "hidden_size": 2816, "num_hidden_layers": 30, "intermediate_size": 2112,
        "num_attention_heads": 16, "head_dim": 256, "global_head_dim": 512, "num_key_value_heads": 8,
        "num_global_key_value_heads": 2, "vocab_size": 262144, "sliding_window": 1024, "num_experts": 128,
        "top_k_experts": 8, "moe_intermediate_size": 704,
    }},
    "tiny-hybrid": {**_QWEN3_5, "vocab_size": 512, "text_config": {
        **_HYBRID, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "vocab_size": 512, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 32, "linear_value_head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    }},
    "tiny-gemma": {**_GEMMA4, "vocab_size": 512, "text_config": {
        **_GEMMA4_TEXT, "hidden_size": 64, "num_hidden_layers": 6, "intermediate_size": 128,
        "num_attention_heads": 4, "head_dim": 16, "global_head_dim": 32, "num_key_value_heads": 2,
        "num_global_key_value_heads": 1, "vocab_size": 512, "sliding_window": 32, "num_experts": 8,
        "top_k_experts": 2, "moe_intermediate_size": 64,
    }},
}  # fmt: skip


def first_layers(shape: str) -> int:
    """As many as have every kind of a shape's layers."""
    config = text_config(shape)
    return int(config.get("full_attention_interval") or config["sliding_window_pattern"])


def write_model(folder: Path, shape: str, *, packed: bool = False, layers: int | None = None) -> int:
    """Write a model of ``shape`` to ``folder``: bfloat16, or packed to 4 bits. Gives its weights' bytes.

    ``layers``: fewer than the shape has. Weights are drawn on the device, one shard in memory at a time; the same call
    always writes the same.
    """
    config = copy.deepcopy(SHAPES[shape])
    if layers is not None:
        config.get("text_config", config)["num_hidden_layers"] = layers
    config["eos_token_id"] = config["vocab_size"] - 1
    if packed:
        common = {"group_size": GROUP_SIZE, "bits": BITS}
        others = {path: own for path, own in _packing(_module(config)).items() if own != common}
        config["quantization"] = {**common, **others}
    folder.mkdir(parents=True, exist_ok=True)
    num_bytes = 0
    places: dict[str, str] = {}
    for number, shard in enumerate(_shards(_weights(config, packed)), 1):
        name = f"model-{number:05d}.safetensors"
        mx.save_safetensors(str(folder / name), shard, metadata={"format": "mlx"})
        num_bytes += sum(array.nbytes for array in shard.values())
        places |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": num_bytes}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _write_tokenizer(folder, config["vocab_size"])
    (folder / "config.json").write_text(json.dumps(config, indent=1))  # last: it says that the folder is whole
    mx.clear_cache()
    return num_bytes


def weight_bytes(folder: Path) -> int:
    """Bytes of the weights in a folder of :func:`write_model`."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return int(index["metadata"]["total_size"])


def text_config(shape: str) -> dict[str, Any]:
    """What a shape says of its text model."""
    config: dict[str, Any] = SHAPES[shape].get("text_config", SHAPES[shape])
    return config


def kv_bytes_per_token(shape: str) -> int:
    """Bytes that one token's keys and values take in all layers of a dense shape, in bfloat16."""
    config = SHAPES[shape]
    return int(config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * config["head_dim"] * 2)


def context_bytes(shape: str, length: int) -> int:
    """Bytes that a step of one row reads and writes of ``length`` tokens: keys and values in bfloat16, and states.

    For the shapes with experts: hybrids of gated delta nets, and those that slide over a window.
    """
    config = text_config(shape)
    layers = config["num_hidden_layers"]
    full = layers // (config.get("full_attention_interval") or config["sliding_window_pattern"])
    others = layers - full
    if "linear_num_value_heads" in config:
        state = config["linear_num_value_heads"] * config["linear_key_head_dim"] * config["linear_value_head_dim"]
        per_token = 2 * config["num_key_value_heads"] * config["head_dim"] * 2
        return int(full * length * per_token + others * 2 * state * 4)
    wide = 2 * config["num_global_key_value_heads"] * config["global_head_dim"] * 2
    narrow = 2 * config["num_key_value_heads"] * config["head_dim"] * 2
    return int(full * length * wide + others * min(length, config["sliding_window"]) * narrow)


def roomy_folder(num_bytes: int) -> str | None:
    """A folder in memory with room for ``num_bytes``, else None for the system's own temporary folder."""
    if _MEMORY_BACKED.is_dir() and shutil.disk_usage(_MEMORY_BACKED).free > num_bytes:
        return str(_MEMORY_BACKED)
    return None


def temporary_folder(num_bytes: int) -> tempfile.TemporaryDirectory[str]:
    """A folder for models of ``num_bytes``, gone at the end."""
    return tempfile.TemporaryDirectory(prefix="vm-magic-bench-", dir=roomy_folder(num_bytes))


def _weights(config: dict[str, Any], packed: bool) -> Iterator[tuple[str, mx.array]]:
    """Names and arrays, as a checkpoint has them; the module is there for its shapes alone and never evaluated."""
    model = _module(config)
    modules, packing = dict(model.named_modules()), _packing(model) if packed else {}
    key = mx.random.key(0)
    for name, like in sorted(tree_flatten(model.parameters())):
        path, _, leaf = name.rpartition(".")
        key, mine = mx.random.split(key)
        weight = _drawn(name, like, type(modules[path]), mine)
        if leaf != "weight" or path not in packing:
            yield name, weight
            continue
        parts = mx.quantize(weight, packing[path]["group_size"], packing[path]["bits"])
        yield from zip((name, f"{path}.scales", f"{path}.biases"), parts, strict=True)


def _module(config: dict[str, Any]) -> nn.Module:
    kind, arguments = _get_classes(config)
    model: nn.Module = kind(arguments.from_dict(config))
    return model


def _drawn(name: str, like: mx.array, kind: type[nn.Module], key: mx.array) -> mx.array:
    """A parameter's values: random matrices, gains of one, decays between 1 and 16."""
    if name.endswith("A_log"):
        return mx.log(mx.random.uniform(1, 16, like.shape, key=key))
    if like.ndim == 1 or "norm" in name:
        return mx.ones(like.shape, mx.bfloat16)
    # Gemma's router gets rows of length one: a spread of logits as others have takes larger weights.
    scale = _CONV_SCALE if kind is nn.Conv1d else 1.0 if name.endswith("router.proj.weight") else _SCALE
    return (scale * mx.random.normal(like.shape, mx.bfloat16, key=key)).astype(mx.bfloat16)


def _packing(model: nn.Module) -> dict[str, dict[str, int]]:
    """Group size and bits of each module that is packed, by its path: a model's own wishes as mlx-lm keeps them."""
    wishes = getattr(model, "quant_predicate", None) or (lambda path, module: True)
    found = {}
    for path, module in model.named_modules():
        wish = wishes(path, module) if hasattr(module, "to_quantized") else False
        if wish:
            found[path] = {"group_size": GROUP_SIZE, "bits": BITS} | (wish if isinstance(wish, dict) else {})
    return found


def _shards(weights: Iterator[tuple[str, mx.array]]) -> Iterator[dict[str, mx.array]]:
    shard: dict[str, mx.array] = {}
    for name, array in weights:
        mx.eval(array)
        shard[name] = array
        if sum(one.nbytes for one in shard.values()) >= _SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level tokenizer without merges whose vocabulary is as large as the model's: every token has a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = (f"Ġ{_letters(number)}" for number in range(vocab_size))  # two characters at least: none is a byte's
    vocab = {text: index for index, text in enumerate([*alphabet, *words][: vocab_size - 1])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken("<|end|>", special=True)])
    made.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "chat_template": _TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _letters(number: int) -> str:
    """0 is a, 25 is z, 26 is ba …"""
    text = chr(ord("a") + number % 26)
    return text if number < 26 else _letters(number // 26) + text
