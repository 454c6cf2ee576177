"""Whether a way to compute a product gives right results: against float32, on a model's own weights."""

import math
from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from engine.runner.device.host import floats
from engine.runner.kernels.products import ROW_BUCKETS, Candidate, Modules, Plain, Product, Way, some_rows

Values = np.ndarray[Any, np.dtype[np.float32]]
_LIMIT = {mx.bfloat16: 1e-2, mx.float16: 2e-3, mx.float32: 5e-3}
"""Largest difference from float32 of a candidate's result, relative to its norm. Of float32: TF32 rounds to 1e-3."""
_WRONG = 5e-2
"""More than any rounding."""
_CHECKED_COLUMNS = 192


class Expected:
    """What a product of one set of modules should give, in float32, for some of its columns."""

    def __init__(self, product: Product, modules: Modules) -> None:
        self._product, self._modules = product, modules
        self._columns = [_columns(width) for width in product.widths]

    def problem(self, candidate: Candidate) -> str | None:
        """What is wrong with ``candidate``'s results, at the first number of rows where something is."""
        for rows in ROW_BUCKETS:
            if not candidate.takes(self._product, rows):
                continue
            try:
                difference = self._difference(candidate, rows)
                if not (difference <= _LIMIT[self._product.dtype] or difference <= self._usual_limit(rows)):
                    return f"{self._product} differ by {difference:.2g} with {rows} rows"
            except Exception as error:  # noqa: BLE001  (a kernel's compiler may object in any way)
                return f"{self._product} failed ({' '.join(str(error).split())[:120]})"
        return None

    def _usual_limit(self, rows: int) -> float:
        """What MLX's own product allows where it rounds more than most, as on packed weights with few rows."""
        return min(2 * self._difference(Plain(), rows), _WRONG)

    def _difference(self, candidate: Way, rows: int) -> float:
        """Largest difference of a result, relative to its norm."""
        # What is left unwritten shall not hold an older right result.
        left = mx.full((rows * sum(self._product.widths),), math.nan, dtype=self._product.dtype)
        mx.eval(left)
        del left
        results = candidate.compute(self._modules, self._rows[:rows])
        mx.eval(results)
        return float(np.max([*map(_distance, results, self._columns, self._values)]))

    @cached_property
    def _rows(self) -> mx.array:
        return some_rows(self._product, ROW_BUCKETS[-1])

    @cached_property
    def _values(self) -> list[Values]:
        rows = floats(self._rows).reshape(ROW_BUCKETS[-1], -1)
        return [
            rows @ _weights(module, columns).T + _bias(module, columns)
            for module, columns in zip(self._modules, self._columns, strict=True)
        ]


def _distance(result: mx.array, columns: slice, values: Values) -> float:
    """Of the norm of ``values``, whose first rows ``result`` should have in ``columns``; NaN if it holds any."""
    rows = result.reshape(-1, result.shape[-1])[:, columns]
    expected = values[: len(rows)]
    scale = max(float(np.linalg.norm(expected)), 1e-30)
    return float(np.linalg.norm(floats(rows) - expected)) / scale


def _columns(width: int) -> slice:
    """Some of a result's columns, the last among them.

    A slice, since MLX compiles what reads columns by their numbers for seconds on CUDA.
    """
    step = max(1, width // _CHECKED_COLUMNS)
    return slice((width - 1) % step, None, step)


def _weights(module: nn.Module, columns: slice) -> Values:
    """Some rows of a module's weights, unpacked."""
    rows = module["weight"][columns]
    if "scales" in module:
        packed: Any = module
        scales, biases = packed.scales[columns], module.get("biases")
        if packed.mode == "affine":
            scales, biases = scales.astype(mx.float32), biases[columns].astype(mx.float32)
        rows = mx.dequantize(rows, scales, biases, group_size=packed.group_size, bits=packed.bits, mode=packed.mode)
    return floats(rows)


def _bias(module: nn.Module, columns: slice) -> Any:
    return floats(module["bias"][columns]) if "bias" in module else 0.0
