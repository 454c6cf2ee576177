"""``python3 -m tests.on_device.fused``: layers in few launches on this machine's GPU, right and how fast.

About a minute. Needs mlx, mlx-lm and numpy alone. Prints a line for each check, and times; exits 1 where something is
wrong.
"""

import gc
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import qwen3

from engine.runner.device.devices import DeviceKind, describe_device
from engine.runner.kernels.dialect import kernels_available
from engine.runner.kernels.fused_rows import Norm, fused_rows, takes_norm
from engine.runner.kernels.joined_check import JoinedShape, joined_problem
from engine.runner.kernels.kernel_cache import collecting, compile_all
from engine.runner.kernels.self_check import GPU_KERNELS, AttentionKernels
from engine.runner.kernels.swapped_modules import SwappedModules
from engine.runner.kv import attention_patch
from engine.runner.kv.block_trial import BlockTrial, in_dtype
from engine.runner.kv.fused_block import FusedBlock
from engine.runner.kv.fused_blocks import FusedBlocks, swap_layers
from engine.runner.kv.kernel_cache import DecodeRows, KernelLayerCache, padded_positions
from engine.runner.kv.kv_pool import KVPool
from engine.runner.kv.kv_spec import LayerShape
from engine.runner.kv.layer_trial import distance
from tests.on_device.kernels import say, timed, verdict

BF16, F16, F32 = mx.bfloat16, mx.float16, mx.float32
QWEN3_4B: dict[str, Any] = {
    "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6, "vocab_size": 512, "rope_theta": 1e6,
    "max_position_embeddings": 40960, "tie_word_embeddings": True, "num_hidden_layers": 8,
}  # fmt: skip
"""With a small vocabulary: its layers are what counts."""
PRODUCTS = ((BF16, 0, (1, 5, 16)), (BF16, 4, (1, 5, 16, 32)), (F16, 0, (1, 5, 16)))
"""Element type, bits (0: not packed), and numbers of rows."""
WIDTH, K = 320, 512
WIDE = ((3584, 18944, 0.0), (3072, 8192, 8.0), (6144, 2688, 0.0))
"""Columns, depth and what is added to x, for one row in 4 bits: each is cut in another way."""
LIMIT = {BF16: 9e-3, F16: 1.5e-3}
"""Of the norm, with unpacked weights and rows times gains rounded."""
VIEWS = {"Reshape", "Slice", "Split", "Transpose", "ExpandDims", "Squeeze", "Broadcast", "Flatten", "Unflatten"}
"""Nodes of a graph that launch nothing, where what they look at is contiguous."""
TOKENS, BLOCK_SIZE = 512, 16
ROWS = (1, 8, 16, 24, 32, 64)
SPLIT = 24, 32
"""Numbers of rows for which narrow products split K where weights are not packed."""
REPEATS = 20


def shape(dtype: mx.Dtype, dim: int, group: int, **more: Any) -> JoinedShape:
    """Layers of ``group`` query heads to each of two kv heads."""
    known = {"heads": 2 * group, "kv_heads": 2, "block_size": BLOCK_SIZE, "scale": dim**-0.5}
    return JoinedShape(dtype=dtype, dim=dim, **{**known, **more})


ATTENTION = {
    "qwen3": shape(BF16, 128, 4, eps=1e-6), "llama": shape(BF16, 128, 4), "window": shape(BF16, 128, 8, window=100),
    "smollm2": shape(F32, 64, 3), "float16": shape(F16, 128, 7, eps=1e-6),
    "gemma 4, sliding": shape(BF16, 256, 2, eps=1e-6, scale=1.0, window=1024, value_heads="normalized"),
    "gemma 4, full": shape(BF16, 512, 8, eps=1e-6, scale=1.0, value_heads="normalized keys"),
}  # fmt: skip


def main() -> int:
    """Every check; 1 if one failed."""
    if not kernels_available():
        say("no GPU: MLX computes on the CPU here")
        return 1
    device = describe_device()
    say(f"{device.name}, MLX {version('mlx')}")
    failed = timed("attention", check_attention)
    if device.kind == "cuda":
        failed += timed("products", check_products)
    for bits in (0, 4):
        mx.clear_cache()
        failed += timed(f"layers, {bits or 16}-bit", lambda bits=bits: check_layers(bits, device.kind))  # type: ignore[misc]
    say(f"{'FAILED: ' + ', '.join(failed) if failed else 'all right'}")
    return int(bool(failed))


