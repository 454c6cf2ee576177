"""Small random models as folders on disk: weights in any element type, a tokenizer of bytes, a configuration."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import tokenizers
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes

from engine.runner.device.devices import describe_device
from engine.runner.kernels import expert_rows

VOCAB = 320
END = 256
_BASE: dict[str, Any] = {
    "hidden_size": 256, "num_hidden_layers": 3, "intermediate_size": 512, "num_attention_heads": 8,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "vocab_size": VOCAB, "max_position_embeddings": 16384,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "bos_token_id": END, "eos_token_id": END,
}  # fmt: skip
_HYBRID = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4, "full_attention_interval": 3,
    "rope_parameters": {"rope_type": "default", "type": "default", "rope_theta": 10000.0,
                        "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]},
}  # fmt: skip
_MORE: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 256, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {"sliding_window": 512, "sliding_window_pattern": 3, "query_pre_attn_scalar": 128,
                    "rope_local_base_freq": 10000.0},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 2, "sliding_window": 300, "rope_scaling": None,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "qwen3_5": {},
}  # fmt: skip


@dataclass(frozen=True)
class SmallModel:
    """An architecture with one head size and element type; ``changes`` to its configuration."""

    architecture: str
    head_dim: int
    dtype: str
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.architecture} {self.head_dim} {self.dtype}"

    @property
    def config(self) -> dict[str, Any]:
        """``config.json``."""
        own = {"head_dim": self.head_dim, "torch_dtype": self.dtype, **_MORE[self.architecture], **self.changes}
        config = {"model_type": self.architecture, **_BASE, **own}
        if self.architecture == "qwen3_5":
            text = {**config, **_HYBRID, "model_type": "qwen3_5_text"}
            return {"model_type": "qwen3_5", "eos_token_id": END, "torch_dtype": self.dtype, "text_config": text}
        return config

    def build(self) -> Any:
        """mlx-lm's module with seeded weights."""
        config = self.config
        kind, arguments = _get_classes(dict(config))
        model = kind(arguments.from_dict(config))
        key, weights = mx.random.key(0), []
        gain = 0.0 if self.architecture.startswith("gemma") else 1.0  # Gemma's norms add 1 themselves
        for path, value in sorted(tree_flatten(model.parameters())):
            key, mine = mx.random.split(key)
            weights.append((path, _weight(path, value, mine, gain).astype(getattr(mx, self.dtype))))
        model.update(tree_unflatten(weights))
        model.eval()
        mx.eval(model.parameters())
        expert_rows.install(model, describe_device().kind)  # mlx-lm's own numbers would not be right
        return model

    def write(self, folder: Path) -> Any:
        """Write the model's folder; gives mlx-lm's module."""
        folder.mkdir(parents=True, exist_ok=True)
        model = self.build()
        weights = dict(tree_flatten(model.parameters()))
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
        (folder / "config.json").write_text(json.dumps(self.config), encoding="utf-8")
        _write_tokenizer(folder)
        return model


def _weight(path: str, like: mx.array, key: mx.array, gain: float) -> mx.array:
    """Random values of a size at which attention picks a few of thousands of positions and counts for much.

    So a wrong position shows: with half of a prompt replaced, most models choose another token (measured).
    """
    noise = mx.random.normal(like.shape, key=key)
    if "norm" in path and like.ndim == 1:
        return gain + (1.2 if "q_norm" in path else 0.0) + 0.1 * noise
    if like.ndim < 2 or "conv" in path:
        return 0.3 * noise
    if "embed" in path:
        return 0.02 * noise  # so that the last token does not speak louder than the others
    return (5.0 if "o_proj" in path else 1.5) / math.sqrt(like.shape[-1]) * noise


def _write_tokenizer(folder: Path) -> None:
    """Bytes, an end token, and words that no text holds up to the vocabulary's size."""
    vocab = {token: index for index, token in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"<end>": END, **{f"<{index}>": index for index in range(END + 1, VOCAB)}}
    bytes_only = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    bytes_only.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = tokenizers.decoders.ByteLevel()
    bytes_only.add_special_tokens([tokenizers.AddedToken("<end>", special=True)])
    bytes_only.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>", "bos_token": "<end>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
