"""Splits joined by the last block to arrive, beside a second launch that joins them: the CUDA texts on this machine."""

import shutil
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.params.kv_dtype import group_size
from engine.runner.kernels import paged_attention as module
from engine.runner.kernels.joined_attention import HeadConstants, HeadNorms, joined_attention
from engine.runner.kernels.joined_check import joined_problem
from engine.runner.kernels.page_format import PackedPages, PageArrays
from engine.runner.kernels.paged_attention import arrival_counters, paged_attention
from engine.runner.kernels.self_check import GPU_KERNELS, AttentionShape, _launch_each, attention_problem, launch
from tests.engine.runner.kernels.conftest import TextKernels
from tests.engine.runner.kernels.test_attention_text import FEW, shape
from tests.engine.runner.kernels.test_joined_attention import QWEN3
from tests.engine.runner.kernels.text_on_host import HostKernel

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the kernels' text")
cuda = pytest.mark.parametrize("dialect", ["cuda"])

LENGTHS = (200, 1, 0, 70, 333)
"""Tokens of the rows, the new one among them: some have fewer passes than the launch has splits."""
WIDTH = -(-max(LENGTHS) // 16)
PLAIN = shape(mx.bfloat16, 128, 4, 2)
SHAPES = {
    "plain": (PLAIN, False),
    "one warp, sinks": (shape(mx.float16, 64, 7, sinks=True), False),
    "float32, cap, window": (shape(mx.float32, 96, 2, 2, softcap=30.0, window=100), False),
    "packed": (shape(mx.float32, 64, 2, bits=8), False),
    "latent": (shape(mx.float32, (128, 32), 3, latent=True), False),
    "tensor cores, sinks, window": (shape(mx.bfloat16, 64, 16, 2, sinks=True, window=150), True),
    "tensor cores, cap": (shape(mx.float16, 256, 8, softcap=50.0), True),
    "tensor cores, several blocks of a kv head": (shape(mx.float16, (192, 128), 24, 2), True),
    "tensor cores, packed": (shape(mx.bfloat16, 128, 4, 2, bits=4), True),
    "tensor cores, latent": (shape(mx.float16, (256, 32), 40, latent=True), True),
}


@dataclass
class Launch:
    """What one launch gives, and how it leaves the pages."""

    out: mx.array
    pages: list[mx.array]

    def same_as(self, other: "Launch") -> bool:
        """Bit for bit."""
        both = zip((self.out, *self.pages), (other.out, *other.pages), strict=True)
        return all(np.array_equal(np.array(a.view(mx.uint8)), np.array(b.view(mx.uint8))) for a, b in both)


@dataclass
class Case:
    """Ragged rows of one shape; every launch has fresh pages of the same numbers."""

    one: AttentionShape

    def pages(self, dim: int, seed: int) -> PageArrays:
        kv_heads, slots = 1 if self.one.latent else self.one.kv_heads, 16 * len(LENGTHS) * WIDTH
        plain = random(1, kv_heads, slots, dim, dtype=self.one.dtype, seed=seed)
        if not self.one.bits:
            return plain
        packed = mx.quantize(plain, group_size(dim), self.one.bits)
        return PackedPages(*(mx.contiguous(some) for some in packed))

    def run(self, splits: int, arrivals: mx.array | None) -> Launch:
        one, rows = self.one, len(LENGTHS)
        kv_heads, dims = 1 if one.latent else one.kv_heads, (one.key_dim, one.value_dim)
        pages = [self.pages(dim, seed) for seed, dim in enumerate(dims, 1)]
        arrays = [array for some in pages for array in (some if isinstance(some, PackedPages) else [some])]
        tables = np.random.default_rng(1).permutation(rows * WIDTH).astype(np.int32).reshape(rows, WIDTH)
        queries, ropes = (random(rows, kv_heads * one.group, 1, dim, dtype=one.dtype) for dim in dims)
        keys, values = (random(rows, kv_heads, 1, dim, dtype=one.dtype, seed=5) for dim in dims)
        sinks = random(kv_heads * one.group, dtype=one.dtype) if one.sinks else None
        positions = mx.array([length - 1 for length in LENGTHS] + [7, 7, 7], mx.int32)
        out = launch(
            GPU_KERNELS, one, queries, ropes, keys, values, pages[0], pages[1], mx.array(tables), positions, sinks,
            splits, arrivals,
        )  # fmt: skip
        return Launch(out, arrays)


def random(*sizes: int, dtype: mx.Dtype, seed: int = 0) -> mx.array:
    array = mx.random.normal(sizes, key=mx.random.key(seed + sum(sizes))).astype(dtype)
    mx.eval(array)
    return array


@pytest.fixture
def kernels(text_kernels: TextKernels, monkeypatch: pytest.MonkeyPatch) -> dict[str, HostKernel]:
    return text_kernels(module)


@needs_compiler
@cuda
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_the_last_block_gives_what_a_second_launch_gives_to_the_bit(
    name: str, splits: int, kernels: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, on_tensor_cores = SHAPES[name]
    monkeypatch.setattr(module, "tensor_cores", lambda: on_tensor_cores)
    case, arrivals = Case(one), arrival_counters(len(LENGTHS) * one.heads)
    assert arrivals is not None
    wanted = case.run(splits, None)
    first = case.run(splits, arrivals)
    for kernel in kernels.values():
        kernel.backwards = True
    second = case.run(splits, arrivals)  # on counters that are as the first launch left them
    assert first.same_as(wanted)
    assert second.same_as(wanted)
    assert not np.array(arrivals).any()
    assert sum("_last" in name for name in kernels) == (splits > 1)


@needs_compiler
@cuda
@pytest.mark.parametrize("on_tensor_cores", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
def test_a_joined_product_gives_the_same_to_the_bit(
    splits: int, on_tensor_cores: bool, kernels: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "tensor_cores", lambda: on_tensor_cores)
    dtype, rows = mx.bfloat16, len(LENGTHS)
    tables = mx.arange(rows * WIDTH, dtype=mx.int32).reshape(rows, WIDTH)
    positions = mx.array([length - 1 for length in LENGTHS] + [7, 7, 7], mx.int32)
    frequencies = 1e4 ** (-mx.arange(32) / 32)
    outs = []
    for arrivals in (None, arrival_counters(2 * rows)):
        pages = [random(1, 2, 16 * rows * WIDTH, 64, dtype=dtype, seed=seed) for seed in (1, 2)]
        norms = HeadNorms(random(64, dtype=dtype), random(64, dtype=dtype, seed=1), 1e-6)
        constants = HeadConstants.of(frequencies, norms)
        outs.append(joined_attention(
            random(rows, 20 * 64, dtype=dtype), *pages, tables, positions, constants, heads=16, scale=0.1,
            block_size=16, splits=splits, arrivals=arrivals,
        ))  # fmt: skip
    assert mx.array_equal(*outs)
    assert float(mx.abs(outs[0]).max()) > 0.1


@needs_compiler
@cuda
def test_more_splits_than_a_warp_has_lanes_are_joined_to_the_bit(kernels: dict[str, HostKernel]) -> None:
    """Of some 2 and 35 passes: a lane has the sums of two splits, and two launches of 300 have room for many more."""
    arrays = [random(2, 4, 1, 64, dtype=mx.float32), *(random(2, 1, 1, 64, dtype=mx.float32) for _ in range(2))]
    tables, positions = mx.arange(2 * 70, dtype=mx.int32).reshape(2, 70), mx.array([1099, 40], mx.int32)
    pages = [random(1, 1, 140 * 16, 64, dtype=mx.float32, seed=seed) for seed in (1, 2)]
    for splits in (40, 300):
        outs = [
            paged_attention(
                *arrays, *pages, tables, positions, scale=0.1, block_size=16, splits=splits, arrivals=arrivals
            )
            for arrivals in (None, arrival_counters(2))
        ]
        assert mx.array_equal(*outs)


@needs_compiler
@cuda
def test_one_launch_takes_the_counters_and_gives_the_result_and_the_parts(
    kernels: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    launches: list[tuple[str, int, int]] = []
    usual = HostKernel.__call__

    def counted(self: HostKernel, **how: Any) -> list[mx.array]:
        launches.append((self._name, len(how["inputs"]), len(how["output_shapes"])))
        return usual(self, **how)

    monkeypatch.setattr(HostKernel, "__call__", counted)
    case, arrivals = Case(PLAIN), arrival_counters(len(LENGTHS) * 2)
    for splits, given in ((1, None), (1, arrivals), (3, None), (3, arrivals)):
        case.run(splits, given)
    assert launches == [
        ("paged_attention", 7, 3),
        ("paged_attention_alone", 7, 1),
        ("paged_attention", 7, 3),
        ("paged_attention_reduce", 2, 1),
        ("paged_attention_last", 8, 2),
    ]


FAULTS = {
    "a counter that is not set back": ("atomicInc(arrived, others)", "unsigned(atomicAdd((int*)arrived, 1))"),
    "a block with a part that does not arrive": ("if (splits > 1)\n", "if (splits > 1 && split > 0)\n"),
    "waiting for blocks that have nothing to do": ("others = splits - 1", "others = gridDim.x - 1"),
    "a padding row that nobody writes": ("if (split == 0) {", "if (split < 0) {"),
    "parts that are not weighed": ("weight = EXP2(pair.x - top)", "weight = 1.0f"),
    "a part that is left out": ("first + i < splits) read", "first + i < splits - 1) read"),
    "sums of another head": ("(sums) + head * splits", "(sums) + first_head * splits"),
}


@needs_compiler
@cuda
@pytest.mark.parametrize("on_tensor_cores", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_at_load(
    fault: str, on_tensor_cores: bool, kernels: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong = FAULTS[fault]
    broken(monkeypatch, right, wrong)
    monkeypatch.setattr(module, "tensor_cores", lambda: on_tensor_cores)
    one = shape(mx.bfloat16, 64, 8, 2)
    assert attention_problem(one, lengths=FEW) is not None


@needs_compiler
@cuda
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_before_layers_are_fused(
    fault: str, kernels: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch, *FAULTS[fault])
    assert joined_problem(QWEN3, GPU_KERNELS) is not None


def broken(monkeypatch: pytest.MonkeyPatch, right: str, wrong: str) -> None:
    """Put ``wrong`` in place of ``right`` in every text whose last block joins."""
    usual = module.ended

    def ended(*given: Any) -> tuple[str, str]:
        body, header = usual(*given)
        if "join_last" in header:
            assert right in body + header
        return body.replace(right, wrong), header.replace(right, wrong)

    monkeypatch.setattr(module, "ended", ended)


@pytest.fixture
def joins_in_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA."""
    monkeypatch.setattr(module, "joins_in_launch", lambda: True)
    monkeypatch.setattr(module, "blocks_at_once", lambda: 264)


@pytest.mark.parametrize(
    "arrivals", [mx.zeros((9,), mx.int32), mx.zeros((4,), mx.int32), mx.zeros((64,)), mx.zeros((8, 8), mx.int32)]
)
def test_counters_that_do_not_suffice_are_refused(arrivals: mx.array) -> None:
    given = [mx.zeros((5, 4, 1, 64)), *(mx.zeros((5, 2, 1, 64)) for _ in range(2)), *(mx.zeros((1, 2, 64, 64)),) * 2]
    with pytest.raises(ValueError, match="10 counters of arrivals are needed"):
        paged_attention(
            *given, mx.zeros((5, 4), mx.int32), mx.zeros((8,), mx.int32), scale=0.1, block_size=16, splits=2,
            arrivals=arrivals,
        )  # fmt: skip


def test_there_are_counters_for_every_launch_that_is_split(joins_in_launch: None) -> None:
    made = arrival_counters()
    assert made is not None
    assert (made.dtype, made.shape) == (mx.int32, (132,))
    assert not np.array(made).any()
    for blocks in range(1, 300):
        assert blocks <= made.size or module.number_of_splits(blocks, 1, 1 << 20, 16) == 1
    assert getattr(arrival_counters(200), "size", 0) == 200


def test_counters_are_never_so_few_that_they_lie_in_the_hosts_memory(
    joins_in_launch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "blocks_at_once", lambda: 4)
    assert getattr(arrival_counters(), "size", 0) == 8


def test_where_a_second_launch_joins_there_are_no_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "joins_in_launch", lambda: False)
    assert arrival_counters() is None


@dataclass
class Asked:
    """Kernels that compute nothing: their names, and the blocks of a row, of every launch."""

    launches: list[tuple[str, int]]

    def make(self, name: str, *_text: Any) -> Any:
        def kernel(*, grid: tuple[int, int, int], threadgroup: tuple[int, int, int], **how: Any) -> list[mx.array]:
            self.launches.append((name, grid[0] // threadgroup[0]))
            return [mx.zeros(size, kind) for size, kind in zip(how["output_shapes"], how["output_dtypes"], strict=True)]

        return kernel


@pytest.fixture
def asked(joins_in_launch: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What would be launched on CUDA."""
    kernels = Asked([])
    monkeypatch.setattr(module, "make_kernel", kernels.make)
    return kernels.launches


@pytest.mark.parametrize(
    ("kv_heads", "width", "splits"), [(8, 4096, 33), (2, 32, 14), (2, 256, 42), (2, 4096, 132), (1, 4096, 169)]
)
def test_a_block_is_given_no_more_parts_than_it_joins_quickly(
    kv_heads: int, width: int, splits: int, asked: list[tuple[str, int]]
) -> None:
    """Of a short context, where joining takes longer than reading; of a long one as many as fill the GPU."""
    heads, pages = 8 * kv_heads, mx.zeros((1, kv_heads, 16, 256), mx.bfloat16)
    paged_attention(
        mx.zeros((1, heads, 1, 256), mx.bfloat16), *(mx.zeros((1, kv_heads, 1, 256), mx.bfloat16),) * 2, pages, pages,
        mx.zeros((1, width), mx.int32), mx.zeros((8,), mx.int32), scale=0.1, block_size=16,
        arrivals=arrival_counters(),
    )  # fmt: skip
    assert asked == [("paged_attention_last", splits)]


def test_what_is_compiled_beforehand_is_what_steps_and_checks_launch(asked: list[tuple[str, int]]) -> None:
    """All of it, though what computes nothing is wrong from the first launch on."""
    _launch_each(PLAIN, GPU_KERNELS)
    assert asked == [("paged_attention_alone", 1), ("paged_attention_last", 2), ("collect_pages", 1)]
    asked.clear()
    assert joined_problem(QWEN3, GPU_KERNELS) is not None
    assert asked == [("joined_attention_normed_alone", 1)] + 2 * [("joined_attention_normed_last", 3)]