def check_attention(kernels: AttentionKernels = GPU_KERNELS) -> list[str]:
    """Attention from a joined product against numpy."""
    with collecting() as awaited:
        for one in ATTENTION.values():
            joined_problem(one, kernels)
    compile_all(awaited)
    return [name for said, one in ATTENTION.items() for name in verdict(f"joined {said}", joined_problem(one, kernels))]


def check_products() -> list[str]:
    """Norm, residual and gate inside a product, against float32."""
    asked = [(dtype, bits, rows, WIDTH, K, 0.0) for dtype, bits, numbers in PRODUCTS for rows in numbers]
    asked += [(dtype, 4, 1, *one) for dtype in (BF16, F16) for one in WIDE]
    with collecting() as awaited:
        for each in asked:
            _products(*each)
    compile_all(awaited)
    failed = []
    for dtype, bits, rows, width, k, shift in asked:
        errors = _products(dtype, bits, rows, width, k, shift)
        said = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        right = all(error <= LIMIT[dtype] for error in errors.values())
        name = f"{rows} rows, {width} x {k}, {f'{bits}-bit, ' if bits else ''}{str(dtype).rpartition('.')[2]}"
        say(f"{'ok  ' if right else 'FAIL'} {name}: {said}")
        failed += [] if right else [name]
    return failed


def _products(dtype: mx.Dtype, bits: int, rows: int, width: int, k: int, shift: float) -> dict[str, float]:
    """The error of each kind of product."""
    x, residual = (mx.random.normal((rows, size)).astype(dtype) for size in (k, width))
    x = (x + shift).astype(dtype)
    norm = Norm((1 + 0.2 * mx.random.normal((k,))).astype(dtype), 1e-6) if takes_norm(dtype) else None
    plain = (mx.random.normal((width, k)) * k**-0.5).astype(dtype)
    weight, packing = plain, dict[str, Any]()
    if bits:
        words, scales, biases = mx.quantize(plain, group_size=64, bits=bits)
        scaling = mx.stack([scales, biases]).flatten().view(mx.uint32)
        weight = mx.concatenate([words.flatten(), scaling]).reshape(width, -1)
        packing = {"bits": bits, "group_size": 64}
        plain = mx.dequantize(words, scales.astype(F32), biases.astype(F32), group_size=64, bits=bits)
    mx.eval(x, residual, plain, mx.full((rows * width,), np.nan, dtype))
    normed = x.astype(F32)
    if norm is not None:
        normed = normed * mx.rsqrt(mx.mean(normed**2, axis=-1, keepdims=True) + norm.eps) * norm.gain.astype(F32)
    # In numpy: a GPU may multiply float32 in TF32.
    exact = np.array(plain.astype(F32)).T
    by_weight, by_norm = (mx.array(np.array(some) @ exact) for some in (x.astype(F32), normed))
    gate, up = mx.split(by_norm, 2, axis=-1)
    return {
        "norm": distance(fused_rows(x, weight, norm=norm, **packing), by_norm),
        "residual": distance(fused_rows(x, weight, residual=residual, **packing), by_weight + residual.astype(F32)),
        "gate": distance(fused_rows(x, weight, norm=norm, gated="silu", **packing), gate * mx.sigmoid(gate) * up),
        "gelu": distance(fused_rows(x, weight, norm=norm, gated="gelu", **packing), nn.gelu_approx(gate) * up),
    }


def check_layers(
    bits: int, kind: DeviceKind, kernels: AttentionKernels = GPU_KERNELS, config: dict[str, Any] = QWEN3_4B,
    numbers: Sequence[int] = ROWS,
) -> list[str]:  # fmt: skip
    """Layers of Qwen3-4B's shape: chosen, off by how much, in how many launches, and how fast."""
    mx.random.seed(0)
    model: Any = qwen3.Model(qwen3.ModelArgs.from_dict(config))
    model.set_dtype(BF16)
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    mx.eval(model.parameters())
    before, started = mx.get_active_memory(), time.perf_counter()
    blocks = FusedBlocks(model, kind, kernels, BLOCK_SIZE)
    blocks.choose()
    gc.collect()
    mx.clear_cache()
    grown = (mx.get_active_memory() - before) / 1e6
    say(f"     {blocks.note} (chosen in {time.perf_counter() - started:.1f} s, memory grew by {grown:.1f} MB)")
    failed = list(blocks.problems) + (["a second copy of the weights"] if grown > 20 else [])
    layer = model.model.layers[0]
    block = FusedBlock.of(layer, "all" if kind == "cuda" else "none")
    errors(layer, block, BlockTrial(layer, kernels, BLOCK_SIZE), numbers)
    modules = attention_patch.install(model)
    try:
        speed(model.model.layers, blocks, kernels, numbers)
    finally:
        attention_patch.remove(modules)
    return failed


