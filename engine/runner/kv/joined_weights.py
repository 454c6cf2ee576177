"""Weights of products that share their rows, as one array: modules keep slices of it, so there is no second copy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from engine.runner.kernels.fused_rows import Norm, fused_rows, takes_norm
from engine.runner.kernels.fused_rows_text import Activation
from engine.runner.kernels.joined_arrays import in_one_array
from engine.runner.kernels.rows_matmul import takes_dense, takes_quantized
from engine.runner.kernels.split_k import MAX_ROWS, add_parts, split_k

_MOST_DENSE_ROWS, _MOST_PACKED_ROWS = 16, 32
"""Rows that kernels for few rows take; measured on an H200."""
_MOST_UNPACKED = 128 << 20
"""Bytes of weights that are unpacked for one product."""


@dataclass(frozen=True, slots=True)
class JoinedWeights:
    """One product's weights [N, K], and bias [N]; ``bits`` is 0 where they are not packed.

    ``whole`` is what kernels for few rows take: ``weight``, or [N, …] words, scales and biases of packed weights, of
    which ``weight`` and ``scales_biases`` are slices. ``unpacks``: more rows than such kernels take are multiplied by
    unpacked weights. MLX's product of packed ones takes longer than both together on CUDA.
    """

    weight: mx.array
    bias: mx.array | None
    dtype: mx.Dtype
    whole: mx.array
    bits: int = 0
    group_size: int = 0
    scales_biases: tuple[mx.array, ...] = ()
    unpacks: bool = False

    @classmethod
    def of(cls, modules: Sequence[nn.Module], *, on_cuda: bool) -> "JoinedWeights":
        """Of ``modules``, in their order. They become one array, slices of which the modules keep.

        A single module's weights stay as they are, but packed ones on CUDA, which are joined with their scales.
        """
        first: Any = modules[0]
        bias = _joined(modules, "bias") if "bias" in first else None
        if "scales" not in first:
            weight = _joined(modules, "weight")
            return cls(weight, bias, weight.dtype, weight)
        if len(modules) == 1 and not on_cuda:  # no kernel for few rows takes the whole there
            whole = weight = first.weight
            scales_biases = [first.scales, first.biases]
        else:
            whole, (weight, *scales_biases) = _joined_packed(modules)
        dtype = scales_biases[0].dtype
        unpacks = on_cuda and weight.size * 32 // first.bits * dtype.size <= _MOST_UNPACKED
        return cls(weight, bias, dtype, whole, first.bits, first.group_size, tuple(scales_biases), unpacks)

    @property
    def most_few_rows(self) -> int:
        """Rows up to which the kernels for few rows serve on CUDA; 0 if they do not know such weights."""
        if self.bits:
            k = self.weight.shape[1] * 32 // self.bits
            return _MOST_PACKED_ROWS if takes_quantized(k, self.dtype, self.bits, self.group_size) else 0
        return _MOST_DENSE_ROWS if takes_dense(self.weight.shape[1], self.dtype) else 0

    @property
    def most_split_rows(self) -> int:
        """Rows up to which :meth:`onto` serves on CUDA, above those for few rows; 0 if it does not."""
        return 0 if self.bits or not self.most_few_rows else MAX_ROWS

    def few(
        self, x: mx.array, *, norm: Norm | None = None, residual: mx.array | None = None,
        gated: Activation | None = None,
    ) -> mx.array:  # fmt: skip
        """See :func:`engine.runner.kernels.fused_rows.fused_rows`: on CUDA."""
        assert x.dtype == self.dtype, "kernels take the scales' element type for that of x"
        if norm is not None and not takes_norm(x.dtype):
            x, norm = mx.fast.rms_norm(x, norm.gain, norm.eps), None
        return fused_rows(
            x, self.whole, bits=self.bits, group_size=self.group_size, norm=norm, bias=self.bias, residual=residual,
            gated=gated,
        )  # fmt: skip

    def onto(self, residual: mx.array, x: mx.array, norm: Norm | None = None) -> tuple[mx.array, mx.array]:
        """``residual`` [M, N] plus ``x`` [M, K] by the weights, and that normalized if ``norm`` is given."""
        assert not self.bits, "packed weights go by kernels for few rows"
        assert self.bias is None, "nothing adds a bias"
        return add_parts(split_k(x, self.weight), residual, norm)

    def many(self, x: mx.array, residual: mx.array | None = None) -> mx.array:
        """``x`` [M, K] by the weights, plus the bias or the ``residual`` [M, N], by MLX."""
        added = self.bias if residual is None else residual
        weight, size, bits = self.weight, self.group_size, self.bits
        if bits:
            scales, biases = self.scales_biases
            if not self.unpacks or x.shape[0] <= _MOST_PACKED_ROWS:
                product = mx.quantized_matmul(x, weight, scales, biases, transpose=True, group_size=size, bits=bits)
                return product if added is None else product + added
            weight = mx.dequantize(weight, scales, biases, group_size=size, bits=bits)
        return x @ weight.T if added is None else mx.addmm(added, x, weight.T)


def joining_problem(modules: Sequence[nn.Module], *, biased: bool = False) -> str | None:
    """Why the weights of ``modules``, which share their rows, cannot be one array; None if they can.

    ``biased``: with biases, which are another's concern.
    """
    if not all(isinstance(one, nn.Linear | nn.QuantizedLinear) for one in modules):
        return "weights that are not plain or packed matrices"
    if any("scales" in one and getattr(one, "mode", "affine") != "affine" for one in modules):
        return "weights that are not packed as affine"
    if not biased and any("bias" in one for one in modules):
        return "biases behind its products"
    if len({(getattr(one, "bits", 0), getattr(one, "group_size", 0)) for one in modules}) > 1:
        return "weights packed in several ways"
    weights = [one[name] for one in modules for name in (("scales", "biases") if "scales" in one else ("weight",))]
    return "weights of several element types" if len({weight.dtype for weight in weights}) > 1 else None


def _joined(modules: Sequence[nn.Module], name: str) -> mx.array:
    """The parameters of this name of all modules along their first axis; slices of that take their places."""
    if len(modules) == 1:
        only: mx.array = modules[0][name]
        return only
    whole, slices = in_one_array([module[name] for module in modules])
    for module, some in zip(modules, slices, strict=True):
        module[name] = some
    return whole


def _joined_packed(modules: Sequence[nn.Module]) -> tuple[mx.array, list[mx.array]]:
    """All packed weights [N, …], words before scales before biases; and each of those, a slice of it.

    Slices take the places of the modules' own.
    """
    words = [module["weight"] for module in modules]
    scaling = mx.concatenate([module[name] for name in ("scales", "biases") for module in modules])
    whole, slices = in_one_array([*(some.flatten() for some in words), scaling.flatten().view(mx.uint32)])
    numbers = slices.pop().view(scaling.dtype).reshape(scaling.shape)
    rows, first = scaling.shape[0] // 2, 0
    for module, own, some in zip(modules, words, slices, strict=True):
        last = first + own.shape[0]
        module["weight"] = some.reshape(own.shape)
        module["scales"], module["biases"] = numbers[first:last], numbers[rows + first : rows + last]
        first = last
    each = [whole[: sum(some.size for some in slices)].reshape(rows, -1), numbers[:rows], numbers[rows:]]
    whole = whole.reshape(rows, -1)
    mx.eval(whole, each, [module.parameters() for module in modules])
    return whole, each
