"""The products of a model by its weights, and the ways to compute them for few rows."""

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from engine.runner.kernels import rows_matmul
from engine.runner.kernels.rows_matmul import MAX_ROWS, MAX_SIBLINGS, Packed

Modules = tuple[nn.Module, ...]

ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Numbers of rows that are measured. A product of other numbers goes the way of the next larger one."""
METHODS: dict[type[nn.Module], str] = {
    nn.Linear: "__call__",
    nn.QuantizedLinear: "__call__",
    nn.Embedding: "as_linear",
    nn.QuantizedEmbedding: "as_linear",
}
"""Modules that multiply by their weights, and the method that does."""
_SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("in_proj_qkvz", "in_proj_ba"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate", "shared_expert_gate"),
)
"""Names of a module's children that mlx-lm's models give the same input. A family's parts come behind it."""
_MOST_UNPACKED = 1 << 27
"""Bytes of one product's weights: they are part of a step's memory."""


@dataclass(frozen=True, slots=True)
class Product:
    """What decides how fast a product is: rows [M, ``k``] by weights [N, ``k``] for each N of ``widths``.

    Several widths are siblings, that take the same rows. ``dtype`` is the rows'; ``bits`` is 0 where weights are not
    packed.
    """

    kind: str
    widths: tuple[int, ...]
    k: int
    dtype: mx.Dtype
    biased: bool = False
    bits: int = 0
    group_size: int = 0
    mode: str = ""

    def __str__(self) -> str:
        weights = f"{self.bits}-bit" if self.bits else str(self.dtype).rpartition(".")[2]
        return f"{weights} {' + '.join(map(str, self.widths))} x {self.k}"


class Way(Protocol):
    """One way to compute a product."""

    name: str

    def starts_slowly(self, product: Product, /) -> bool:
        """Whether its first use compiles for longer than a measurement is worth."""

    def compute(self, modules: Modules, x: mx.array) -> list[mx.array]:
        """``x`` [..., k] by the weights of each module, with its bias: [..., N] each."""


class Candidate(Way, Protocol):
    """A way that may be chosen."""

    def takes(self, product: Product, num_rows: int) -> bool:
        """Whether it computes ``product`` of so many rows, and may be fast."""


class Plain:
    """Each module's own method, as mlx wrote it."""

    name = "mlx"

    def starts_slowly(self, product: Product, /) -> bool:
        """See :func:`mlx_starts_slowly`."""
        return mlx_starts_slowly(product)

    def compute(self, modules: Modules, x: mx.array) -> list[mx.array]:
        """A call of each module."""
        return [plain(module, x) for module in modules]


def mlx_starts_slowly(product: Product) -> bool:
    """On CUDA MLX compiles its product of packed weights at its first use, for each kind of shape.

    On an H200 that took more than a minute for the shapes of one model; other ways were several times faster at all
    numbers of rows that they take, so that there is nothing to find out.
    """
    return product.bits > 0 and bool(mx.cuda.is_available())


class Flattened:
    """MLX's product with all rows in one matrix: on CUDA packed weights are read once for each leading row."""

    name = "flattened"

    def __init__(self, max_rows: int = ROW_BUCKETS[-1]) -> None:
        self._max_rows = max_rows

    def starts_slowly(self, product: Product, /) -> bool:
        """See :func:`mlx_starts_slowly`."""
        return mlx_starts_slowly(product)

    def takes(self, product: Product, num_rows: int) -> bool:
        """Several rows of packed weights."""
        return product.bits > 0 and 1 < num_rows <= self._max_rows and len(product.widths) == 1

    def compute(self, modules: Modules, x: mx.array) -> list[mx.array]:
        """A call of each module, of rows [1, M, k]."""
        flat = x.reshape(1, -1, x.shape[-1])
        return [result.reshape(*x.shape[:-1], -1) for result in (plain(module, flat) for module in modules)]


class Unpacked:
    """MLX's product of weights that are unpacked for it: more bytes, but cuBLAS's speed."""

    name = "unpacked"

    def starts_slowly(self, _product: Product, /) -> bool:
        """Its kernels are there, or are compiled several at a time and kept."""
        return False

    def takes(self, product: Product, num_rows: int) -> bool:
        """Many rows, of packed weights that take no more than 128 MiB unpacked."""
        return product.bits > 0 and num_rows > MAX_ROWS and len(product.widths) == 1 and _unpacks(product)

    def compute(self, modules: Modules, x: mx.array) -> list[mx.array]:
        """Unpack the weights of each module and multiply."""
        return [self._one(module, x) for module in modules]

    def _one(self, module: Any, x: mx.array) -> mx.array:
        weights = mx.dequantize(
            module.weight, module.scales, module.get("biases"),
            group_size=module.group_size, bits=module.bits, mode=module.mode,
        )  # fmt: skip
        result: mx.array = x @ weights.T
        return result + module.bias if "bias" in module else result


