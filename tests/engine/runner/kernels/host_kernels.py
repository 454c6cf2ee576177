"""The attention kernels of a GPU as numpy would have them: they write into the pages' memory, in place.

For tests of what is built upon kernels, on machines without a GPU. Inputs are evaluated when a kernel is called, so
functions around it cannot be compiled (``mx.disable_compile``).
"""

from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from engine.runner.kernels.joined_attention import HeadConstants
from engine.runner.kernels.page_format import PackedPages, PageArrays, rows_of
from engine.runner.kernels.reference import attention
from engine.runner.kernels.self_check import AttentionShape, attention_problem
from tests.engine.runner.kernels.host_states import HostStateKernels


class HostKernels:
    """As :class:`engine.runner.kernels.self_check.GpuKernels`. ``calls`` counts the launches by name."""

    def __init__(self) -> None:
        self.calls = {"paged_attention": 0, "collect": 0, "joined_attention": 0, "latent_attention": 0}
        self.states = HostStateKernels()

    def paged_attention(
        self,
        queries: mx.array,
        new_keys: mx.array,
        new_values: mx.array,
        key_pages: PageArrays,
        value_pages: PageArrays,
        block_tables: mx.array,
        positions: mx.array,
        *,
        scale: float,
        block_size: int,
        window: int | None = None,
        sinks: mx.array | None = None,
        softcap: float | None = None,
        splits: int | None = None,
        arrivals: mx.array | None = None,
    ) -> mx.array:
        """Write each row's key and value into its slot; gives [rows, heads, 1, DV]."""
        self.calls["paged_attention"] += 1
        return self._attend(
            queries, new_keys, new_values, key_pages, value_pages, block_tables, positions, scale=scale,
            block_size=block_size, window=window, sinks=sinks, softcap=softcap,
        )  # fmt: skip

    def _attend(
        self, queries: mx.array, new_keys: mx.array, new_values: mx.array, key_pages: PageArrays,
        value_pages: PageArrays, block_tables: mx.array, positions: mx.array, *, scale: float, block_size: int,
        window: int | None, sinks: mx.array | None = None, softcap: float | None = None,
    ) -> mx.array:  # fmt: skip
        known, keys, values = map(floats, (queries, new_keys, new_values))
        rows, heads, _, _ = queries.shape
        out = np.zeros((rows, heads, 1, new_values.shape[3]), np.float32)
        places, tables = np.array(positions), np.array(block_tables)
        for row in range(rows):
            if places[row] < 0:
                continue
            seen = np.arange(max(0, places[row] + 1 - window) if window else 0, places[row] + 1)
            slots = tables[row, seen // block_size] * block_size + seen % block_size
            write(key_pages, slots[-1:], keys[row])
            write(value_pages, slots[-1:], values[row])
            out[row, :, 0] = attention(
                known[row, :, 0], read(key_pages, slots, keys.shape[3]),
                read(value_pages, slots, values.shape[3]),
                scale=scale, sinks=None if sinks is None else floats(sinks), softcap=softcap,
            )  # fmt: skip
        return mx.array(out).astype(queries.dtype)

    def joined_attention(
        self,
        joined: mx.array,
        key_pages: PageArrays,
        value_pages: PageArrays,
        block_tables: mx.array,
        positions: mx.array,
        constants: HeadConstants,
        *,
        heads: int,
        scale: float,
        block_size: int,
        window: int | None = None,
        splits: int | None = None,
        arrivals: mx.array | None = None,
    ) -> mx.array:
        """Normalize and rotate the heads of each row, and attend; [rows, heads * D]."""
        self.calls["joined_attention"] += 1
        rows, kv_heads = joined.shape[0], rows_of(key_pages).shape[1]
        num_heads = constants.heads_of_row(heads, kv_heads)
        dim = joined.shape[1] // num_heads
        given = floats(joined).reshape(rows, num_heads, 1, dim)
        queries, keys, values = np.split(given, [heads, heads + kv_heads], axis=1)
        if constants.value_heads != "given":
            assert constants.eps is not None
            values = values if constants.value_heads == "normalized" else keys
            values = values / np.sqrt((values**2).mean(-1, keepdims=True) + constants.eps)
        frequencies, *gains = np.split(floats(constants.values), [dim // 2, dim // 2 + dim])
        if constants.eps is not None:
            queries, keys = (
                some / np.sqrt((some**2).mean(-1, keepdims=True) + constants.eps) * gain
                for some, gain in zip((queries, keys), gains, strict=True)
            )
        angles = np.array(positions)[:rows, None, None, None] * frequencies.astype(np.float64)
        queries, keys = (turned(some, angles) for some in (queries, keys))
        new = (mx.array(some).astype(joined.dtype) for some in (queries, keys, np.ascontiguousarray(values)))
        out = self._attend(
            *new, key_pages, value_pages, block_tables, positions, scale=scale, block_size=block_size, window=window
        )
        return out.reshape(rows, heads * dim)

    def latent_attention(
        self,
        queries: mx.array,
        rope_queries: mx.array,
        new_latents: mx.array,
        new_ropes: mx.array,
        latent_pages: mx.array,
        rope_pages: mx.array,
        block_tables: mx.array,
        positions: mx.array,
        *,
        scale: float,
        block_size: int,
        splits: int | None = None,
        arrivals: mx.array | None = None,
    ) -> mx.array:
        """Write each row's vectors into its slot; gives [rows, heads, 1, R]."""
        self.calls["latent_attention"] += 1
        known = np.concatenate([floats(queries), floats(rope_queries) / scale], axis=-1)[:, :, 0]
        new = floats(new_latents), floats(new_ropes)
        out = np.zeros(queries.shape, np.float32)
        places, tables = np.array(positions), np.array(block_tables)
        for row in range(queries.shape[0]):
            if places[row] < 0:
                continue
            seen = np.arange(places[row] + 1)
            slots = tables[row, seen // block_size] * block_size + seen % block_size
            for pages, rows in zip((latent_pages, rope_pages), new, strict=True):
                write(pages, slots[-1:], rows[row])
            latents, ropes = (
                read(pages, slots, rows.shape[3]) for pages, rows in zip((latent_pages, rope_pages), new, strict=True)
            )
            out[row, :, 0] = attention(known[row], np.concatenate([latents, ropes], axis=-1), latents, scale=scale)
        return mx.array(out).astype(queries.dtype)

    def collect(
        self,
        new_keys: mx.array,
        new_values: mx.array,
        key_pages: PageArrays,
        value_pages: PageArrays,
        block_table: mx.array,
        span: mx.array,
        *,
        block_size: int,
        length: int,
    ) -> tuple[mx.array, mx.array]:
        """Write the chunk's rows into their slots; gives keys and values of ``length`` positions."""
        self.calls["collect"] += 1
        begin, start = np.array(span)[:2].tolist()
        assert begin + length == start + new_keys.shape[2], "length is not that of the span"
        seen = np.arange(begin, begin + length)
        slots = np.array(block_table)[seen // block_size] * block_size + seen % block_size
        for pages, new in ((key_pages, new_keys), (value_pages, new_values)):
            write(pages, slots[start - begin :], floats(new)[0])
        keys, values = (
            mx.array(read(pages, slots, new.shape[3]))[None].astype(new.dtype)
            for pages, new in ((key_pages, new_keys), (value_pages, new_values))
        )
        return keys, values

    def attention_problem(self, **shape: Any) -> str | None:
        """The self-check, of these kernels."""
        return attention_problem(AttentionShape(**shape), self)


def turned(heads: NDArray[Any], angles: NDArray[np.float64]) -> NDArray[np.float32]:
    """Elements i and i + D / 2 of ``heads`` [rows, n, 1, D] turned by ``angles`` [rows, 1, 1, D / 2]."""
    first, second = np.split(heads.astype(np.float64), 2, axis=-1)
    cosines, sines = np.cos(angles), np.sin(angles)
    both = np.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)
    return both.astype(np.float32)


def floats(array: mx.array) -> NDArray[np.float32]:
    return np.array(array.astype(mx.float32))


def memory(pages: mx.array) -> NDArray[Any]:
    """The memory of ``pages``, not a copy; bfloat16 as its bits."""
    mx.eval(pages)
    shown = np.array(pages.view(mx.uint16) if pages.dtype == mx.bfloat16 else pages, copy=False)
    assert shown.flags.c_contiguous, "pages are a view of something else"
    assert not shown.flags.owndata, "not the pages' own memory"
    return shown[0]


def read(pages: PageArrays, slots: NDArray[Any], dim: int) -> NDArray[np.float32]:
    """Rows [kv_heads, slots, dim]."""
    if isinstance(pages, PackedPages):
        words, scales, biases = (mx.array(memory(some)[:, slots]) for some in pages)
        scales, biases = (some.view(pages.scales.dtype).astype(mx.float32) for some in (scales, biases))
        size, bits = dim // pages.scales.shape[3], pages.words.shape[3] * 32 // dim
        return np.array(mx.dequantize(words, scales, biases, group_size=size, bits=bits))
    rows = memory(pages)[:, slots]
    if pages.dtype == mx.bfloat16:
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float32)


def write(pages: PageArrays, slots: NDArray[Any], rows: NDArray[np.float32]) -> None:
    """Put ``rows`` [kv_heads, slots, dim], which the pages' type can hold as they are, into ``slots``."""
    if isinstance(pages, PackedPages):
        dim = rows.shape[-1]
        size, bits = dim // pages.scales.shape[3], pages.words.shape[3] * 32 // dim
        dtype = pages.scales.dtype
        packed = mx.quantize(mx.array(np.ascontiguousarray(rows)).astype(dtype), group_size=size, bits=bits)
        for some, part in zip(pages, packed, strict=True):
            memory(some)[:, slots] = np.array(part.view(mx.uint16) if part.dtype == mx.bfloat16 else part)
        return
    if pages.dtype == mx.bfloat16:
        rows = (np.ascontiguousarray(rows).view(np.uint32) >> 16).astype(np.uint16)
    memory(pages)[:, slots] = rows
