"""``python3 -m tests.few_rows_on_device``: products of few rows on this machine's CUDA device, right and how fast.

Needs mlx, mlx-lm and numpy alone, and takes about a minute, of which MLX compiles kernels for half. Ends with 1 if a
result is wrong.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import qwen3

from engine.runner.kernels import rows_matmul
from engine.runner.kernels.few_rows import FewRowProducts, candidates_for
from engine.runner.kernels.product_choice import Choices, chain_seconds, modules_of_chain
from engine.runner.kernels.products import Plain, Product, Way, single_products, some_rows
from engine.runner.kernels.rows_matmul import Packed

QWEN3_4B: dict[str, Any] = {
    "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6, "vocab_size": 151936, "rope_theta": 1e6,
    "max_position_embeddings": 40960, "tie_word_embeddings": True,
}  # fmt: skip
NUM_LAYERS = 12
"""Enough that the weights of one product in all layers do not fit a cache."""
LIMIT = {mx.bfloat16: 4e-3, mx.float16: 6e-4}
FIRST: list[tuple[mx.Dtype, int, int, tuple[int, ...], tuple[int, ...], int]] = [
    (mx.bfloat16, 0, 0, (1, 3, 8, 16, 31), (1024,), 2560),
    (mx.bfloat16, 0, 0, (1, 3, 8, 16, 31), (33,), 576),
    (mx.bfloat16, 0, 0, (1, 7, 13, 29), (4096, 1024, 1024), 2560),
    (mx.bfloat16, 0, 0, (2,), (9728, 9728), 2560),
    (mx.bfloat16, 4, 64, (1, 3, 8, 16, 31), (1024,), 2560),
    (mx.bfloat16, 4, 64, (1, 3, 8, 16, 31), (33,), 640),
    (mx.bfloat16, 4, 64, (1, 7, 13, 29), (4096, 1024, 1024), 2560),
    (mx.bfloat16, 4, 64, (1, 7, 13, 29), (8192, 4096, 32, 32), 2048),
]
"""Element type, bits (0: not packed), group size, numbers of rows, widths and K."""
OTHERS: list[tuple[mx.Dtype, int, int, tuple[int, ...], tuple[int, ...], int]] = [
    (mx.bfloat16, 8, 64, (3,), (200, 64), 704),
    (mx.float16, 0, 0, (5,), (200,), 1088),
    (mx.float16, 4, 64, (3,), (200,), 640),
    (mx.bfloat16, 4, 32, (3,), (200,), 640),
]
"""The same, each with a kernel of its own: tried last, and only while there is time."""
TIME_FOR_OTHERS = 60.0
ROWS = (1, 8, 16, 32, 64)

_started = time.perf_counter()
_wrong: list[str] = []


def say(text: str) -> None:
    print(f"[{time.perf_counter() - _started:5.1f}] {text}", flush=True)


def normal(*shape: int, dtype: mx.Dtype) -> mx.array:
    return mx.random.normal(shape).astype(dtype)


def in_float32(array: mx.array) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array(array.astype(mx.float32))


def compare(name: str, results: Sequence[mx.array], x: mx.array, weights: Sequence[mx.array]) -> None:
    """Say how far ``results`` are from float32."""
    worst = 0.0
    for result, weight in zip(results, weights, strict=True):
        expected = in_float32(x) @ in_float32(weight).T
        found = in_float32(result)
        error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
        worst = max(worst, error) if error == error and found.shape == expected.shape else float("inf")
    right = worst < LIMIT[x.dtype]
    say(f"{'ok   ' if right else 'WRONG'} {name}: differs by {worst:.1e}")
    if not right:
        _wrong.append(name)


def poison(rows: int, widths: Sequence[int], dtype: mx.Dtype) -> None:
    """Leave NaN where the results may come to lie."""
    mx.eval([mx.full((rows * sum(widths),), float("nan"), dtype=dtype) for _ in range(3)])


def try_case(
    dtype: mx.Dtype, bits: int, group_size: int, numbers: Sequence[int], widths: Sequence[int], k: int
) -> None:
    """Multiply random weights by some numbers of rows."""
    weights = [normal(width, k, dtype=dtype) for width in widths]
    packed = [Packed(*mx.quantize(weight, group_size=group_size, bits=bits)) for weight in weights] if bits else []
    exact = [_unpacked(some, bits, group_size) for some in packed] or weights
    for rows in numbers:
        x = normal(rows, k, dtype=dtype)
        mx.eval(x, exact, [list(some) for some in packed])
        poison(rows, widths, dtype)
        started = time.perf_counter()
        results = (
            rows_matmul.quantized(x, packed, bits=bits, group_size=group_size)
            if bits
            else rows_matmul.dense(x, weights)
        )
        mx.eval(results)
        took = time.perf_counter() - started
        kind = f"{bits}-bit in groups of {group_size}, " if bits else ""
        compiled = f" (compiled in {took:.1f} s)" if took > 0.3 else ""
        name = f"{str(dtype).rpartition('.')[2]} {kind}{rows} rows by {widths} x {k}{compiled}"
        compare(name, results, x, exact)


def _unpacked(packed: Packed, bits: int, group_size: int) -> mx.array:
    words, scales, biases = packed
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    result: mx.array = mx.dequantize(words, scales, biases, group_size=group_size, bits=bits)
    return result


def try_others() -> None:
    for case in OTHERS:
        if time.perf_counter() - _started > TIME_FOR_OTHERS:
            say(f"not tried: {case}")
        else:
            try_case(*case)


def table(model: nn.Module) -> None:
    """Microseconds of a product, each way, by rows; a small operation that orders them is part of each."""
    uses: dict[Product, list[Any]] = {}
    for product, modules in single_products(model):
        uses.setdefault(product, []).append(modules)
    say(f"us a product at {', '.join(map(str, ROWS))} rows, with the one addition that orders them")
    for product, group in uses.items():
        chain = modules_of_chain(group)
        ways: list[Way] = [Plain(), *candidates_for("cuda")]
        for way in ways:
            cells = [_cell(way, product, chain, rows) for rows in ROWS]
            if set(cells) != {"-"}:
                say(f"  {product!s:26} {way.name:10} {''.join(f'{cell:>9}' for cell in cells)}")


def _cell(way: Any, product: Product, chain: Sequence[Any], rows: int) -> str:
    if hasattr(way, "takes") and not way.takes(product, rows):
        return "-"
    return f"{chain_seconds(way.compute, chain, some_rows(product, rows), float('inf')) * 1e6:.1f}"


def choosing(model: nn.Module) -> tuple[FewRowProducts, Choices]:
    products = FewRowProducts(model, "cuda")
    choices = products.choose()
    say(f"{choices.note} (checks and compiling {choices.check_seconds:.2f} s, measuring {choices.seconds:.2f} s)")
    for entry in choices.as_data():
        say(f"  {entry['weights']}, {entry['uses']} times; us, the chosen way first")
        for number, values in entry["rows"].items():
            times, first = values["microseconds"], values["chosen"]
            said = [
                f"{name} {times[name]:.1f}" for name in sorted(times, key=lambda name: (name != first, times[name]))
            ]
            say(f"    {number:3} rows: {', '.join(said)}")
    _wrong.extend(choices.problems)
    return products, choices


def whole_layers(model: Any, products: FewRowProducts, choices: Choices) -> None:
    """A layer of the model, compiled, with one token a row and no cache: MLX's products, own, and siblings joined."""
    apart = Choices(singles=choices.singles)
    for rows in (1, 8, 16, 32, 64):
        tokens = mx.arange(rows)[:, None]
        cells, expected = [], None
        for name, installed in (("mlx", Choices()), ("own", apart), ("own, siblings joined", choices)):
            products.install(installed)
            seconds = min(step_seconds(model, tokens) for _ in range(3)) / NUM_LAYERS
            hidden = in_float32(model.model(tokens))
            expected = hidden if expected is None else expected
            error = np.linalg.norm(hidden - expected) / np.linalg.norm(expected)
            cells.append(f"{name} {seconds * 1e6:.1f} (differs by {error:.1e})")
            if not error < 0.1:
                _wrong.append(f"layers with {rows} rows, {name}")
        products.remove()
        say(f"  us a layer at {rows} rows: {', '.join(cells)}")


