"""``config.json`` of a GGUF file, made from its metadata: what mlx-lm's models are built from."""

from typing import Any

from engine.errors import ModelLoadError
from engine.models.gguf_file import GGUFFile

MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
"""GGUF architecture -> mlx-lm model type."""
_GEMMA3_27B_HIDDEN_SIZE = 5376
_GEMMA3_LOCAL_ROPE_BASE = 10000.0
_GEMMA3_SLIDING_PATTERN = 6


def gguf_config(file: GGUFFile) -> dict[str, Any]:
    """The configuration in the words of ``config.json``. Raises :class:`ModelLoadError` naming the architecture."""
    arch = file.architecture
    if arch not in MODEL_TYPES or file.metadata.get(f"{arch}.expert_count", 0):
        experts = " with experts" if arch in MODEL_TYPES else ""
        raise ModelLoadError(
            f"{file.path.name}: GGUF architecture {arch!r}{experts} is not supported ({', '.join(MODEL_TYPES)} are); "
            "load the model's safetensors folder instead"
        )
    heads, dim = _field(file, "attention.head_count"), _field(file, "embedding_length")
    config = {
        "model_type": MODEL_TYPES[arch],
        "hidden_size": dim,
        "num_hidden_layers": _field(file, "block_count"),
        "intermediate_size": _field(file, "feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": _field(file, "attention.head_count_kv", heads),
        "head_dim": _field(file, "attention.key_length", dim // heads),
        "rms_norm_eps": _field(file, "attention.layer_norm_rms_epsilon"),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": _field(file, "context_length"),
        "rope_theta": _field(file, "rope.freq_base", 10000.0),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "eos_token_id": sorted(file.end_token_ids()),
    }
    if (rope := _rope_scaling(file)) is not None:
        config["rope_scaling"] = rope
    return config | (_gemma3(file, config) if arch == "gemma3" else {})


def _field(file: GGUFFile, key: str, default: Any = None) -> Any:
    """A value under the architecture's own prefix."""
    value = file.metadata.get(f"{file.architecture}.{key}", default)
    if value is None or isinstance(value, list):
        state = "missing" if value is None else "different in each layer"
        raise ModelLoadError(f"{file.path.name}: {file.architecture}.{key} is {state}; load the safetensors instead")
    return value


def _rope_scaling(file: GGUFFile) -> dict[str, Any] | None:
    if "rope_freqs.weight" in file.tensors:
        # Llama 3.1's scaling, of which the file holds only the result (the loader puts that in place).
        factors = file.values("rope_freqs.weight")
        return {
            "rope_type": "llama3",
            "factor": float(factors.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    kind = file.metadata.get(f"{file.architecture}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ModelLoadError(f"{file.path.name}: RoPE scaling {kind!r} is not supported; load the safetensors instead")
    scaling = {"rope_type": kind, "factor": _field(file, "rope.scaling.factor")}
    original = file.metadata.get(f"{file.architecture}.rope.scaling.original_context_length")
    return scaling | ({"original_max_position_embeddings": original} if original else {})


def _gemma3(file: GGUFFile, config: dict[str, Any]) -> dict[str, Any]:
    """What Gemma 3 needs besides; its sliding pattern and local RoPE base are constants of the architecture."""
    scalar = config["head_dim"]
    if config["hidden_size"] == _GEMMA3_27B_HIDDEN_SIZE:
        scalar = config["hidden_size"] // config["num_attention_heads"]
    return {
        "sliding_window": _field(file, "attention.sliding_window"),
        "sliding_window_pattern": _field(file, "attention.sliding_window_pattern", _GEMMA3_SLIDING_PATTERN),
        "rope_local_base_freq": _field(file, "rope.freq_base_swa", _GEMMA3_LOCAL_ROPE_BASE),
        "query_pre_attn_scalar": scalar,
    }
