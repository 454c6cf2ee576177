"""Packed weights as plain ones, exactly: for devices that compute on plain ones faster, or on these alone."""

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

_NVFP4_LARGEST = 6.0 * 448.0
"""The largest value times the largest scale: a global scale is what the largest weight was."""


class QuantizedInputLinear(nn.Module):  # type: ignore[misc]
    """A linear layer that rounds its input to ``mode`` as the device's own product would, where MLX has none.

    ``weight`` [out, in] is plain, or packed with ``scales``.
    """

    def __init__(self, packed: nn.QQLinear, dtype: mx.Dtype | None) -> None:
        super().__init__()
        self.group_size, self.mode = packed.group_size, packed.mode
        self.input_bits = packed.bits
        if dtype is None:
            self.weight, self.scales, self.bits = packed.weight, packed.scales, packed.bits
        else:
            self.weight = _dense(packed, dtype)

    def __call__(self, x: mx.array) -> mx.array:
        """``x`` [..., in] to [..., out]."""
        words, *scales = mx.quantize(x, self.group_size, self.input_bits, mode=self.mode)
        x = mx.dequantize(words, scales[0], None, self.group_size, self.input_bits, self.mode, dtype=x.dtype)
        if "scales" not in self:
            return mx.matmul(x, self.weight.T)
        return mx.quantized_matmul(
            x,
            self.weight,
            self.scales,
            None,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )


def packed_kind(module: nn.Module) -> str | None:
    """How a module's weights are packed: MLX's mode, ``ternary`` or None."""
    from mlx_lm.models.bitlinear_layers import BitLinear

    if isinstance(module, BitLinear):
        return "ternary"
    return getattr(module, "mode", "affine") if hasattr(module, "bits") and "scales" in module else None


def runs_packed(module: nn.Module, kind: str) -> bool:
    """Whether MLX computes on the weights as they are on a device of ``kind`` (``cpu``, ``cuda``, ``metal``)."""
    if packed_kind(module) == "ternary":
        return kind == "metal"
    if packed_kind(module) == "affine" and module.bits == 1 and kind == "cuda":  # "1-bit quantization is not supported"
        return False
    return kind != "cpu" or (module.get("global_scale") is None and not isinstance(module, nn.QQLinear))


def unpacked_size(module: nn.Module) -> int:
    """Weights of a packed module, in values."""
    per_word = 4 if packed_kind(module) == "ternary" else 32 / module.bits
    return int(module.weight.size * per_word)


def unpack(model: nn.Module, modules: dict[str, nn.Module], dtype: mx.Dtype) -> None:
    """Put plain layers with weights of ``dtype`` in the place of ``modules`` of ``model``. Evaluates nothing.

    Kinds of modules that are not known here stay.
    """
    plain = [(path, one) for path, module in modules.items() if (one := _plain(module, dtype)) is not None]
    if plain:
        model.update_modules(tree_unflatten(plain))


def round_inputs_here(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Have ``modules`` of ``model`` that round their inputs do it by operations that every device has."""
    ours = [(path, QuantizedInputLinear(one, None)) for path, one in modules.items() if isinstance(one, nn.QQLinear)]
    if ours:
        model.update_modules(tree_unflatten(ours))


def _plain(module: nn.Module, dtype: mx.Dtype) -> nn.Module | None:
    """``module`` with a plain weight, its other arrays kept."""
    from mlx_lm.models.bitlinear_layers import BitLinear
    from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    if isinstance(module, nn.QQLinear):
        return QuantizedInputLinear(module, dtype)
    plain: nn.Module
    if isinstance(module, BitLinear) or type(module) is nn.QuantizedLinear:
        plain = nn.Linear(1, 1, bias=False)
    elif type(module) is nn.QuantizedEmbedding:
        plain = nn.Embedding(1, 1)
    elif type(module) is QuantizedSwitchLinear:
        plain = SwitchLinear(1, 1, 1, bias=False)
    elif type(module) is QuantizedMultiLinear:
        plain = MultiLinear(1, 1, 1)
    else:
        return None
    plain.weight = _ternary(module, dtype) if isinstance(module, BitLinear) else _dense(module, dtype)
    if module.get("bias") is not None:
        plain.bias = module.bias
    plain.eval()
    return plain


def _dense(module: nn.Module, dtype: mx.Dtype) -> mx.array:
    """The weights of a module in one of MLX's modes."""
    if module.bits == 1:
        return _one_bit(module, dtype)
    weight = mx.dequantize(
        module.weight, module.scales, module.get("biases"), module.group_size, module.bits, module.mode, dtype=dtype
    )
    scale: mx.array | None = module.get("global_scale")
    if scale is None:
        return weight
    scale = scale.astype(mx.float32) / _NVFP4_LARGEST
    return (weight.astype(mx.float32) * scale.reshape(*scale.shape, 1, 1)).astype(dtype)


def _one_bit(module: nn.Module, dtype: mx.Dtype) -> mx.array:
    """Affine weights of one bit, the first in the lowest: MLX's CUDA leaves those it has no case for unwritten."""
    bits = (module.weight[..., None] >> mx.arange(32, dtype=mx.uint32)) & 1
    groups = bits.reshape(*module.scales.shape, module.group_size).astype(dtype)
    values = groups * module.scales[..., None].astype(dtype) + module.biases[..., None].astype(dtype)
    weight: mx.array = values.reshape(*module.weight.shape[:-1], -1)
    return weight


def _ternary(module: nn.Module, dtype: mx.Dtype) -> mx.array:
    """BitNet's weights: the rows of each quarter lie in two bits of a byte, 0 to 2 for -1 to 1."""
    quarters = [((module.weight >> shift) & 3).astype(dtype) - 1 for shift in (0, 2, 4, 6)]
    stored: mx.array = module.weight_scale.astype(mx.float32)
    scale = mx.reciprocal(stored) if module.invert_weight_scales else stored
    return mx.concatenate(quarters)[: module.out_features] * scale.astype(dtype)
