"""Do the attention kernels give what they should on this GPU? Asked at load, and by ``%vllm_metal bench --kernels``."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from engine.errors import error_line
from engine.runner.device.host import floats
from engine.runner.kernels import paged_attention as gpu
from engine.runner.kernels.gpu_states import GPU_STATE_KERNELS
from engine.runner.kernels.joined_attention import HeadConstants, joined_attention
from engine.runner.kernels.kernel_cache import collecting, compile_all
from engine.runner.kernels.latent_attention import latent_attention
from engine.runner.kernels.page_check import CheckedPages
from engine.runner.kernels.page_format import PageArrays
from engine.runner.kernels.reference import attention, difference
from engine.runner.kernels.state_kernels import StateKernels

TOLERANCE: dict[mx.Dtype, float] = {mx.bfloat16: 8e-3, mx.float16: 1.5e-3, mx.float32: 2e-5}
"""Of the norm of a row's output. Seen on an H200: 1.8e-3, 2e-4 and 3e-7."""
_LONGEST_WINDOW = 16384
"""Tokens; the check of a longer one would take seconds and hundreds of megabytes."""
MOST_KV_HEADS = 2
"""No kernel's text depends on their number."""


class AttentionKernels(Protocol):
    """What a backend computes attention over pages with. See :mod:`engine.runner.kernels.paged_attention`."""

    @property
    def states(self) -> StateKernels:
        """What it keeps recurrent states with."""

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
        """Decode attention; writes the new rows in place."""

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
        """A chunk's keys and values with those before it; writes the chunk's in place."""

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
        """Decode attention from a joined product, [rows, heads * D]; writes the new rows in place."""

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
        """Decode attention of all heads over latent vectors; writes the new rows in place."""

    def attention_problem(
        self,
        *,
        dtype: mx.Dtype,
        heads: int,
        kv_heads: int,
        key_dim: int,
        value_dim: int,
        block_size: int,
        window: int | None = None,
        sinks: bool = False,
        softcap: float | None = None,
        scale: float | None = None,
        bits: int = 0,
        latent: bool = False,
    ) -> str | None:
        """One line on what goes wrong for such layers, None if nothing does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """Layers that share a kernel: ``dtype`` is that of queries and pages, ``scale`` D ** -0.5 if None.

    ``bits`` of an element in packed pages, 0 in plain ones. ``latent``: all heads share a key that is their value too,
    of ``key_dim`` elements, beside ``value_dim`` elements that only the key has.
    """

    dtype: mx.Dtype
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    block_size: int
    window: int | None = None
    sinks: bool = False
    softcap: float | None = None
    scale: float | None = None
    bits: int = 0
    latent: bool = False

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.heads // self.kv_heads

    @property
    def used_scale(self) -> float:
        """The scale of the scores."""
        return self.key_dim**-0.5 if self.scale is None else self.scale

    @property
    def result_dim(self) -> int:
        """Elements of a head's result."""
        return self.key_dim if self.latent else self.value_dim


class GpuKernels:
    """The kernels on this machine's GPU."""

    def __init__(self) -> None:
        self._right: set[AttentionShape] = set()

    paged_attention = staticmethod(gpu.paged_attention)
    joined_attention = staticmethod(joined_attention)
    latent_attention = staticmethod(latent_attention)
    collect = staticmethod(gpu.collect)
    states = GPU_STATE_KERNELS

    def attention_problem(self, **shape: Any) -> str | None:
        """See :func:`attention_problem`. What was right is not computed again in this process."""
        asked = AttentionShape(**shape)
        problem = None if asked in self._right else attention_problem(asked, self)
        if problem is None:
            self._right.add(asked)
        return problem

    def compile_all(self, shapes: Iterable[AttentionShape]) -> None:
        """Compile what layers of ``shapes`` use, several kernels at a time, where that can be done beforehand."""
        with collecting() as awaited:
            for shape in shapes:
                _launch_each(shape, self)
        compile_all(awaited)


GPU_KERNELS = GpuKernels()


