"""Gemma's MLPs in two launches, with kernels on this machine's CPU, against mlx-lm's; and what is refused."""

import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import gemma4_text

from engine.params.engine_args import EngineArgs
from engine.runner.device.devices import Device
from engine.runner.kernels import add_normed, few_rows, fused_rows, one_row, rows_matmul
from engine.runner.kernels.few_rows import FewRowProducts
from engine.runner.kernels.product_choice import Choice, Choices
from engine.runner.kernels.products import OwnKernels, sibling_products, single_products
from engine.runner.kv.gemma_mlps import GemmaMLPs
from engine.runner.kv.joined_weights import JoinedWeights
from engine.runner.kv.layer_trial import distance
from engine.runtime import builder
from tests.engine.parity.tiny_architectures import build, config_of
from tests.engine.runner.kernels.cuda_on_host import HostKernel, kernels_on_host

NAMES = ("gemma2", "gemma3_text", "gemma4_text", "gemma4_text moe")
KINDS = [(mx.bfloat16, 0), (mx.float16, 0), (mx.bfloat16, 4), (mx.float16, 8), (mx.bfloat16, 8)]
FEW_ROWS = {0: 16, 4: 32, 8: 32}
"""By bits: the most rows that the kernels take."""
LIMIT = {0: 5e-3, 4: 2e-2}
"""By bits: MLX's product of packed weights, that of the output, is less exact here."""
WIDTH = 128

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@pytest.fixture
def gpu_kernels(monkeypatch: pytest.MonkeyPatch, kernel_folder: Path) -> dict[str, HostKernel]:
    """CUDA's products of few rows, compiled for this machine, by name."""
    return kernels_on_host(monkeypatch, kernel_folder, fused_rows, one_row, rows_matmul)


def model_of(name: str = "gemma4_text dense", dtype: mx.Dtype = mx.bfloat16, bits: int = 0, **changes: Any) -> Any:
    model = build({**config_of(name), "hidden_size": WIDTH, "intermediate_size": 192, **changes})
    model.set_dtype(dtype)
    for layer in model.layers if bits else []:
        nn.quantize(layer.mlp, group_size=64, bits=bits)
    return model


def mlps_of(model: Any, device: Any = "cuda") -> GemmaMLPs:
    mlps = GemmaMLPs(model, device)
    mlps.choose()
    return mlps


def kernel_of(rows: int, bits: int) -> str:
    """That of gates and ups."""
    return "one_row_gelu" if (rows, bits) == (1, 4) else f"fused_rows_{'quantized' if bits else 'dense'}_gelu"


def all_of(model: Any) -> str:
    number = len(model.layers)
    return f"fused MLPs: {number} of {number} layers"


def rows_of(rows: int, dtype: mx.Dtype) -> mx.array:
    return mx.random.normal((rows, 1, WIDTH), key=mx.random.key(rows)).astype(dtype)


def by_gates(mlp: Any, x: mx.array) -> mx.array:
    """In float32, by the formula alone; of packed weights unpacked."""

    def multiplied(rows: mx.array, module: Any) -> mx.array:
        weight = module.weight
        if "scales" in module:
            scales, biases = module.scales.astype(mx.float32), module.biases.astype(mx.float32)
            weight = mx.dequantize(weight, scales, biases, group_size=module.group_size, bits=module.bits)
        return rows @ weight.astype(mx.float32).T

    gate, up = (np.array(multiplied(x.astype(mx.float32), one)) for one in (mlp.gate_proj, mlp.up_proj))
    gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    return multiplied(mx.array(gelu * up), mlp.down_proj)


@pytest.mark.parametrize("rows", [1, 5, 17, 40])
@pytest.mark.parametrize(("dtype", "bits"), KINDS)
def test_an_mlp_gives_what_mlx_lms_gives(
    rows: int, dtype: mx.Dtype, bits: int, gpu_kernels: dict[str, HostKernel]
) -> None:
    model, x = model_of(dtype=dtype, bits=bits), rows_of(rows, dtype)
    mlp = model.layers[1].mlp
    usual, right = mlp(x), by_gates(mlp, x)
    mlps = mlps_of(model)
    assert mlps.note == all_of(model)
    mlps.install()
    kernel = gpu_kernels[kernel_of(rows, bits)]
    launches = kernel.launches
    found = mlp(x)
    assert (found.shape, found.dtype) == (usual.shape, usual.dtype)
    assert kernel.launches - launches == (rows <= FEW_ROWS[bits])
    assert distance(found, right) <= 1.2 * distance(usual, right), "no further off than mlx-lm's own"
    assert rows <= FEW_ROWS[bits] or mx.array_equal(found, usual)
    mlps.remove()
    assert mx.array_equal(mlp(x), usual)
    assert kernel.launches - launches == (rows <= FEW_ROWS[bits])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [0, 4])
