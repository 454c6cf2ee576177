"""Weights of several products in one array, and those of one with their scales."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from engine.runner.kv.joined_weights import JoinedWeights

K = 256


def packed(*widths: int, bits: int = 4, group_size: int = 64, dtype: mx.Dtype = mx.bfloat16) -> list[Any]:
    modules = []
    for number, width in enumerate(widths):
        linear = nn.Linear(K, width, bias=False)
        linear.weight = mx.random.normal((width, K), key=mx.random.key(number)).astype(dtype)
        modules.append(nn.QuantizedLinear.from_linear(linear, group_size, bits))
    return modules


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("widths", [(24,), (7, 33), (16, 8, 8)])
def test_packed_weights_lie_one_behind_the_other_and_modules_keep_theirs(
    widths: tuple[int, ...], group_size: int, bits: int
) -> None:
    modules = packed(*widths, bits=bits, group_size=group_size)
    before = [{name: mx.array(module[name]) for name in ("weight", "scales", "biases")} for module in modules]
    joined = JoinedWeights.of(modules, on_cuda=True)
    for module, own in zip(modules, before, strict=True):
        for name, value in own.items():
            assert module[name].dtype == value.dtype
            assert mx.array_equal(module[name], value)
    every = [mx.concatenate([own[name] for own in before]) for name in ("weight", "scales", "biases")]
    assert all(mx.array_equal(a, b) for a, b in zip((joined.weight, *joined.scales_biases), every, strict=True))
    words, scales, biases = (some.flatten().view(mx.uint32) for some in every)
    assert mx.array_equal(joined.whole.flatten(), mx.concatenate([words, scales, biases]))
    assert joined.whole.shape[0] == sum(widths)


def test_of_one_product_only_cudas_kernels_want_another_array() -> None:
    (module,) = packed(24)
    weight, scales = module.weight, module.scales
    joined = JoinedWeights.of([module], on_cuda=False)
    assert module.weight is weight
    assert module.scales is scales
    assert joined.weight is weight
    x = mx.random.normal((5, K)).astype(mx.bfloat16)
    assert mx.array_equal(joined.many(x), module(x))


def test_rows_of_another_type_than_the_scales_are_never_handed_to_a_kernel() -> None:
    """It reads both as one."""
    joined = JoinedWeights.of(packed(24), on_cuda=True)
    with pytest.raises(AssertionError, match="the scales' element type"):
        joined.few(mx.zeros((1, K), mx.float16))
