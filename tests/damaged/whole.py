"""Tiny models that are whole: files by their names, before anything is done to them."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import tokenizers
from gguf import quants
from gguf.constants import GGMLQuantizationType as Type
from mlx.utils import tree_flatten

from tests.damaged.gguf_parts import GGUFParts, Tensor
from tests.tiny_models import build_model

Files = dict[str, bytes]
_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_KINDS: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "gemma3_text": {"sliding_window": 32, "sliding_window_pattern": 2, "rope_local_base_freq": 1e4,
                    "query_pre_attn_scalar": 8},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1,
                  "mlp_only_layers": [], "norm_topk_prob": True},
    "qwen3_5": {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
                "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
                "full_attention_interval": 2},
}  # fmt: skip
_SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def vocabulary() -> tuple[list[str], list[tuple[str, str]]]:
    """Special tokens, bytes and a few pairs; and the merges that make the pairs."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("a", "n"), ("Ġ", "a")]
    return [*_SPECIAL, *letters, *(a + b for a, b in merges)], merges


def _tokenizer() -> str:
    tokens, merges = vocabulary()
    hf = tokenizers.Tokenizer(tokenizers.models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    hf.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = tokenizers.decoders.ByteLevel()
    hf.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in _SPECIAL])
    return hf.to_str()


def _text_files() -> dict[str, Any]:
    added = {str(i): {"content": text, "special": True, "lstrip": False} for i, text in enumerate(_SPECIAL)}
    return {
        "tokenizer.json": json.loads(_tokenizer()),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
            "added_tokens_decoder": added, "model_max_length": 256, "chat_template": TEMPLATE,
            "additional_special_tokens": ["<|im_start|>"],
        },
        "generation_config.json": {"eos_token_id": [1, 3], "temperature": 0.7, "top_p": 0.9, "top_k": 40,
                                   "do_sample": True},
        "special_tokens_map.json": {"bos_token": {"content": "<s>"}, "eos_token": "</s>"},
    }  # fmt: skip


@cache
def _weights(kind: str) -> tuple[dict[str, Any], dict[str, mx.array]]:
    config = {"model_type": kind, **_SHAPE, "vocab_size": len(vocabulary()[0]), **_KINDS[kind]}
    return config, dict(tree_flatten(build_model(config).parameters()))


def folder(kind: str, scratch: Path, *, packed: bool = False, shards: bool = False) -> Files:
    """A folder's files. ``packed``: in 4 bits, as mlx-lm writes them; ``shards``: in two files with an index."""
    config, weights = _weights(kind)
    if packed:
        config = {**config, "quantization": {"group_size": 32, "bits": 4}}
        weights = _pack(weights)
    texts = {**_text_files(), "config.json": config}
    files = {name: json.dumps(value, indent=1).encode() for name, value in texts.items()}
    files["chat_template.jinja"] = TEMPLATE.encode()
    names = sorted(weights)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]] if shards else [names]
    weight_map = {}
    for number, half in enumerate(halves, start=1):
        file = f"model-{number:05d}-of-00002.safetensors" if shards else "model.safetensors"
        weight_map |= dict.fromkeys(half, file)
        path = scratch / "written.safetensors"
        mx.save_safetensors(str(path), {name: weights[name] for name in half}, metadata={"format": "mlx"})
        files[file] = path.read_bytes()
    if shards:
        index = {"metadata": {"total_size": sum(value.nbytes for value in weights.values())}, "weight_map": weight_map}
        files["model.safetensors.index.json"] = json.dumps(index).encode()
    return files


def _pack(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    packed: dict[str, mx.array] = {}
    for name, value in weights.items():
        if value.ndim == 2 and value.shape[-1] % 32 == 0:
            parts = mx.quantize(value, group_size=32, bits=4)
            path = name.removesuffix(".weight")
            packed |= {f"{path}.{leaf}": part for leaf, part in zip(("weight", "scales", "biases"), parts, strict=True)}
        else:
            packed[name] = value
    return packed


_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_file(*, sentencepiece: bool = False, kind: Type = Type.F32) -> GGUFParts:
    """A llama as a GGUF file, in its parts."""
    config, weights = _weights("llama")
    tokens, merges = vocabulary()
    types = [3] * len(_SPECIAL) + [1] * (len(tokens) - len(_SPECIAL))
    metadata: dict[str, tuple[int, Any]] = {
        "general.architecture": (8, "llama"),
        "general.name": (8, "tiny"),
        "general.alignment": (4, 32),
        "llama.block_count": (4, 2),
        "llama.context_length": (4, 256),
        "llama.embedding_length": (4, config["hidden_size"]),
        "llama.feed_forward_length": (4, config["intermediate_size"]),
        "llama.attention.head_count": (4, config["num_attention_heads"]),
        "llama.attention.head_count_kv": (4, config["num_key_value_heads"]),
        "llama.attention.key_length": (4, config["head_dim"]),
        "llama.attention.value_length": (4, config["head_dim"]),
        "llama.attention.layer_norm_rms_epsilon": (6, 1e-6),
        "llama.rope.freq_base": (6, 10000.0),
        "llama.rope.dimension_count": (4, config["head_dim"]),
        "general.sampling.temp": (6, 0.5),
        "tokenizer.ggml.model": (8, "llama" if sentencepiece else "gpt2"),
        "tokenizer.ggml.tokens": (9, (8, tokens)),
        "tokenizer.ggml.token_type": (9, (5, types)),
        "tokenizer.ggml.bos_token_id": (4, 0),
        "tokenizer.ggml.eos_token_id": (4, 1),
        "tokenizer.ggml.unknown_token_id": (4, 0),
        "tokenizer.chat_template": (8, TEMPLATE),
    }
    if sentencepiece:
        metadata["tokenizer.ggml.scores"] = (9, (6, [-float(i) for i in range(len(tokens))]))
    else:
        metadata["tokenizer.ggml.pre"] = (8, "gpt-2")
        metadata["tokenizer.ggml.merges"] = (9, (8, [f"{a} {b}" for a, b in merges]))
    return GGUFParts(metadata, _tensors(weights, kind))


def _tensors(weights: Mapping[str, mx.array], kind: Type) -> list[Tensor]:
    found: list[Tensor] = []
    for name, value in weights.items():
        values = np.array(value)
        type_ = kind if values.ndim == 2 else Type.F32
        data = quants.quantize(values, type_).tobytes()
        found.append(Tensor(_gguf_name(name), list(values.shape[::-1]), int(type_), data))
    return found


def _gguf_name(name: str) -> str:
    path = name.removesuffix(".weight")
    for ours, theirs in _NAMES.items():
        path = path.replace(ours, theirs)
    return path.replace("model.layers.", "blk.") + ".weight"
