"""How the rows of pages lie in memory, as kernels are given them: plain, or packed into integers."""

from typing import NamedTuple

import mlx.core as mx

VECTOR_BYTES = 16
"""Of the widest loads."""


class PackedPages(NamedTuple):
    """Rows as ``mx.quantize`` packs them: words uint32 [1, heads, slots, D * bits / 32], scales and biases
    [1, heads, slots, D / group size]."""

    words: mx.array
    scales: mx.array
    biases: mx.array


PageArrays = mx.array | PackedPages
"""The pages of a layer's keys, or of its values."""
PagePair = tuple[PageArrays, PageArrays]
"""A layer's keys and values."""


class PageFormat(NamedTuple):
    """Bits of an element and elements of a group; 0 and 0 where rows are plain."""

    bits: int
    group_size: int


PLAIN = PageFormat(0, 0)


def as_pages(arrays: mx.array | tuple[mx.array, ...]) -> PageArrays:
    """What compiled functions hand on as a bare tuple."""
    return arrays if isinstance(arrays, mx.array) else PackedPages(*arrays)


def rows_of(pages: PageArrays) -> mx.array:
    """The array [1, heads, slots, …] that holds the rows, packed or not."""
    return pages if isinstance(pages, mx.array) else pages.words


def arrays_of(pages: PageArrays) -> list[mx.array]:
    """All arrays, as kernels take them."""
    return [pages] if isinstance(pages, mx.array) else list(pages)


def page_names(what: str, *, packed: bool) -> tuple[str, ...]:
    """Of :func:`arrays_of` in a kernel's text."""
    return (f"{what}_pages", f"{what}_scales", f"{what}_biases") if packed else (f"{what}_pages",)


def format_of(pages: PageArrays, dim: int) -> PageFormat:
    """How rows of ``dim`` elements lie in ``pages``. ValueError where they cannot."""
    if isinstance(pages, mx.array):
        if pages.shape[3] != dim:
            raise ValueError(f"rows of {dim} elements in pages of shape {pages.shape}")
        return PLAIN
    words, scales, biases = pages
    bits, size = words.shape[3] * 32 // dim, dim // scales.shape[3]
    if bits not in (4, 8) or size not in (32, 64) or words.shape[3] * 32 != dim * bits or dim % size:
        raise ValueError(f"rows of {dim} elements in packed pages of shapes {words.shape} and {scales.shape}")
    if words.dtype != mx.uint32 or scales.dtype != biases.dtype or scales.shape != biases.shape:
        raise ValueError(f"packed pages in {words.dtype}, {scales.dtype} and {biases.dtype}")
    return PageFormat(bits, size)


def element_type(pages: PageArrays) -> mx.Dtype:
    """Of the rows, unpacked."""
    return pages.dtype if isinstance(pages, mx.array) else pages.scales.dtype