def attention_problem(
    shape: AttentionShape, kernels: AttentionKernels = GPU_KERNELS, lengths: Sequence[int] = ()
) -> str | None:
    """Run ``kernels`` on small random tensors of ``shape``, beside numpy: one line on the first thing wrong, or None.

    Four steps of ragged rows, some of them padding, with one split and several; before the last a sequence's blocks
    are freed and a new one's prompt is collected into them. NaN lies in every slot that was never written. What this
    compiles is what a model of this shape uses. ``lengths`` of the rows, if others than usual: the second 0, the
    longest above three blocks. Raises nothing.
    """
    try:
        if isinstance(kernels, GpuKernels):
            kernels.compile_all([shape])
        return _Check(shape, kernels, lengths).run()
    except Exception as error:  # noqa: BLE001  (whatever stops a kernel, the layers have another path)
        return error_line(error)


def _launch_each(shape: AttentionShape, kernels: AttentionKernels) -> None:
    """Launch each kernel that layers of this shape use, on zeros; nothing is evaluated."""
    dims, kv_heads, rows = (shape.key_dim, shape.value_dim), 1 if shape.latent else 2, 8
    pages = [CheckedPages(shape.dtype, kv_heads, shape.block_size, dim, shape.bits) for dim in dims]
    for some in pages:
        some.fill()
    key_pages, value_pages = (some.arrays for some in pages)
    integers = mx.zeros((rows,), mx.int32)
    new_keys, new_values = (mx.zeros((rows, kv_heads, 1, dim), shape.dtype) for dim in dims)
    queries, rope_queries = (mx.zeros((rows, kv_heads * shape.group, 1, dim), shape.dtype) for dim in dims)
    sinks = mx.zeros((kv_heads * shape.group,), shape.dtype) if shape.sinks else None
    for splits in (1, 2):
        launch(
            kernels, shape, queries, rope_queries, new_keys, new_values, key_pages, value_pages, integers[:, None],
            integers, sinks, splits, gpu.arrival_counters(rows * kv_heads * shape.group),
        )  # fmt: skip
    kernels.collect(
        new_keys[:1], new_values[:1], key_pages, value_pages, integers, integers[:4], block_size=shape.block_size,
        length=1,
    )  # fmt: skip


def launch(
    kernels: AttentionKernels, shape: AttentionShape, queries: mx.array, rope_queries: mx.array, new_keys: mx.array,
    new_values: mx.array, key_pages: PageArrays, value_pages: PageArrays, block_tables: mx.array, positions: mx.array,
    sinks: mx.array | None, splits: int | None, arrivals: mx.array | None,
) -> mx.array:  # fmt: skip
    """The launch that layers of this shape use for single rows."""
    if shape.latent:
        assert isinstance(key_pages, mx.array), "packed latent pages"
        assert isinstance(value_pages, mx.array), "packed latent pages"
        return kernels.latent_attention(
            queries, rope_queries, new_keys, new_values, key_pages, value_pages, block_tables, positions,
            scale=shape.used_scale, block_size=shape.block_size, splits=splits, arrivals=arrivals,
        )  # fmt: skip
    return kernels.paged_attention(
        queries, new_keys, new_values, key_pages, value_pages, block_tables, positions, scale=shape.used_scale,
        block_size=shape.block_size, window=shape.window, sinks=sinks, softcap=shape.softcap, splits=splits,
        arrivals=arrivals,
    )  # fmt: skip


@dataclass(slots=True)
class _Sequence:
    """What is known of one sequence: its blocks, and its keys [kv_heads, n, D] and values, as given, in float32."""

    blocks: list[int]
    keys: NDArray[np.float32]
    values: NDArray[np.float32]

    def append(self, keys: NDArray[np.float32], values: NDArray[np.float32]) -> None:
        self.keys = np.concatenate([self.keys, keys], axis=1)
        self.values = np.concatenate([self.values, values], axis=1)


