"""Tiny models with random weights, as folders on disk: what mlx-lm loads, in milliseconds.

The vocabulary and tokenizer are SmolLM2's; hidden size 64, 4 layers, 4 query and 2 key-value heads,
float32, seeded, so the same call always writes the same weights. Text from them is noise.
"""

import importlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from engine.models.gguf_file import open_gguf
from engine.text.tokens.gguf_tokenizer import build_tokenizer, special_token

VOCAB_SIZE = 49152
CONTEXT_LENGTH = 4096
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3_text")
_BASE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": CONTEXT_LENGTH,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MORE: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "sliding_window": 32,
        "sliding_window_pattern": 2,
        "rope_local_base_freq": 10000.0,
        "query_pre_attn_scalar": 16,
    },
    "qwen3_5": {  # whose own default is 64 heads of 128: a minute for a prompt on a CPU
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
}

_FAMILY_BASE = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "head_dim": 16,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma4_text": {
        **_FAMILY_BASE,
        "num_hidden_layers": 6,
        "intermediate_size": 128,
        "global_head_dim": 32,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "sliding_window": 64,
        "sliding_window_pattern": 3,
    },
    "qwen3_5_moe": {
        "vocab_size": VOCAB_SIZE,
        "text_config": {
            **_FAMILY_BASE,
            "model_type": "qwen3_5_moe_text",
            "num_hidden_layers": 4,
            "intermediate_size": 128,
            "num_key_value_heads": 2,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_conv_kernel_dim": 4,
            "full_attention_interval": 4,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "decoder_sparse_step": 1,
            "norm_topk_prob": True,
            "rope_parameters": {
                "rope_type": "default",
                "type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
                "mrope_section": [2, 1, 1],
            },
        },
    },
}
"""Models of the families that the recipes in use are for: sliding windows and shared layers, states and experts."""


def tiny_config(architecture: str, **changes: Any) -> dict[str, Any]:
    """``config.json`` of a tiny model; ``changes`` replace entries."""
    return {"model_type": architecture, **_BASE, **_MORE.get(architecture, {}), **changes}


def family_config(architecture: str) -> dict[str, Any]:
    """``config.json`` of one of :data:`FAMILIES`."""
    return {"model_type": architecture, "bos_token_id": 1, "eos_token_id": 2, **FAMILIES[architecture]}


def build_model(config: dict[str, Any], seed: int = 0) -> Any:
    """The mlx-lm module of ``config`` with seeded float32 weights, large enough that greedy text varies."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten

    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    key = mx.random.key(seed)
    weights = []
    for name, value in sorted(tree_flatten(model.parameters())):
        key, mine = mx.random.split(key)
        scale, shift = (0.1, 1.0) if "norm" in name else (0.25, 0.0)
        weights.append((name, shift + scale * mx.random.normal(value.shape, key=mine)))
    model.update(tree_unflatten(weights))
    mx.eval(model.parameters())
    return model


def write_weights(folder: Path, config: dict[str, Any], seed: int = 0) -> None:
    """``config.json`` and ``model.safetensors`` of a tiny model."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    weights = dict(tree_flatten(build_model(config, seed).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def write_tokenizer(folder: Path, gguf: Path) -> None:
    """The tokenizer of a GGUF file as ``tokenizer.json`` and ``tokenizer_config.json``."""
    for name, text in tokenizer_files(gguf).items():
        (folder / name).write_text(text, encoding="utf-8")


@cache
def tokenizer_files(gguf: Path) -> dict[str, str]:
    """The text of each file of a GGUF file's tokenizer."""
    return {
        "tokenizer.json": build_tokenizer(open_gguf(gguf).metadata).to_str(),
        "tokenizer_config.json": tokenizer_settings(gguf),
    }


def tokenizer_settings(gguf: Path, **changes: Any) -> str:
    """``tokenizer_config.json`` of a GGUF file's tokenizer; ``changes`` replace entries."""
    metadata = open_gguf(gguf).metadata
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # a model's own class would drop the splitting of digits
        "bos_token": special_token(metadata, "bos"),
        "eos_token": special_token(metadata, "eos"),
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
    }
    return json.dumps(settings | changes, indent=1)


def write_model(folder: Path, architecture: str, gguf: Path, seed: int = 0, **changes: Any) -> Path:
    """A whole tiny model folder: config, weights, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, tiny_config(architecture, **changes), seed)
    write_tokenizer(folder, gguf)
    return folder
