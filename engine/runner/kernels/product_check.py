"""Whether a way to compute a product gives right results: against float32, on a model's own weights."""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from engine.runner.kernels.products import ROW_BUCKETS, Candidate, Modules, Product, some_rows

Columns = np.ndarray[Any, np.dtype[np.int32]]
_LIMIT = {mx.bfloat16: 1e-2, mx.float16: 2e-3, mx.float32: 5e-3}
"""Largest difference from float32 of a candidate's result, relative to its norm. Of float32: TF32 rounds to 1e-3."""
_CHECKED_COLUMNS = 192


class Expected:
    """What a product of one set of modules should give, in float32, for some of its columns."""

    def __init__(self, product: Product, modules: Modules) -> None:
        self._product, self._modules = product, modules
        self._x = some_rows(product, ROW_BUCKETS[-1])
        rows = np.array(self._x.astype(mx.float32)).reshape(ROW_BUCKETS[-1], -1)
        self._columns = [_columns(width) for width in product.widths]
        self._values = [
            rows @ _weights(module, columns).T + _bias(module, columns)
            for module, columns in zip(modules, self._columns, strict=True)
        ]

    def problem(self, candidate: Candidate) -> str | None:
        """What is wrong with ``candidate``'s results, at the first number of rows where something is."""
        for rows in ROW_BUCKETS:
            if rows > candidate.max_rows(self._product):
                break
            try:
                difference = self._difference(candidate, rows)
            except Exception as error:  # noqa: BLE001  (a kernel's compiler may object in any way)
                return f"{self._product} failed ({' '.join(str(error).split())[:120]})"
            if not difference <= _LIMIT[self._product.dtype]:
                return f"{self._product} differ by {difference:.2g} with {rows} rows"
        return None

    def _difference(self, candidate: Candidate, rows: int) -> float:
        """Largest difference of a result, relative to its norm."""
        # What is left unwritten shall not hold an older right result.
        left = [mx.full((rows, width), math.nan, dtype=self._product.dtype) for width in self._product.widths]
        mx.eval(left)
        del left
        worst = 0.0
        results = candidate.compute(self._modules, self._x[:rows])
        mx.eval(results)
        for result, columns, values in zip(results, self._columns, self._values, strict=True):
            found = np.array(result.reshape(rows, -1)[:, mx.array(columns)].astype(mx.float32))
            scale = max(float(np.linalg.norm(values[:rows])), 1e-30)
            difference = float(np.linalg.norm(found - values[:rows])) / scale
            worst = difference if math.isnan(difference) else max(worst, difference)
            if math.isnan(worst):
                break
        return worst


def _columns(width: int) -> Columns:
    """Some of a result's columns: the first, the last, and some between."""
    return np.unique(np.linspace(0, width - 1, _CHECKED_COLUMNS).astype(np.int32))


def _weights(module: nn.Module, columns: Columns) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Some rows of a module's weights, unpacked."""
    index = mx.array(columns)
    rows = module["weight"][index]
    if "scales" in module:
        packed: Any = module
        scales, biases = packed.scales[index], module.get("biases")
        if packed.mode == "affine":
            scales, biases = scales.astype(mx.float32), biases[index].astype(mx.float32)
        rows = mx.dequantize(rows, scales, biases, group_size=packed.group_size, bits=packed.bits, mode=packed.mode)
    return np.array(rows.astype(mx.float32))


def _bias(module: nn.Module, columns: Columns) -> Any:
    return np.array(module["bias"][mx.array(columns)].astype(mx.float32)) if "bias" in module else 0.0