@dataclass(slots=True)
class _Check:
    """Sequences in pages, and what the pages should hold."""

    shape: AttentionShape
    kernels: AttentionKernels
    lengths: Sequence[int]
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(9))
    pages: list[CheckedPages] = field(default_factory=list)
    sequences: list[_Sequence | None] = field(default_factory=list)
    newest: mx.array = field(default_factory=lambda: mx.zeros((8,)))
    arrivals: mx.array | None = None

    @property
    def kv_heads(self) -> int:
        return min(self.shape.kv_heads, MOST_KV_HEADS)

    @property
    def dims(self) -> tuple[int, int]:
        return self.shape.key_dim, self.shape.value_dim

    def run(self) -> str | None:
        """The first problem of all steps."""
        self._fill()
        self.arrivals = gpu.arrival_counters(len(self.sequences) * self.kv_heads * self.shape.group)
        for splits in (1, 3, 3):  # counters of arrivals that a launch leaves wrong are the next one's
            if problem := self._decode(splits):
                return f"{problem} ({'one split' if splits == 1 else 'several splits'})"
        return self._reuse() or self._decode(None) or self._changed()

    def _fill(self) -> None:
        """Sequences of mixed lengths in pages, with room for a few tokens more."""
        size, window = self.shape.block_size, self.shape.window
        reach = window if window and window <= _LONGEST_WINDOW else 0
        lengths = self.lengths or [1, 0, size, 3 * size + 1, 333, size - 1, 2, reach + size + 3, 100]
        counts = [math.ceil((length + 4) / size) if length else 0 for length in lengths]
        order = self.rng.permutation(sum(counts) + 3).tolist()
        self.pages = [
            CheckedPages(self.shape.dtype, self.kv_heads, len(order) * size, dim, self.shape.bits) for dim in self.dims
        ]
        for length, count in zip(lengths, counts, strict=True):
            blocks = [order.pop() for _ in range(count)]
            keys, values = (self._random(self.kv_heads, length, dim)[1] for dim in self.dims)
            self.sequences.append(_Sequence(blocks, keys, values) if length else None)
            self._expect(self.sequences[-1], 0)
        for pages in self.pages:
            pages.fill()

    def _random(self, *shape: int) -> tuple[mx.array, NDArray[np.float32]]:
        """Random numbers in the element type, and the same in float32."""
        rows = mx.array(self.rng.standard_normal(shape, dtype=np.float32)).astype(self.shape.dtype)
        return rows, floats(rows)

    def _expect(self, sequence: _Sequence | None, first: int) -> None:
        """The sequence's rows from position ``first`` on are in its slots."""
        if sequence is None:
            return
        positions, size = np.arange(first, sequence.keys.shape[1]), self.shape.block_size
        slots = np.array(sequence.blocks)[positions // size] * size + positions % size
        for pages, rows in zip(self.pages, (sequence.keys, sequence.values), strict=True):
            pages.expect(slots, rows[:, first:])

    def _decode(self, splits: int | None) -> str | None:
        """One new token for every sequence; a problem of the output."""
        shape, rows, heads = self.shape, len(self.sequences), self.kv_heads * self.shape.group
        queries, known_queries = self._random(rows, heads, 1, shape.key_dim)
        rope_queries, known_ropes = self._random(rows, heads, 1, shape.value_dim)
        (keys, known_keys), (values, known_values) = (self._random(rows, self.kv_heads, 1, dim) for dim in self.dims)
        sinks, known_sinks = self._random(heads)
        options: dict[str, Any] = {"scale": shape.used_scale, "window": shape.window, "softcap": shape.softcap}
        positions = [sequence.keys.shape[1] if sequence else -1 for sequence in self.sequences]
        key_pages, value_pages = (pages.arrays for pages in self.pages)
        dim = shape.result_dim
        parts = ((rows, heads, 3, size) for size in (dim, 2, dim + 2))
        _leave_nan(shape.dtype, (rows, heads, dim), *parts)
        out = launch(
            self.kernels, shape, queries, rope_queries, keys, values, key_pages, value_pages, self._tables(),
            mx.array(positions, mx.int32) + self._after(), sinks if shape.sinks else None, splits, self.arrivals,
        )  # fmt: skip
        self.newest = out
        got = floats(out)[:, :, 0]
        for row, sequence in enumerate(self.sequences):
            wanted = np.zeros_like(got[row])
            if sequence is not None:
                sequence.append(known_keys[row], known_values[row])
                self._expect(sequence, positions[row])
                known, seen_values = known_queries[row, :, 0], self.pages[1].given_back(sequence.values)
                seen_keys = self.pages[0].given_back(sequence.keys)
                if shape.latent:
                    known = np.concatenate([known, known_ropes[row, :, 0] / shape.used_scale], axis=-1)
                    seen_keys, seen_values = np.concatenate([seen_keys, seen_values], axis=-1), seen_keys
                wanted = attention(known, seen_keys, seen_values, sinks=known_sinks if shape.sinks else None, **options)
            if problem := difference(got[row], wanted, TOLERANCE[shape.dtype]):
                return f"{f'{positions[row] + 1} tokens' if sequence else 'a padding row'}: {problem}"
        return None

    def _tables(self) -> mx.array:
        """Wider than any sequence; behind its blocks lies somebody's."""
        width = 2 + max(len(sequence.blocks) for sequence in self.sequences if sequence)
        tables = np.zeros((len(self.sequences), width), np.int32)
        for table, sequence in zip(tables, self.sequences, strict=True):
            if sequence is not None:
                table[: len(sequence.blocks)] = sequence.blocks
        return mx.array(tables) + self._after()

    def _after(self) -> mx.array:
        """Zero, computed from the output of the newest launch: what takes it comes after that launch."""
        some = self.newest.reshape(-1)[:1]
        return (some != some).astype(mx.int32) * 0

    def _reuse(self) -> str | None:
        """Free the longest sequence, and collect a new one's prompt, in two chunks, into its blocks."""
        longest = max((one for one in self.sequences if one), key=lambda one: len(one.blocks))
        self.sequences[self.sequences.index(longest)] = None
        size, window = self.shape.block_size, self.shape.window
        first, length = size + size // 2 + 1, 3 * size
        (keys, known_keys), (values, known_values) = (self._random(1, self.kv_heads, length, dim) for dim in self.dims)
        key_pages, value_pages = (pages.arrays for pages in self.pages)
        sequence = _Sequence(longest.blocks[::-1], known_keys[0], known_values[0])
        self.sequences[1] = sequence
        self._expect(sequence, 0)
        for start, end in ((0, first), (first, length)):
            begin = max(0, start + 1 - window) if window else 0
            table = [block if at >= begin // size else 0 for at, block in enumerate(sequence.blocks)]
            _leave_nan(self.shape.dtype, *((1, self.kv_heads, end - begin, dim) for dim in self.dims))
            got = self.kernels.collect(
                keys[:, :, start:end], values[:, :, start:end], key_pages, value_pages,
                mx.array(table, mx.int32), mx.array([begin, start, 0, 0], mx.int32) + self._after(),
                block_size=size, length=end - begin,
            )  # fmt: skip
            self.newest = got[0].reshape(-1)[:1] + got[1].reshape(-1)[:1]
            named = zip(("keys", "values"), got, (known_keys, known_values), self.pages, strict=True)
            for name, rows, known, pages in named:
                if not pages.collected_right(rows, known[0][:, begin:end]):
                    return f"collected {name} of positions {begin} to {end} are wrong"
        return None

    def _changed(self) -> str | None:
        """Whether a slot holds what it should not."""
        for name, pages in zip(("key", "value"), self.pages, strict=True):
            if problem := pages.problem(self._after()):
                return f"{name} pages: {problem}"
        return None


def _leave_nan(dtype: mx.Dtype, *shapes: tuple[int, ...]) -> None:
    """Leave freed memory full of NaN, for outputs to land in."""
    mx.eval([mx.full(shape, math.nan, dtype=kind) for shape in shapes for kind in (dtype, mx.float32)])