def test_all_mlps_of_gemma_2_3_and_4_are_fused(name: str, bits: int, gpu_kernels: dict[str, HostKernel]) -> None:
    """Also those beside experts."""
    model, x = model_of(name, bits=bits), rows_of(3, mx.bfloat16)
    mlps = mlps_of(model)
    assert mlps.note == all_of(model)
    mlps.install()
    kernel = gpu_kernels[kernel_of(3, bits)]
    launches = kernel.launches
    for layer in model.layers:
        assert distance(layer.mlp(x), by_gates(layer.mlp, x)) < LIMIT[bits]
    assert kernel.launches - launches == len(model.layers)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "gemma4_text"])
def test_a_models_layers_call_them(name: str, gpu_kernels: dict[str, HostKernel]) -> None:
    model, tokens = model_of(name), mx.array([[3], [5], [7]])
    usual = model(tokens)
    mlps = mlps_of(model)
    mlps.install()
    (kernel,) = gpu_kernels.values()
    launches = kernel.launches
    assert distance(model(tokens), usual) < 3e-2
    assert kernel.launches - launches == len(model.layers)
    mlps.remove()
    assert mx.array_equal(model(tokens), usual)


@pytest.mark.parametrize("bits", [0, 4])
def test_weights_are_slices_of_joined_ones_with_the_same_values(bits: int, gpu_kernels: dict[str, HostKernel]) -> None:
    model = model_of(bits=bits)
    before = [(name, np.array(value.astype(mx.float32))) for name, value in tree_flatten(model.parameters())]
    used = mx.get_active_memory()
    mlps = mlps_of(model)
    mx.clear_cache()
    assert mx.get_active_memory() - used < 20_000, "a second copy of the weights"
    gates = {id(one) for layer in model.layers for one in (layer.mlp.gate_proj, layer.mlp.up_proj)}
    assert mlps.products == (set() if bits else gates), "packed ones are multiplied otherwise for more rows"
    after = dict(tree_flatten(model.parameters()))
    for name, value in before:
        assert np.array_equal(np.array(after[name].astype(mx.float32)), value), name


@pytest.mark.parametrize("bits", [0, 4])
def test_products_of_few_rows_are_swapped_behind_mlps_and_both_are_undone(
    bits: int, gpu_kernels: dict[str, HostKernel]
) -> None:
    """The output's product is theirs, and gates and ups of packed weights for more rows than an MLP takes at once."""
    model = model_of(bits=bits)
    mlp, kinds = model.layers[0].mlp, [type(module) for _, module in model.named_modules()]
    mlps = mlps_of(model)
    mlps.install()
    own = Choices(
        tuple(Choice(product, 1, {1: OwnKernels()}, {}) for product, _ in single_products(model)),
        tuple(Choice(product, 1, {1: OwnKernels()}, {}) for product, _ in sibling_products(model)),
    )
    products = FewRowProducts(model, "cuda", skip=mlps.products)
    products.install(own)
    x = rows_of(1, mx.bfloat16)
    launches = {name: kernel.launches for name, kernel in gpu_kernels.items()}
    right = by_gates(mlp, x)
    assert distance(mlp(x), right) < 1e-2
    launched = {name: kernel.launches - launches.get(name, 0) for name, kernel in gpu_kernels.items()}
    launched = {name: number for name, number in launched.items() if number}
    assert launched == {kernel_of(1, bits): 1, f"rows_{'quantized' if bits else 'dense'}": 1}
    products.remove()
    mlps.remove()
    mlps.remove()
    assert [type(module) for _, module in model.named_modules()] == kinds


def test_rows_of_another_type_and_what_kernels_do_not_take_go_mlx_lms_way(gpu_kernels: dict[str, HostKernel]) -> None:
    model = model_of()
    mlps = mlps_of(model)
    mlps.install()
    (kernel,) = gpu_kernels.values()
    launches = kernel.launches
    mlp, wide = model.layers[0].mlp, rows_of(3, mx.float32)
    assert mx.array_equal(mlp(wide), gemma4_text.MLP.__call__(mlp, wide))
    assert kernel.launches == launches
    assert mlps_of(model_of(dtype=mx.float32)).note == (
        "fused MLPs: 0 of 4 layers; mlx-lm's own way: weights that no kernel for few rows takes"
    )
    mixed = model_of()
    for layer in mixed.layers:
        layer.mlp.up_proj = layer.mlp.up_proj.to_quantized(group_size=64, bits=8)
    assert mlps_of(mixed).note == "fused MLPs: 0 of 4 layers; mlx-lm's own way: weights packed in several ways"