class OwnKernels:
    """The kernels of :mod:`engine.runner.kernels.rows_matmul`: CUDA."""

    name = "own"

    def starts_slowly(self, _product: Product, /) -> bool:
        """Its kernels are there, or are compiled several at a time and kept."""
        return False

    def takes(self, product: Product, num_rows: int) -> bool:
        """Up to 32 rows, of shapes and types that the kernels cover; 32 at a time of weights too large to unpack."""
        most = MAX_ROWS if not product.bits or _unpacks(product) else ROW_BUCKETS[-1]
        if num_rows > most:
            return False
        if not product.bits:
            return rows_matmul.takes_dense(product.k, product.dtype)
        covered = rows_matmul.takes_quantized(product.k, product.dtype, product.bits, product.group_size)
        return covered and product.mode == "affine"

    def compute(self, modules: Modules, x: mx.array) -> list[mx.array]:
        """One launch for all modules and 32 rows."""
        num_rows = x.size // x.shape[-1]
        if num_rows > MAX_ROWS:
            rows = x.reshape(num_rows, x.shape[-1])
            parts = [self.compute(modules, rows[i : i + MAX_ROWS]) for i in range(0, num_rows, MAX_ROWS)]
            return [mx.concatenate(list(some)).reshape(*x.shape[:-1], -1) for some in zip(*parts, strict=True)]
        first: Any = modules[0]
        if "scales" in first:
            packed = [Packed(module["weight"], module["scales"], module["biases"]) for module in modules]
            results = rows_matmul.quantized(x, packed, bits=first.bits, group_size=first.group_size)
        else:
            results = rows_matmul.dense(x, [module["weight"] for module in modules])
        return [
            result + module["bias"] if "bias" in module else result
            for result, module in zip(results, modules, strict=True)
        ]


def _unpacks(product: Product) -> bool:
    """Whether packed weights are small enough to be unpacked for a product."""
    return sum(product.widths) * product.k * product.dtype.size <= _MOST_UNPACKED


def _joins(widths: Sequence[int]) -> bool:
    """Whether results that lie one behind the other all begin where kernels may read 16 bytes at once."""
    return len(widths) <= MAX_SIBLINGS and all(width % 8 == 0 for width in widths[:-1])


def bucket_of(num_rows: int) -> int:
    """The number of :data:`ROW_BUCKETS` whose choice ``num_rows`` rows follow."""
    return next(bucket for bucket in ROW_BUCKETS if bucket >= num_rows)


def some_rows(product: Product, num_rows: int) -> mx.array:
    """Rows [rows, 1, k] as a decode step has them."""
    return mx.random.normal((num_rows, 1, product.k), key=mx.random.key(0)).astype(product.dtype)


def plain(module: nn.Module, x: mx.array) -> mx.array:
    """What ``module`` gives for ``x`` by mlx's own method, whatever stands in its place now."""
    kind = next(kind for kind in METHODS if isinstance(module, kind))
    method: Callable[[nn.Module, mx.array], mx.array] = getattr(kind, METHODS[kind])
    return method(module, x)


def product_of(modules: Modules) -> Product | None:
    """The product of modules that take the same input; None if their weights are not of one kind."""
    first, *others = map(_single, modules)
    if any(replace(other, widths=first.widths) != first for other in others):
        return None
    return replace(first, widths=sum((product.widths for product in (first, *others)), ()))


def single_products(model: nn.Module, skip: Container[int] = ()) -> Iterator[tuple[Product, Modules]]:
    """Every module that multiplies by its weights, but for those whose ``id`` is in ``skip``.

    A table of tokens does where the model has no ``lm_head``.
    """
    modules = model.named_modules()
    tied = not any(name.rpartition(".")[2] == "lm_head" for name, _ in modules)
    for _, module in modules:
        method = METHODS.get(type(module)) if id(module) not in skip else None
        if method == "__call__" or (tied and method == "as_linear"):
            yield _single(module), (module,)


def sibling_products(model: nn.Module, skip: Container[int] = ()) -> Iterator[tuple[Product, Modules]]:
    """Modules beside each other that take the same input, where one launch may compute them all. ``skip`` as above.

    A module is in one family at most.
    """
    taken: set[int] = set()
    for module in model.modules():
        for names in _SIBLINGS:
            children = tuple(module[name] for name in names if type(module.get(name)) in METHODS)
            children = tuple(child for child in children if id(child) not in skip and id(child) not in taken)
            if len(children) > 1 and (product := product_of(children)) is not None and _joins(product.widths):
                taken |= set(map(id, children))
                yield product, children


def _single(module: nn.Module) -> Product:
    kind, biased = type(module).__name__, "bias" in module
    num_rows, columns = module["weight"].shape
    if "scales" not in module:
        return Product(kind, (num_rows,), columns, module["weight"].dtype, biased)
    packed: Any = module
    scales = packed.scales.dtype
    # Scales of the formats with shared exponents are bytes, and say nothing of the rows' type.
    dtype = scales if mx.issubdtype(scales, mx.floating) else mx.bfloat16
    return Product(
        kind, (num_rows,), columns * 32 // packed.bits, dtype, biased, packed.bits, packed.group_size, packed.mode
    )
