"""mlx-lm itself as the oracle, also for layers whose products it has for GPUs only: those by plain arithmetic."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from mlx_lm.models.bitlinear_layers import BitLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.utils import load_model

PROMPT = (5, 17, 42, 99, 120, 7)


def mlx_lm_tokens(folder: Path, num_tokens: int, dtype: mx.Dtype = mx.float32) -> list[int]:
    """Greedy tokens of the model that mlx-lm loads, its floats made ``dtype``."""
    with _products_of_gpus():
        model, _ = load_model(folder)
        model.set_dtype(dtype)
        return greedy(model, num_tokens)


def greedy(model: Any, num_tokens: int, prompt: Sequence[int] = PROMPT) -> list[int]:
    """mlx-lm's own loop."""
    return [int(token) for token, _ in generate_step(mx.array(list(prompt)), model, max_tokens=num_tokens)]


@contextmanager
def _products_of_gpus() -> Iterator[None]:
    gathered = QuantizedSwitchLinear.__call__

    def by_experts(layer: Any, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        if layer.global_scale is None:
            plain: mx.array = gathered(layer, x, indices, sorted_indices)
            return plain
        parts = zip(layer.weight, layer.scales, layer.global_scale, strict=True)
        dense = [mx.dequantize(w, s, None, 16, 4, "nvfp4", global_scale=g, dtype=x.dtype) for w, s, g in parts]
        return mx.gather_mm(x, mx.stack(dense).swapaxes(-1, -2), rhs_indices=indices)

    def with_rounded_inputs(layer: Any, x: mx.array) -> mx.array:
        how = (layer.group_size, layer.bits, layer.mode)
        words, *scales = mx.quantize(x, how[0], how[1], mode=how[2])
        rounded = mx.dequantize(words, scales[0], None, *how, dtype=x.dtype)
        return rounded @ mx.dequantize(layer.weight, layer.scales, None, *how, dtype=x.dtype).T

    def ternary(layer: Any, x: mx.array, packed: mx.array) -> mx.array:
        sums = [x @ (((packed >> 2 * quarter) & 3).astype(x.dtype) - 1).T for quarter in range(4)]
        scale = 1 / layer.weight_scale if layer.invert_weight_scales else layer.weight_scale
        product: mx.array = mx.concatenate(sums, axis=-1) * scale
        return product

    with (
        patch.object(QuantizedSwitchLinear, "__call__", by_experts),
        patch.object(nn.QQLinear, "__call__", with_rounded_inputs),
        patch.object(BitLinear, "execute_matmul_kernel", ternary),
    ):
        yield
