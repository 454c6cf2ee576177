"""An oracle that shares nothing with MLX: a Llama's forward in NumPy, dense, in float64, from the weights' file."""

import json
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


class DenseLlama:
    """Log-probabilities of a model folder of type ``llama`` whose embedding is its head too."""

    def __init__(self, folder: Path) -> None:
        self._config = json.loads((folder / "config.json").read_text())
        weights = mx.load(str(folder / "model.safetensors"))
        assert isinstance(weights, dict)
        self._weights = {name: np.array(weight).astype(np.float64) for name, weight in weights.items()}

    def logprobs(self, token_ids: Sequence[int]) -> Float64:
        """Natural log-probabilities [T, V] of what follows each token."""
        embedding = self._weights["model.embed_tokens.weight"]
        x = embedding[list(token_ids)]
        for layer in range(self._config["num_hidden_layers"]):
            x = x + self._attention(layer, self._norm(x, f"model.layers.{layer}.input_layernorm"))
            x = x + self._mlp(layer, self._norm(x, f"model.layers.{layer}.post_attention_layernorm"))
        logits: Float64 = self._norm(x, "model.norm") @ embedding.T
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    def _norm(self, x: Float64, name: str) -> Float64:
        scaled: Float64 = x / np.sqrt((x * x).mean(-1, keepdims=True) + self._config["rms_norm_eps"])
        return scaled * self._weights[f"{name}.weight"]

    def _attention(self, layer: int, x: Float64) -> Float64:
        num, num_kv, dim = (self._config[f"{n}"] for n in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        length = len(x)
        q, k, v = (
            (x @ self._weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"].T).reshape(length, -1, dim)
            for name in "qkv"
        )
        q, k, v = self._turned(q), np.repeat(self._turned(k), num // num_kv, 1), np.repeat(v, num // num_kv, 1)
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(dim) + np.triu(np.full((length, length), -np.inf), 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hij,jhd->ihd", weights / weights.sum(-1, keepdims=True), v).reshape(length, -1)
        result: Float64 = mixed @ self._weights[f"model.layers.{layer}.self_attn.o_proj.weight"].T
        return result

    def _turned(self, x: Float64) -> Float64:
        half = x.shape[-1] // 2
        angles = np.arange(len(x))[:, None] * self._config["rope_theta"] ** (-np.arange(half) / half)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def _mlp(self, layer: int, x: Float64) -> Float64:
        gate, up, down = (
            self._weights[f"model.layers.{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")
        )
        opened = x @ gate.T
        result: Float64 = (opened / (1 + np.exp(-opened)) * (x @ up.T)) @ down.T
        return result
