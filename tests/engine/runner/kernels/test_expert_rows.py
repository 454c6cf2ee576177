"""Experts' sorted rows reach MLX's product with the strides that it reads them by."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import switch_layers
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear

from engine.runner.device.devices import DeviceKind
from engine.runner.kernels import expert_rows
from engine.runner.kernels.expert_rows import laid_out

ROWS, WIDTH, EXPERTS = 80, 16, 4


def strides(array: mx.array) -> tuple[int, ...]:
    """In elements."""
    mx.eval(array)
    found = memoryview(array).strides  # type: ignore[arg-type]
    assert found is not None
    return tuple(one // array.itemsize for one in found)


def test_rows_are_as_far_apart_as_their_shape_says() -> None:
    rows = mx.expand_dims(mx.random.normal((ROWS, WIDTH)), -2) * 2
    assert strides(rows) == (WIDTH, 1, 1)  # what the product would take for one element from row to row
    assert strides(rows.reshape(ROWS, 1, WIDTH)) == strides(mx.contiguous(rows)) == (WIDTH, 1, 1)
    assert strides(laid_out(rows)) == (WIDTH, WIDTH, 1)
    assert mx.array_equal(laid_out(rows), rows)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_experts_on_a_gpu_multiply_rows_that_are_laid_out(monkeypatch: pytest.MonkeyPatch, device: DeviceKind) -> None:
    experts = SwitchGLU(WIDTH, 2 * WIDTH, EXPERTS, bias=True)
    kind = type(experts.down_proj)
    x, indices = mx.random.normal((ROWS, WIDTH)), mx.random.randint(0, EXPERTS, (ROWS, 2))
    expected = experts(x, indices)
    seen: list[mx.array] = []
    kept: list[mx.array] = []
    plain = mx.gather_mm

    def product(rows: mx.array, *args: mx.array, **how: object) -> mx.array:
        """As where a product's memory is too large to be taken over: its sum with a bias lies in that of the bias."""
        seen.append(rows)
        kept.append(plain(rows, *args, **how))  # type: ignore[arg-type]
        return kept[-1]

    monkeypatch.setattr(switch_layers.mx, "gather_mm", product)
    swapped = expert_rows.install(experts, device)
    assert mx.allclose(experts(x, indices), expected, atol=1e-5)
    apart = [strides(rows)[1] == rows.shape[-1] for rows in seen]
    assert apart == ([True, True, True] if device == "cuda" else [True, True, False])
    swapped.undo()
    assert type(experts.down_proj) is kind


def test_few_rows_and_a_cpu_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = SwitchLinear(WIDTH, WIDTH, EXPERTS)
    x, indices = mx.random.normal((3, 1, 1, WIDTH)), mx.array(np.array([[0], [1], [1]], np.uint32))
    expected = layer(x, indices)
    monkeypatch.setattr(expert_rows, "laid_out", lambda _: pytest.fail("not sorted"))
    swapped = expert_rows.install(nn.Sequential(layer), "cuda")
    assert mx.array_equal(layer(x, indices), expected)
    swapped.undo()
    expert_rows.install(layer, "cpu")
    assert type(layer) is SwitchLinear
