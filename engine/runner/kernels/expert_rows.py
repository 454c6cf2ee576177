"""Rows of experts' products as MLX's GPUs must get them, or they multiply other numbers.

Sorted by expert, rows are [N, 1, K], and MLX takes the stride of the axis in the middle for the distance from row to
row: on CUDA in 0.32.4, on Metal before 0.32.1. Nobody keeps that stride for an axis of one: where a bias was added, the
sum may lie in the memory of the bias with an axis inserted, whose stride is 1. It depends on the memory that is free.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear

from engine.runner.device.devices import DeviceKind
from engine.runner.kernels.swapped_modules import SwappedModules


def install(model: nn.Module, device_kind: DeviceKind) -> SwappedModules:
    """Have ``model``'s experts lay their sorted rows out on a GPU, until that is undone."""
    experts = SwappedModules()
    if device_kind != "cpu":
        for _, module in model.named_modules():
            if type(module) is SwitchLinear:
                experts.swap_method(module, "__call__", _multiply)
    return experts


def laid_out(rows: mx.array) -> mx.array:
    """``rows`` [N, 1, K] with the strides of their shape; one reshape would keep those they have."""
    return rows.reshape(-1, rows.shape[-1]).reshape(rows.shape)


def _multiply(self: nn.Module, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
    rows = laid_out(x) if sorted_indices else x
    result: mx.array = SwitchLinear.__call__(self, rows, indices, sorted_indices=sorted_indices)
    return result
