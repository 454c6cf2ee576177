"""Shapes of attention that common models have, for a check of the kernels without a model."""

import mlx.core as mx

from engine.params.engine_args import DEFAULT_BLOCK_SIZE
from engine.runner.kernels.self_check import AttentionShape


def common_shapes() -> list[tuple[str, AttentionShape]]:
    """Under their models' names: every element type, the usual head sizes, a window, sinks, packed and latent pages."""
    return [
        ("Qwen3-4B", _shape(32, 8, 128)),
        ("Gemma 3 4B", _shape(8, 4, 256)),
        ("Gemma 3 4B, sliding", _shape(8, 4, 256, window=1024)),
        ("gpt-oss-20b, sliding", _shape(64, 8, 64, window=128, sinks=True)),
        ("Qwen3.5-35B-A3B", _shape(16, 2, 256)),
        ("Gemma 4 26B-A4B", _shape(16, 2, 512)),
        ("Qwen3-4B, int8 pages", _shape(32, 8, 128, bits=8)),
        ("Qwen3-4B, int4 pages", _shape(32, 8, 128, bits=4)),
        ("DeepSeek V3", _shape(128, 1, 512, rope_dim=64)),
        ("SmolLM2-135M in float16", _shape(9, 3, 64, mx.float16)),
        ("SmolLM2-135M in float32", _shape(9, 3, 64, mx.float32)),
    ]


def _shape(
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: mx.Dtype = mx.bfloat16,
    *,
    window: int | None = None,
    sinks: bool = False,
    bits: int = 0,
    rope_dim: int = 0,
) -> AttentionShape:
    return AttentionShape(
        dtype=dtype, heads=heads, kv_heads=kv_heads, key_dim=dim, value_dim=rope_dim or dim,
        block_size=DEFAULT_BLOCK_SIZE, window=window, sinks=sinks, bits=bits, latent=rope_dim > 0,
    )  # fmt: skip