def errors(layer: Any, block: FusedBlock, trial: BlockTrial, numbers: Sequence[int]) -> None:
    """How far mlx-lm's own block and the fused one are from float32."""
    exact = in_dtype(layer, mx.float32)
    for rows in numbers:
        x, context = trial.inputs(rows)
        wide = x.astype(F32)
        wanted, _ = trial.own(exact, wide, context.astype(F32))
        own, found = trial.own(layer, x, context)[0], trial.fused(block, x, context)[0].plain.reshape(x.shape)
        own_error, error = (distance(some.astype(F32) - wide, wanted - wide) for some in (own, found))
        say(f"     {rows} rows: mlx-lm's block is off by {own_error:.2e}, the fused one by {error:.2e}")


def speed(layers: list[Any], blocks: FusedBlocks, kernels: AttentionKernels, numbers: Sequence[int]) -> None:
    """Launches and microseconds of a layer in a compiled step of all, mlx-lm's blocks and fused."""
    by_hand = SwappedModules()
    for rows in numbers:
        step, inputs = step_of(layers, kernels, rows)
        cells = []
        ways = {"mlx-lm": blocks.remove, "fused": blocks.install}
        if rows in SPLIT and "scales" not in layers[0].self_attn.q_proj:
            ways["fused, MLX's products"] = lambda: install_mlx_products(layers, by_hand)
        for name, prepare in ways.items():
            prepare()
            nodes = launches(step(*inputs))
            number = sum(nodes.values()) / len(layers)
            compiled = mx.compile(step)
            seconds = min(seconds_of(compiled, inputs) for _ in range(3)) / len(layers)
            cells.append(f"{name} {number:.1f} launches, {seconds * 1e6:.1f} us")
            blocks.remove()
            by_hand.undo()
        say(f"     {rows} rows of {TOKENS} tokens, a layer: {'; '.join(cells)}")


def install_mlx_products(layers: list[Any], fused: SwappedModules) -> None:
    """Have layers use MLX's products alone where some split K."""
    swap_layers(fused, layers, [FusedBlock.of(layer, "few") for layer in layers])


def step_of(layers: list[Any], kernels: AttentionKernels, rows: int) -> tuple[Callable[..., mx.array], list[Any]]:
    """All layers over one new token of each of ``rows`` sequences, and what to call that with."""
    attention = layers[0].self_attn
    kv_heads, dim = attention.n_kv_heads, attention.q_norm.weight.shape[0]
    pool = KVPool([LayerShape(kv_heads, dim, dim, BF16)] * len(layers), BLOCK_SIZE)
    caches = [KernelLayerCache(pool, number, None, kernels) for number in range(len(layers))]
    width = TOKENS // BLOCK_SIZE
    pages = [
        [mx.random.normal((1, kv_heads, rows * TOKENS, dim)).astype(BF16) for _ in range(2)] for _ in range(len(layers))
    ]
    tables = mx.random.permutation(rows * width).astype(mx.int32).reshape(rows, width)
    positions = mx.array(padded_positions(np.full(rows, TOKENS - 1, np.int32), rows))
    x = mx.random.normal((rows, 1, layers[0].input_layernorm.weight.shape[0])).astype(BF16)
    mx.eval(pages, tables, positions, x)

    def step(x: mx.array, positions: mx.array, tables: mx.array, pages: list[Any]) -> mx.array:
        call = DecodeRows.of(rows, positions, tables)
        for layer, cache, some in zip(layers, caches, pages, strict=True):
            cache.begin(call, tuple(some))
            x = layer(x, None, cache)
            cache.finish()
        return x

    return step, [x, positions, tables, pages]


def launches(output: mx.array) -> Counter[str]:
    """Operations of a graph that was not evaluated, by name, without those that only look at memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), output)
        names = re.findall(r'label ?= ?"(\w+)", shape=rectangle', path.read_text())
    return Counter(name for name in names if name not in VIEWS)


def seconds_of(step: Callable[..., mx.array], inputs: list[Any]) -> float:
    """Seconds of one call, of several that follow each other, submitted one ahead."""
    x, *others = inputs
    for _ in range(3):
        mx.eval(step(x, *others))
    mx.synchronize()
    started, before = time.perf_counter(), x
    for _ in range(REPEATS):
        result = step(mx.where(before == 0, x, x), *others)
        mx.async_eval(result)  # type: ignore[no-untyped-call]
        mx.eval(before)
        before = result
    mx.synchronize()
    return (time.perf_counter() - started) / REPEATS


if __name__ == "__main__":
    sys.exit(main())
