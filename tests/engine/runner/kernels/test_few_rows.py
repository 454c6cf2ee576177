"""Products of few rows: which way is chosen, and what a swap does to a model and undoes."""

import shutil
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from engine.runner.kernels import products, rows_matmul
from engine.runner.kernels.cuda_source import KernelText
from engine.runner.kernels.few_rows import FewRowProducts, candidates_for
from engine.runner.kernels.kernel_cache import CachedKernel, collecting
from engine.runner.kernels.product_choice import Choices, Compute, Timer, chain_seconds, choose
from engine.runner.kernels.products import (
    Candidate,
    Flattened,
    Modules,
    OwnKernels,
    Plain,
    Product,
    Unpacked,
    sibling_products,
    single_products,
)
from tests.engine.parity.tiny_architectures import VOCAB, tiny_model
from tests.engine.runner.kernels.cuda_on_host import HostKernel

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3_next", "qwen3_5", "gemma3_text", "gemma3n", "gemma4_text")


class Unpacking:
    """A candidate that is right: it multiplies by unpacked weights. Keeps what it was asked for."""

    name = "own"

    def starts_slowly(self, _product: Product, /) -> bool:
        return False

    def __init__(self, factor: float = 1.0, max_rows: int = 16) -> None:
        self._factor, self._max_rows = factor, max_rows
        self.calls: list[tuple[int, int]] = []
        """Number of modules and of rows of every call."""

    def takes(self, product: Product, num_rows: int) -> bool:
        return num_rows <= self._max_rows

    def compute(self, modules: Modules, x: mx.array) -> list[mx.array]:
        self.calls.append((len(modules), x.size // x.shape[-1]))
        return [self._one(module, x) for module in modules]

    def _one(self, module: Any, x: mx.array) -> mx.array:
        weight = module["weight"]
        if "scales" in module:
            weight = mx.dequantize(weight, module.scales, module.biases, module.group_size, module.bits)
        result = x @ weight.T * self._factor
        return result + module["bias"] if "bias" in module else result


class Failing(Unpacking):
    name = "flattened"

    def starts_slowly(self, _product: Product, /) -> bool:
        return False

    def compute(self, modules: Modules, x: mx.array) -> list[mx.array]:
        raise RuntimeError("Failed to compile kernel:\n  expected a ';'")


def timer(**seconds: float) -> Timer:
    """Times by the names of the ways."""

    def measure(compute: Compute, chain: Sequence[Modules], x: mx.array, limit: float) -> float:
        return seconds[compute.__self__.name]  # type: ignore[attr-defined]

    return measure


FASTER = timer(mlx=1.0, own=0.5, apart=1.0)


def swapped(model: nn.Module, candidate: Candidate, measure: Timer = FASTER) -> tuple[FewRowProducts, Choices]:
    products = FewRowProducts(model, "cpu", candidates=[candidate])
    choices = choose(model, [candidate], timer=measure)
    products.install(choices)
    return products, choices


def logits(model: Any, num_rows: int = 3) -> mx.array:
    """Of ``num_rows`` tokens in one call without a cache."""
    result: mx.array = model(mx.arange(num_rows)[None] % VOCAB)
    return result


def distance(a: mx.array, b: mx.array) -> float:
    return float(mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max())


def projections(model: nn.Module) -> dict[str, mx.array]:
    """Weights of a model's layers by name."""
    return {path: value for path, value in tree_flatten(model.parameters()) if "_proj" in path}


def types_of(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_swap_computes_what_the_model_computed_and_is_undone_without_a_trace(name: str, bits: int) -> None:
    model = tiny_model(name)
    if bits:
        nn.quantize(model, group_size=32, bits=bits, class_predicate=_divides(32))
    before, types, weights = logits(model), types_of(model), projections(model)
    candidate = Unpacking()
    products, _ = swapped(model, candidate)
    candidate.calls.clear()
    assert distance(logits(model), before) < 1e-4
    assert distance(logits(model), before) < 1e-4
    assert {number for number, _ in candidate.calls} >= {1, 2}
    assert all(value is weights[path] for path, value in projections(model).items())
    assert types_of(model) != types
    products.remove()
    candidate.calls.clear()
    assert types_of(model) == types
    assert distance(logits(model), before) == 0
    assert not candidate.calls


def _divides(size: int) -> Callable[[str, nn.Module], bool]:
    def quantizes(path: str, module: nn.Module) -> bool:
        return type(module) in (nn.Linear, nn.Embedding) and module["weight"].shape[-1] % size == 0

    return quantizes


def test_more_rows_than_were_measured_go_mlx_s_way() -> None:
    model, candidate = tiny_model("qwen3"), Unpacking(max_rows=8)
    swapped(model, candidate)
    candidate.calls.clear()
    logits(model, 9)
    assert not candidate.calls
    logits(model, 7)
    assert {rows for _, rows in candidate.calls} == {7}


def test_rows_of_another_type_go_mlx_s_way() -> None:
    model, candidate = tiny_model("qwen3"), Unpacking()
    swapped(model, candidate)
    candidate.calls.clear()
    layer = model.layers[0].mlp
    assert layer.down_proj(mx.ones((1, 96), dtype=mx.float16)).shape == (1, 64)
    assert layer.down_proj(mx.ones((0, 96))).shape == (0, 64)
    assert not candidate.calls


def test_a_compiled_model_is_traced_with_the_swapped_products() -> None:
    model, candidate = tiny_model("qwen3"), Unpacking()
    before = logits(model)
    swapped(model, candidate)
    candidate.calls.clear()
    step = mx.compile(lambda tokens: model(tokens))
    for _ in range(2):
        assert distance(step(mx.arange(3)[None]), before) < 1e-4
    # Four layers of two families and two single products, and the head.
    assert sorted(number for number, _ in candidate.calls) == [1] * 9 + [2] * 4 + [3] * 4


def test_siblings_are_computed_in_one_go_and_nothing_is_held_afterwards() -> None:
    model, candidate = tiny_model("llama"), Unpacking()
    swapped(model, candidate)
    layer = model.layers[0]
    x = mx.ones((2, 1, 64))
    candidate.calls.clear()
    results = [layer.self_attn[name](x) for name in ("q_proj", "k_proj", "v_proj")]
    assert candidate.calls == [(3, 2)]
    for name, result in zip(("q_proj", "k_proj", "v_proj"), results, strict=True):
        assert distance(result, Plain().compute((layer.self_attn[name],), x)[0]) < 1e-5
    mx.eval(results)
    held = mx.get_active_memory()
    del x, results, result
    assert mx.get_active_memory() < held


def test_siblings_that_get_different_rows_are_computed_apart_from_then_on() -> None:
    model, candidate = tiny_model("llama"), Unpacking()
    swapped(model, candidate)
    attention = model.layers[0].self_attn
    for _ in range(2):
        candidate.calls.clear()
        x, y = mx.ones((1, 64)), mx.full((1, 64), 2.0)
        for name, rows in (("q_proj", x), ("k_proj", y), ("v_proj", y)):
            expected = Plain().compute((attention[name],), rows)[0]
            assert distance(attention[name](rows), expected) < 1e-5
    assert candidate.calls == [(1, 1)] * 3


class DeltaNet(nn.Module):
    """Projections of a gated delta net, as Qwen3.5's are named."""

    NAMES = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        for name, width in zip(self.NAMES, widths, strict=True):
            self[name] = nn.Linear(128, width, bias=False)

    def __call__(self, x: mx.array) -> list[mx.array]:
        return [self[name](x) for name in self.NAMES]


def families(model: nn.Module, skip: Sequence[int] = ()) -> list[tuple[int, ...]]:
    """Widths of the siblings in each."""
    return [product.widths for product, _ in sibling_products(model, skip)]


@pytest.mark.parametrize(
    ("widths", "packed", "expected"),
    [
        ((96, 64, 32, 32), (), [(96, 64, 32, 32)]),
        ((96, 64, 32, 32), DeltaNet.NAMES, [(96, 64, 32, 32)]),
        ((96, 64, 32, 32), DeltaNet.NAMES[:2], [(96, 64), (32, 32)]),
        ((96, 64, 32, 32), DeltaNet.NAMES[:1], [(32, 32)]),
        # Results of 4 columns in front of others would leave those where 16 bytes cannot be read at once.
        ((96, 64, 4, 4), (), [(96, 64)]),
    ],
)
def test_a_delta_net_s_projections_are_one_family_or_pairs_of_one_kind(
    widths: tuple[int, ...], packed: Sequence[str], expected: list[tuple[int, ...]]
) -> None:
    model = DeltaNet(widths)
    if packed:
        nn.quantize(model, group_size=64, bits=4, class_predicate=lambda path, _: path in packed)
    assert families(model) == expected
    joined = [id(module) for _, modules in sibling_products(model) for module in modules]
    assert len(set(joined)) == len(joined)


def test_siblings_that_are_left_alone_are_in_no_family() -> None:
    model = DeltaNet((96, 64, 32, 32))
    assert families(model, [id(model.in_proj_qkv)]) == [(64, 32, 32)]
    assert families(model, [id(model[name]) for name in DeltaNet.NAMES[1:]]) == []


def test_four_siblings_are_computed_in_one_go_and_apart_for_rows_where_that_is_faster() -> None:
    model, candidate = DeltaNet((96, 64, 32, 32)), Unpacking()
    exact = [model(mx.full((rows, 128), 0.5)) for rows in (1, 9, 17)]

    def measure(compute: Compute, chain: Sequence[Modules], x: mx.array, limit: float) -> float:
        own, few = compute.__self__.name == "own", x.shape[0] <= 8  # type: ignore[attr-defined]
        return 0.5 if own and (few or len(chain[0]) == 1) else 0.7

    swapped(model, candidate, measure)
    for rows, calls, expected in zip((1, 9, 17), ([(4, 1)], [(1, 9)] * 4, []), exact, strict=True):
        candidate.calls.clear()
        results = model(mx.full((rows, 128), 0.5))
        assert candidate.calls == calls
        assert max(map(distance, results, expected)) < 1e-4


@needs_compiler
@pytest.mark.parametrize("bits", [0, 4])
def test_the_kernels_compute_four_siblings_in_one_launch(bits: int, host_products: dict[str, HostKernel]) -> None:
    mx.random.seed(3)
    model = DeltaNet((96, 64, 32, 32))
    model.set_dtype(mx.bfloat16)
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    x = mx.random.normal((3, 1, 128), key=mx.random.key(1)).astype(mx.bfloat16)
    # In float32: in bfloat16 MLX's own product of packed weights is off by more than the kernel on a CPU.
    model.set_dtype(mx.float32)
    exact = model(x.astype(mx.float32))
    model.set_dtype(mx.bfloat16)
    choices = choose(model, [OwnKernels()], timer=FASTER)
    assert choices.problems == ()
    FewRowProducts(model, "cuda").install(choices)
    kind = "rows_quantized" if bits else "rows_dense"
    before = {name: kernel.launches for name, kernel in host_products.items()}
    results = model(x)
    assert {name: kernel.launches - before[name] for name, kernel in host_products.items()} == {kind: 0, f"{kind}_4": 1}
    for result, expected in zip(results, exact, strict=True):
        assert distance(result, expected) < 0.05


def test_siblings_are_left_apart_where_one_launch_is_not_faster() -> None:
    model, candidate = tiny_model("llama"), Unpacking()
    _, choices = swapped(model, candidate, timer(mlx=1.0, own=0.5, apart=0.51))
    assert [choice.chosen for choice in choices.siblings] == [{}, {}]
    candidate.calls.clear()
    logits(model)
    assert {number for number, _ in candidate.calls} == {1}


@pytest.mark.parametrize(("own", "chosen"), [(0.98, []), (0.96, [1, 2, 4, 8, 16])])
def test_another_way_must_be_faster_by_three_percent(own: float, chosen: list[int]) -> None:
    choices = choose(tiny_model("llama"), [Unpacking()], timer=timer(mlx=1.0, own=own, apart=1.0))
    assert {tuple(choice.chosen) for choice in choices.singles} == {tuple(chosen)}
    said = "own kernels for 5 of 5 shapes up to 16 rows" if chosen else "MLX's own are the fastest here"
    assert choices.note is not None
    assert said in choices.note


def test_the_fastest_of_several_right_ways_is_chosen() -> None:
    slower = Unpacking()
    slower.name = "flattened"
    choices = choose(
        tiny_model("llama"), [slower, Unpacking()], timer=timer(mlx=1.0, own=0.5, flattened=0.7, apart=0.1)
    )
    assert {way.name for choice in choices.singles for way in choice.chosen.values()} == {"own"}
    data = choices.as_data()[0]
    assert data["rows"][8] == {"microseconds": {"flattened": 7e5, "own": 5e5, "mlx": 1e6}, "chosen": "own"}


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_a_way_that_gives_wrong_results_is_never_chosen_and_said_once(factor: float) -> None:
    choices = choose(tiny_model("llama"), [Unpacking(factor)], timer=FASTER)
    assert not any(choice.chosen for choice in (*choices.singles, *choices.siblings))
    assert len(choices.problems) == 1
    assert choices.problems[0].startswith("own products of float32 96 x 64 differ by")
    assert choices.note is not None
    assert choices.problems[0] in choices.note


def test_a_way_that_does_not_compile_is_tried_once_and_the_others_stay() -> None:
    choices = choose(tiny_model("llama"), [Failing(), Unpacking()], timer=FASTER)
    assert all(way.name == "own" for choice in choices.singles for way in choice.chosen.values())
    assert choices.problems == (
        "flattened products of float32 96 x 64 failed (Failed to compile kernel: expected a ';'), so they are not used",
    )


def test_progress_counts_every_product_twice() -> None:
    told: list[tuple[int, int]] = []
    choose(tiny_model("llama"), [Unpacking()], timer=FASTER, progress=lambda *numbers: told.append(numbers))
    assert told == [(done, 14) for done in range(1, 15)]


def test_a_cpu_has_nothing_to_choose() -> None:
    model = tiny_model("llama")
    types = types_of(model)
    products = FewRowProducts(model, "cpu")
    assert products.choose() == Choices()
    products.install()
    assert products.choices.note is None
    assert types_of(model) == types


def test_a_gpu_has_mlx_s_rows_rearranged_and_on_cuda_kernels_too() -> None:
    assert [way.name for way in candidates_for("metal")] == ["flattened"]
    assert [way.name for way in candidates_for("cuda")] == ["own", "flattened", "unpacked"]


@pytest.mark.parametrize(
    ("way", "num_rows", "said"),
    [
        (Flattened(), 5, "rearranged rows for 6 of 6 shapes up to 128 rows"),
        (Flattened(max_rows=8), 5, "rearranged rows for 6 of 6 shapes up to 8 rows"),
        (Unpacked(), 40, "unpacked weights for 6 of 6 shapes up to 128 rows"),
    ],
)
def test_mlx_s_products_in_other_forms_give_what_mlx_gives(way: Candidate, num_rows: int, said: str) -> None:
    model = tiny_model("qwen2")
    nn.quantize(model, group_size=32, bits=4, class_predicate=_divides(32))
    before = logits(model, num_rows)
    choices = choose(model, [way], timer=timer(**{"mlx": 1.0, way.name: 0.5}))
    FewRowProducts(model, "cuda").install(choices)
    after = logits(model, num_rows)
    assert distance(after, before) < 1e-4
    assert not choices.siblings
    assert choices.note == f"products of few rows: {said}"


def test_a_way_may_round_as_much_as_mlx_s_own() -> None:
    layer = nn.Sequential(nn.Linear(512, 128, bias=False))
    layer.set_dtype(mx.bfloat16)
    nn.quantize(layer, group_size=64, bits=4)
    (flattened,) = candidates_for("metal")
    # MLX's own product of packed weights on a CPU adds in bfloat16: it differs from float32 by more than a percent.
    assert choose(layer, [flattened], timer=timer(mlx=1.0, flattened=0.5)).problems == ()


def test_a_table_of_tokens_is_a_product_only_without_a_head() -> None:
    model = tiny_model("llama")
    assert any(product.kind == "Embedding" for product, _ in single_products(model))
    model.lm_head = nn.Linear(64, VOCAB, bias=False)
    assert not any(product.kind == "Embedding" for product, _ in single_products(model))


def test_a_chain_of_products_is_timed_and_given_up_when_slow() -> None:
    model, plain = tiny_model("llama"), Plain()
    modules = [modules for product, modules in single_products(model) if product.widths == (96,)]
    calls = []

    def compute(modules: Modules, x: mx.array) -> list[mx.array]:
        calls.append(x.shape)
        return plain.compute(modules, x)

    assert 0 < chain_seconds(compute, modules, mx.ones((2, 1, 64)), 1.0) < 1.0
    assert calls == [(2, 1, 64)] * len(modules)
    assert chain_seconds(compute, modules, mx.ones((2, 1, 64)), 0.0) > 0


@pytest.mark.parametrize("bits", [0, 4])
def test_a_model_of_one_kind_of_weights_needs_few_kernels_and_says_which_without_its_weights(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, CachedKernel] = {}

    def make(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str, header: str) -> CachedKernel:
        return made.setdefault(
            name, CachedKernel(KernelText(name, inputs, outputs, source, header), compiles_nothing, compiles_nothing)
        )

    def compiles_nothing(*_: Any) -> Any:
        raise AssertionError("nothing is compiled while kernels are collected")

    monkeypatch.setattr(rows_matmul, "make_kernel", make)
    model = nn.Sequential(*(nn.Linear(*sizes) for sizes in ((256, 512), (512, 40), (128, 24000))))
    model.set_dtype(mx.bfloat16)
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    with collecting() as awaited:
        FewRowProducts(model, "cuda").launch_kernels()
    # For up to 8, 16 and 32 rows.
    assert len(set(awaited)) == 3


@needs_compiler
@pytest.mark.parametrize("bits", [0, 4])
def test_a_model_computes_with_the_kernels_what_it_computed_without(
    bits: int, host_products: dict[str, HostKernel]
) -> None:
    model = tiny_model("qwen3")
    mx.random.seed(0)
    for layer in model.layers:
        # The kernels want K in multiples of 64, or of 128 for 4 bits.
        layer.mlp.gate_proj, layer.mlp.up_proj = (nn.Linear(64, 128, bias=False) for _ in range(2))
        layer.mlp.down_proj = nn.Linear(128, 64, bias=False)
    model.set_dtype(mx.bfloat16)
    if bits:
        nn.quantize(model, group_size=64, bits=bits, class_predicate=_divides(128))
    before = logits(model)
    choices = choose(model, [OwnKernels()], timer=FASTER)
    assert choices.problems == ()
    products = FewRowProducts(model, "cuda")
    products.install(choices)
    after, exact = logits(model).astype(mx.float32), before.astype(mx.float32)
    assert mx.linalg.norm(after - exact) < 0.02 * mx.linalg.norm(exact)
    dense = {"rows_dense", "rows_dense_2", "rows_dense_3"}
    assert set(host_products) == (dense | {"rows_quantized"} if bits else dense)
    products.remove()
    assert distance(logits(model), before) == 0


def test_a_way_that_starts_slowly_is_neither_checked_nor_timed_where_another_takes_the_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On CUDA MLX compiles for a minute what it multiplies packed weights by: other ways are known to be faster."""
    monkeypatch.setattr(products, "mlx_starts_slowly", lambda product: product.bits > 0)
    model = tiny_model("llama")
    nn.quantize(model, group_size=32, bits=4, class_predicate=_divides(32))
    timed: list[str] = []

    def measure(compute: Compute, chain: Sequence[Modules], x: mx.array, limit: float) -> float:
        timed.append(compute.__self__.name)  # type: ignore[attr-defined]
        return 1.0

    choices = choose(model, [Unpacking(max_rows=128), Flattened()], siblings=False, timer=measure)
    assert set(timed) == {"own"}
    assert all(way.name == "own" for choice in choices.singles for way in choice.chosen.values())
    timed.clear()
    choose(model, [Unpacking(max_rows=8), Flattened()], siblings=False, timer=measure)
    assert set(timed) == {"own"}
    timed.clear()
    choose(model, [Unpacking(max_rows=0), Flattened()], siblings=False, timer=measure)
    assert "flattened" in timed


def test_weights_too_large_to_unpack_are_multiplied_by_32_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_MOST_UNPACKED", 0)
    module = nn.QuantizedLinear.from_linear(nn.Linear(128, 48, bias=False), group_size=64, bits=4)
    module.set_dtype(mx.bfloat16)
    ((product, modules),) = single_products(module)
    own = OwnKernels()
    assert own.takes(product, 100)
    assert not Unpacked().takes(product, 100)
    pieces: list[int] = []

    def multiply(x: mx.array, packed: Sequence[Any], *, bits: int, group_size: int) -> list[mx.array]:
        pieces.append(x.shape[0])
        unpacked = [mx.dequantize(*some, group_size=group_size, bits=bits) for some in packed]
        return [x @ weight.T for weight in unpacked]

    monkeypatch.setattr(rows_matmul, "quantized", multiply)
    x = mx.random.normal((100, 1, 128)).astype(mx.bfloat16)
    (found,) = own.compute(modules, x)
    assert pieces == [32, 32, 32, 4]
    assert found.shape == (100, 1, 48)
    assert distance(found, module(x)) < 0.2  # of values up to 3, in bfloat16