def test_only_gemmas_mlps_on_cuda_are_looked_at() -> None:
    assert mlps_of(model_of(), "metal").note is None
    assert mlps_of(model_of(), "cpu").note is None
    assert mlps_of(build(config_of("gemma3n"))).note is None
    assert mlps_of(build(config_of("qwen3"))).note is None


@pytest.mark.parametrize("bits", [0, 4])
def test_a_kernel_that_computes_wrongly_is_not_installed(
    bits: int, gpu_kernels: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the other gate's."""
    few = JoinedWeights.few
    monkeypatch.setattr(JoinedWeights, "few", lambda self, x, gated: few(self, x, gated=gated and "silu"))
    model = model_of(bits=bits)
    mlps = mlps_of(model)
    note = str(mlps.note)
    assert note.startswith("fused MLPs: 0 of 4 layers; mlx-lm's own way: its result differs by ")
    assert note.endswith(f"at {1 if bits else 3} rows")
    kinds = [type(module) for _, module in model.named_modules()]
    mlps.install()
    assert [type(module) for _, module in model.named_modules()] == kinds
    assert mlps.products == set()


def test_a_kernel_that_cannot_be_launched_leaves_mlx_lms_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_given: Any, **_how: Any) -> mx.array:
        raise RuntimeError("no such image")

    monkeypatch.setattr("engine.runner.kv.joined_weights.fused_rows", broken)
    model = model_of()
    assert mlps_of(model).note == "fused MLPs: 0 of 4 layers; mlx-lm's own way: RuntimeError: no such image"


@pytest.mark.parametrize("bits", [0, 4])
def test_a_load_fuses_them_before_products_and_layers_are_looked_at(
    bits: int, gpu_kernels: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch, kernel_folder: Path
) -> None:
    """A layer's sums and norms call what stands in the MLP's place, and all is undone together."""
    made = kernels_on_host(monkeypatch, kernel_folder, add_normed)
    monkeypatch.setattr(builder, "kernels_available", lambda: True)
    monkeypatch.setattr(few_rows, "candidates_for", lambda _kind: ())  # kernels of a host are not compiled into a chain
    model, tokens = model_of(bits=bits), mx.array([[3], [5], [7]])
    usual, kinds = model(tokens), [type(module) for _, module in model.named_modules()]
    args = EngineArgs(model="tiny", use_paged_attention=False)
    with ExitStack() as undo:
        notes = builder._speed_up(model, args, Device("cuda", "none", 1 << 30), lambda *_progress: None, undo)
        assert all_of(model) in notes
        number = len(model.layers)
        assert f"sums with their norms: one launch in {number} of {number} layers" in notes
        kernel = gpu_kernels[kernel_of(2, bits)]
        launches = kernel.launches, sum(one.launches for one in made.values())
        found = model(tokens)
        assert kernel.launches - launches[0] == number
        assert sum(one.launches for one in made.values()) > launches[1]
        assert distance(found, usual) < (6e-2 if bits else 3e-2)
    assert [type(module) for _, module in model.named_modules()] == kinds


@pytest.mark.parametrize("down", ["mxfp4", "wrapped"])
def test_what_the_output_is_packed_in_is_no_matter(down: str, gpu_kernels: dict[str, HostKernel]) -> None:
    """It is multiplied as before: only gate and up are joined."""
    mx.random.seed(0)
    model = model_of(bits=4)
    for layer in model.layers:
        plain = nn.Linear(192, WIDTH, bias=False)
        plain.set_dtype(mx.bfloat16)
        packed = nn.QuantizedLinear.from_linear(plain, group_size=32, bits=4, mode="mxfp4")
        layer.mlp.down_proj = packed if down == "mxfp4" else nn.Sequential(plain)
    usual, x = [layer.mlp(rows_of(3, mx.bfloat16)) for layer in model.layers], rows_of(3, mx.bfloat16)
    mlps = mlps_of(model)
    assert mlps.note == all_of(model)
    mlps.install()
    apart = [distance(layer.mlp(x), one) for layer, one in zip(model.layers, usual, strict=True)]
    assert max(apart) < 6e-2, "MLX's products of packed weights are as far from exact here"


def test_an_mlp_that_layers_share_is_joined_once(gpu_kernels: dict[str, HostKernel]) -> None:
    model = model_of()
    for layer in model.layers[1:]:
        layer.mlp = model.layers[0].mlp
    assert mlps_of(model).note == "fused MLPs: 1 of 1 layers"
