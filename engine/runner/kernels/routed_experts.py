"""The MLP of routed experts on CUDA: rows of each expert found, then two products, each weight read once.

MLX's own gathered products read packed weights again for each row, whatever the order of rows. Here a launch lists
the tiles of rows, one multiplies by gate and up projections and activates, one multiplies by the down projections;
few pairs of a token and an expert need no list.
"""

from typing import NamedTuple

import mlx.core as mx

from engine.runner.kernels.dialect import float_bits, make_kernel
from engine.runner.kernels.routed_experts_text import ROUTE, SCANNED_PAIRS, Ending, Format, experts_text
from engine.runner.kernels.rows_matmul_text import UNROLLED

MAX_PAIRS = 1 << 16
MAX_EXPERTS = 1024
_AFFINE = {(bits, group) for bits in (4, 8) for group in (32, 64, 128)}
_FINE_PAIRS = 16
"""The most pairs whose products are cut fine: there are too few blocks else to fill the chip."""


class ExpertWeights(NamedTuple):
    """One projection of all experts: weights [E, N, K], or words with scales and affine biases, and added biases."""

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    added: mx.array | None = None

    @property
    def arrays(self) -> list[mx.array]:
        """In the order in which texts name them."""
        return [array for array in self if array is not None]


class Packing(NamedTuple):
    """How weights are packed: ``kind`` and, but for dense ones, the bits of a weight and the weights of a scale."""

    kind: Format
    bits: int = 16
    group_size: int = 0


class Activation(NamedTuple):
    """What is made of gate and up; ``alpha`` and ``limit`` are those of gpt-oss."""

    kind: Ending
    alpha: float = 0.0
    limit: float = 0.0

    @property
    def constants(self) -> list[tuple[str, int]]:
        """Of the text."""
        return [("ALPHA", float_bits(self.alpha)), ("LIMIT", float_bits(self.limit))] if self.kind == "oai" else []


class Geometry(NamedTuple):
    """How a product is cut. ``many``: x goes through shared memory, and warps do not share K.

    ``depth``: steps of weights that are under way.
    """

    many: bool
    row_tiles: int
    weight_tiles: int
    beside: int
    sharing: int = 1
    depth: int = 2

    @property
    def rows(self) -> int:
        """Of a tile."""
        return 8 * self.row_tiles


class Routes(NamedTuple):
    """Which pairs each expert has: ``indices`` [P] alone, or the list of tiles as well."""

    indices: mx.array
    rows: int
    tiles: mx.array | None = None
    order: mx.array | None = None

    @property
    def num_tiles(self) -> int:
        """The most there may be: blocks are launched for so many."""
        return int(self.indices.size if self.tiles is None else self.tiles.shape[0])


def takes(k: int, width: int, dtype: mx.Dtype, packing: Packing) -> bool:
    """Whether a product of rows [.., ``k``] of ``dtype`` by weights [E, ``width``, ``k``] is covered."""
    if width % 8 or k % 32 or dtype not in (mx.bfloat16, mx.float16):
        return False
    if packing.kind == "mxfp4":
        return dtype == mx.bfloat16 and packing[1:] == (4, 32)
    return packing.kind == "dense" or (packing[1:] in _AFFINE and k % packing.group_size == 0)


def tile_rows(num_pairs: int, num_experts: int) -> int:
    """Rows of a tile, by how many an expert gets in the mean: measured on an H200."""
    mean = num_pairs / num_experts
    return 8 if mean <= 2.5 or num_pairs <= 8 else 16 if mean <= 12 else 32