def step_seconds(model: Any, tokens: mx.array, repeats: int = 20) -> float:
    """Seconds of one compiled pass of the layers, submitted one ahead as in decode."""
    step = mx.compile(lambda tokens: model.model(tokens))
    mx.eval(step(tokens))
    mx.eval(step(tokens))
    mx.synchronize()
    started = time.perf_counter()
    before = None
    for _ in range(repeats):
        result = step(tokens)
        mx.async_eval(result)  # type: ignore[no-untyped-call]
        if before is not None:
            mx.eval(before)
        before = result
    mx.synchronize()
    return (time.perf_counter() - started) / repeats


def time_model(bits: int) -> None:
    """Choose for a model of Qwen3-4B's shapes, and time its layers and products."""
    mx.random.seed(0)
    model = qwen3.Model(qwen3.ModelArgs.from_dict({**QWEN3_4B, "num_hidden_layers": NUM_LAYERS}))
    model.set_dtype(mx.bfloat16)
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    mx.eval(model.parameters())
    say(f"Qwen3-4B's shapes, {NUM_LAYERS} layers, {f'{bits}-bit' if bits else 'bfloat16'}, random weights")
    products, choices = choosing(model)
    whole_layers(model, products, choices)
    table(model)
    mx.clear_cache()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.few_rows_on_device", description=__doc__)
    parser.add_argument("--only-right", action="store_true", help="correctness, without timings")
    options = parser.parse_args(arguments)
    if not mx.cuda.is_available():
        print("needs a CUDA device")
        return 1
    say(f"{mx.device_info().get('device_name')}, MLX {version('mlx')}")
    for case in FIRST:
        try_case(*case)
    for bits in () if options.only_right else (0, 4):
        time_model(bits)
    try_others()
    say(f"{len(_wrong)} wrong" + "".join(f"\n  {line}" for line in _wrong))
    return 1 if _wrong else 0


if __name__ == "__main__":
    sys.exit(main())
