"""A model of random weights in a known shape, as a folder that this engine and mlx-lm both load."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import tokenizers
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3
from tokenizers import decoders, pre_tokenizers

GROUP_SIZE, BITS = 64, 4
"""Of the packed copy."""
_SHARD_BYTES = 3 << 30
_MEMORY_BACKED = Path("/dev/shm")
_SCALE = 0.02
_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
_QWEN3: dict[str, Any] = {
    "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "max_position_embeddings": 40960, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
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
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512,
    },
}  # fmt: skip


def write_model(folder: Path, shape: str, *, packed: bool = False) -> int:
    """Write a model of ``shape`` to ``folder``: bfloat16, or packed to 4 bits. Gives its weights' bytes.

    Weights are drawn on the device, one shard in memory at a time; the same call always writes the same.
    """
    config = dict(SHAPES[shape])
    config["eos_token_id"] = config["vocab_size"] - 1
    if packed:
        config["quantization"] = {"group_size": GROUP_SIZE, "bits": BITS}
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


def kv_bytes_per_token(shape: str) -> int:
    """Bytes that one token's keys and values take in all layers, in bfloat16."""
    config = SHAPES[shape]
    return int(config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * config["head_dim"] * 2)


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
    model = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    key = mx.random.key(0)
    for name, like in sorted(tree_flatten(model.parameters())):
        if "norm" in name:
            yield name, mx.ones(like.shape, mx.bfloat16)
            continue
        key, mine = mx.random.split(key)
        weight = (_SCALE * mx.random.normal(like.shape, mx.bfloat16, key=mine)).astype(mx.bfloat16)
        if not packed:
            yield name, weight
            continue
        parts = mx.quantize(weight, GROUP_SIZE, BITS)
        stem = name.removesuffix("weight")
        yield from zip((name, f"{stem}scales", f"{stem}biases"), parts, strict=True)


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