def geometry_of(routes: Routes, k: int, packing: Packing) -> Geometry:
    """How a product by weights [.., ``k``] is cut: measured on an H200."""
    if routes.rows > 8:
        return Geometry(True, routes.rows // 8, 2 if packing.bits < 16 else 1, 4)
    long = k * packing.bits >= 8 * 512  # eight steps or more, that warps may share
    if routes.indices.size <= _FINE_PAIRS:  # few blocks: each does less, and waits for all of its weights at once
        return Geometry(False, 1, 1, 1, 4, 4) if long else Geometry(False, 1, 1, 2, 2)
    return Geometry(False, 1, 2, 2, 2) if long else Geometry(False, 1, 2, 4)


def entries_of(num_pairs: int, num_experts: int, rows: int) -> int:
    """Length of a list of tiles: no pairs need more."""
    return min(num_pairs, num_experts + num_pairs // rows)


def route(indices: mx.array, num_experts: int, *, rows: int | None = None) -> Routes:
    """Find the tiles of ``indices`` [P], experts of pairs; ``rows`` of a tile, by default what suits their number.

    At most 65,536 pairs and 1024 experts.
    """
    pairs = indices.size
    rows = tile_rows(pairs, num_experts) if rows is None else rows
    indices = indices.reshape(pairs)
    indices = indices if indices.dtype in (mx.uint32, mx.int32) else indices.astype(mx.uint32)
    if pairs <= SCANNED_PAIRS and rows == 8:
        return Routes(indices, rows)
    entries = entries_of(pairs, num_experts, rows)
    threads = min(1024, max(-(-num_experts // 32) * 32, min(1024, -(-pairs // 32) * 32)))
    tiles, order = make_kernel("route_experts", ("indices",), ("tiles", "order"), ROUTE, UNROLLED)(
        inputs=[indices],
        template=[("E", num_experts), ("C", rows)],
        grid=(threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(entries, 2), (entries, rows)],
        output_dtypes=[mx.int32, mx.int32],
    )
    return Routes(indices, rows, tiles, order)


def gate_up(
    x: mx.array,
    routes: Routes,
    gate: ExpertWeights,
    up: ExpertWeights,
    packing: Packing,
    activation: Activation,
    geometry: Geometry | None = None,
) -> mx.array:
    """Activated rows [P, I] of the pairs of ``x`` [T, K], each token having P / T pairs."""
    arrays = [array for both in zip(gate.arrays, up.arrays, strict=True) for array in both]
    return _launch(x, routes, arrays, packing, activation, gate.added is not None, geometry)


def down(
    x: mx.array, routes: Routes, weights: ExpertWeights, packing: Packing, geometry: Geometry | None = None
) -> mx.array:
    """Rows [P, N] of ``x`` [P, K], each by its expert's weights."""
    return _launch(x, routes, weights.arrays, packing, Activation("plain"), weights.added is not None, geometry)


def _launch(
    x: mx.array,
    routes: Routes,
    arrays: list[mx.array],
    packing: Packing,
    activation: Activation,
    biased: bool,
    geometry: Geometry | None,
) -> mx.array:
    pairs, width, k = routes.indices.size, arrays[0].shape[1], x.shape[1]
    cut = geometry or geometry_of(routes, k, packing)
    assert cut.rows == routes.rows, "tiles of another number of rows"
    kind, ending = packing.kind, activation.kind
    names, body, header = experts_text(kind, ending, listed=routes.tiles is not None, many=cut.many, biased=biased)
    where = [array for array in (routes.indices, routes.tiles, routes.order) if array is not None]
    threads = 32 * cut.beside * cut.sharing
    columns = (8 if ending != "plain" else 16) * cut.weight_tiles * cut.beside
    name = f"experts_{kind}_{ending}{'_many' if cut.many else ''}{'' if routes.tiles is None else '_listed'}"
    (out,) = make_kernel(name + ("_biased" if biased else ""), names, ("out",), body, header)(
        inputs=[x, *where, *arrays],
        template=[
            ("T", x.dtype),
            ("MT", cut.row_tiles),
            ("RT", cut.weight_tiles),
            ("WN", cut.beside),
            ("WK", cut.sharing),
            ("DEPTH", cut.depth),
            *([("BITS", packing.bits), ("GROUP", packing.group_size)] if kind == "affine" else []),
            *activation.constants,
        ],
        grid=(threads * -(-width // columns) * routes.num_tiles, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(pairs, width)],
        output_dtypes=[x.dtype],
    )
    return out
