"""The text of the attention kernels, both dialects, compiled for this machine and run on it.

Shows that the text is C++, that indices and arithmetic are right, and, where clang is found, that every pointer has its
address space. Races, speed and Apple's compiler are for a GPU: ``%vllm_metal bench --kernels``.
"""

import shutil
import subprocess
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.params.kv_dtype import group_size
from engine.runner.kernels import paged_attention as module
from engine.runner.kernels import paged_attention_text as text
from engine.runner.kernels.last_block_text import Ending
from engine.runner.kernels.page_format import PackedPages
from engine.runner.kernels.paged_attention import collect, paged_attention
from engine.runner.kernels.reference import attention
from engine.runner.kernels.self_check import AttentionShape, attention_problem
from tests.engine.runner.kernels.conftest import TextKernels
from tests.engine.runner.kernels.text_on_host import HERE, HostKernel

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the kernels' text")


def shape(dtype: mx.Dtype, dims: int | tuple[int, int], group: int, kv_heads: int = 1, **more: Any) -> AttentionShape:
    key_dim, value_dim = (dims, dims) if isinstance(dims, int) else dims
    return AttentionShape(
        dtype=dtype, heads=group * kv_heads, kv_heads=kv_heads, key_dim=key_dim, value_dim=value_dim,
        **{"block_size": 16, **more},
    )  # fmt: skip


LLAMA = shape(mx.bfloat16, 128, 4, 2)
SHAPES = {
    "bf16 128 of 4": LLAMA,
    "bf16 64 of 8, sinks, window": shape(mx.bfloat16, 64, 8, 2, sinks=True, window=128),
    "bf16 256 of 2, cap, window": shape(mx.bfloat16, 256, 2, softcap=50.0, window=200, scale=0.07),
    "bf16 512 of 8": shape(mx.bfloat16, 512, 8),
    "bf16 96 of 1, blocks of 32": shape(mx.bfloat16, 96, 1, block_size=32),
    "bf16 128 of 12": shape(mx.bfloat16, 128, 12),
    "f16 192 and 128 of 1": shape(mx.float16, (192, 128), 1, 2),
    "f16 64 of 7, sinks": shape(mx.float16, 64, 7, sinks=True),
    "f32 64 of 3, window, blocks of 8": shape(mx.float32, 64, 3, 2, window=64, block_size=8),
    "f32 256 of 8, cap": shape(mx.float32, 256, 8, softcap=30.0),
    "f32 16 of 2": shape(mx.float32, 16, 2),
}
ON_CUDA = [name for name in SHAPES if name.startswith(("bf16 128 of 4", "bf16 64", "f16 192", "f32 16"))]


@pytest.fixture
def kernels(text_kernels: TextKernels) -> dict[str, HostKernel]:
    return text_kernels(module)


def launched(name: str, collect: str, *, cuda: bool) -> set[str]:
    """Kernels of a check, without sinks: splits are joined by the last block, or by another launch."""
    return {f"{name}_alone", f"{name}_last", collect} if cuda else {name, "paged_attention_reduce", collect}


@pytest.mark.parametrize(
    ("dialect", "name"), [*(("metal", name) for name in SHAPES), *(("cuda", name) for name in ON_CUDA)]
)
def test_the_text_gives_what_numpy_gives(name: str, dialect: str, kernels: dict[str, HostKernel]) -> None:
    assert attention_problem(SHAPES[name]) is None
    named = {one.replace("_sinks", "") for one in kernels}
    assert named == launched("paged_attention", "collect_pages", cuda=dialect == "cuda")


FEW = (1, 0, 16, 170, 31, 2, 70)
"""Lengths of the rows where more would take long: of several passes all the same."""
PACKED = {
    "bf16 128 of 4, 8 bits": shape(mx.bfloat16, 128, 4, 2, bits=8),
    "bf16 128 of 8, 4 bits, window": shape(mx.bfloat16, 128, 8, bits=4, window=100),
    "f16 96 and 64 of 3, 8 bits, sinks": shape(mx.float16, (96, 64), 3, 2, bits=8, sinks=True),
    "f16 32 of 2, 4 bits, cap": shape(mx.float16, 32, 2, bits=4, softcap=20.0),
    "f32 64 of 2, 8 bits, blocks of 8": shape(mx.float32, 64, 2, bits=8, block_size=8),
    "bf16 256 of 16, 8 bits": shape(mx.bfloat16, 256, 16, bits=8),
}


@pytest.mark.parametrize(
    ("dialect", "name"),
    [*(("metal", name) for name in PACKED), *(("cuda", name) for name in PACKED if "128" in name or "f16" in name)],
)
def test_packed_pages_are_read_and_written_as_numpy_does(
    name: str, dialect: str, kernels: dict[str, HostKernel]
) -> None:
    assert attention_problem(PACKED[name], lengths=FEW) is None
    named = {one.replace("_sinks", "") for one in kernels}
    assert named == launched("paged_attention_packed", "collect_packed_pages", cuda=dialect == "cuda")


ON_TENSOR_CORES = {
    "bf16 128 of 8": shape(mx.bfloat16, 128, 8, 2),
    "f16 64 of 16, sinks, window": shape(mx.float16, 64, 16, sinks=True, window=100),
    "bf16 256 of 8, cap": shape(mx.bfloat16, 256, 8, softcap=50.0, scale=0.07),
    "bf16 512 of 8": shape(mx.bfloat16, 512, 8),
    "bf16 96 of 12, blocks of 32": shape(mx.bfloat16, 96, 12, block_size=32),
    "f16 192 and 128 of 24": shape(mx.float16, (192, 128), 24),
} | {name: one for name, one in PACKED.items() if not name.startswith("f32")}


@pytest.mark.parametrize("dialect", ["cuda"])
@pytest.mark.parametrize("name", ON_TENSOR_CORES)
def test_tensor_cores_give_what_numpy_gives(
    name: str, kernels: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "tensor_cores", lambda: True)
    assert attention_problem(ON_TENSOR_CORES[name], lengths=FEW) is None
    assert any(one.startswith("paged_attention_mma") for one in kernels)


LATENT = {
    "bf16 512 and 64 of 16": shape(mx.bfloat16, (512, 64), 16, latent=True, scale=0.07),
    "f16 256 and 32 of 40": shape(mx.float16, (256, 32), 40, latent=True),
    "f32 128 and 32 of 3": shape(mx.float32, (128, 32), 3, latent=True, block_size=8),
}


@pytest.mark.parametrize(
    ("dialect", "name", "on_tensor_cores"),
    [
        *(("metal", name, False) for name in LATENT),
        ("cuda", "bf16 512 and 64 of 16", False),
        ("cuda", "bf16 512 and 64 of 16", True),
        ("cuda", "f16 256 and 32 of 40", True),
    ],
)
def test_latent_pages_are_the_keys_and_values_of_all_heads(
    name: str, on_tensor_cores: bool, dialect: str, kernels: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "tensor_cores", lambda: on_tensor_cores)
    assert attention_problem(LATENT[name], lengths=FEW) is None
    name = f"latent_attention{'_mma' * on_tensor_cores}"
    assert set(kernels) == launched(name, "collect_pages", cuda=dialect == "cuda")


def random(*sizes: int, dtype: mx.Dtype = mx.bfloat16, seed: int = 0) -> mx.array:
    array = mx.random.normal(sizes, key=mx.random.key(seed + sum(sizes))).astype(dtype)
    mx.eval(array)
    return array


def floats(array: mx.array) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.array(array.astype(mx.float32))


def decode(lengths: list[int], width: int, *, extra_positions: int = 0, **options: Any) -> tuple[mx.array, mx.array]:
    """The output for rows of ``lengths`` tokens, block after block in pages of random rows, and the keys' pages."""
    rows, blocks = len(lengths), 2 + sum(-(-length // 16) for length in lengths)
    key_pages, value_pages = random(1, 2, blocks * 16, 128, seed=1), random(1, 2, blocks * 16, 128, seed=2)
    tables, next_block = np.full((rows, width), blocks - 1, np.int32), 0
    for table, length in zip(tables, lengths, strict=True):
        table[: -(-length // 16)] = np.arange(next_block, next_block + -(-length // 16))
        next_block += -(-length // 16)
    positions = mx.array([length - 1 for length in lengths] + [99999] * extra_positions, mx.int32)
    out = paged_attention(
        random(rows, 8, 1, 128), random(rows, 2, 1, 128, seed=3), random(rows, 2, 1, 128, seed=4), key_pages,
        value_pages, mx.array(tables), positions, scale=0.1, block_size=16, **options,
    )  # fmt: skip
    return out, key_pages


def test_a_table_wider_than_the_rows_changes_nothing(kernels: dict[str, HostKernel]) -> None:
    narrow, pages = decode([200, 9, 0, 65], 13, splits=3)
    wide, same_pages = decode([200, 9, 0, 65], 64, splits=3, extra_positions=4)
    assert mx.array_equal(narrow, wide)
    assert mx.array_equal(pages, same_pages)


def test_splits_are_cut_from_each_rows_own_tokens(kernels: dict[str, HostKernel]) -> None:
    """In a wide table every split of a long row still has tokens, and those behind a short row's end have none."""
    pass_length = module.attention_geometry(128, 128, 4, 2).tokens_per_pass
    given: list[mx.array] = []
    kernel = module._attention_text(False, False, False).kernel(Ending.SECOND_LAUNCH, on_tensor_cores=False)

    def spy(**launch: Any) -> list[mx.array]:
        given.extend(kernel(**launch))
        return given

    kernels["paged_attention"] = spy  # type: ignore[assignment]
    decode([2 * pass_length + 3, 5, 0], 200, splits=3)
    out, part, sums = (floats(array) for array in given)
    assert (sums[..., 1] < 0).tolist() == [[[False] * 3] * 8, [[False, True, True]] * 8, [[True] * 3] * 8]
    assert np.isfinite(part[0]).all()
    assert np.isnan(part[1, :, 1:]).all()
    assert np.isnan(out).all(), "the splits' output was written"


def test_more_splits_than_a_warp_has_lanes_are_joined(kernels: dict[str, HostKernel]) -> None:
    length = 2300
    several, _ = decode([length, 70], 150, splits=40)
    one, _ = decode([length, 70], 150, splits=1)
    assert np.linalg.norm(floats(several) - floats(one)) < 4e-3 * np.linalg.norm(floats(one))


def test_one_row_with_a_short_table_is_served(kernels: dict[str, HostKernel]) -> None:
    """Inputs of fewer than eight elements lie in Metal's constant memory."""
    out, pages = decode([40], 3)
    queries, values = random(1, 8, 1, 128), random(1, 2, 5 * 16, 128, seed=2)
    values[0, :, 39] = random(1, 2, 1, 128, seed=4)[0, :, 0]
    wanted = attention(floats(queries)[0, :, 0], floats(pages)[0, :, :40], floats(values)[0, :, :40], scale=0.1)
    assert np.linalg.norm(floats(out)[0, :, 0] - wanted) < 8e-3 * np.linalg.norm(wanted)


def test_a_layer_that_shares_pages_may_write_the_same_rows_again(kernels: dict[str, HostKernel]) -> None:
    arrays = [random(2, 8, 1, 128), random(2, 2, 1, 128), random(2, 2, 1, 128, seed=1)]
    pages = [random(1, 2, 64, 128), random(1, 2, 64, 128, seed=1)]
    places = [mx.array([[0, 2], [3, 1]], mx.int32), mx.array([20, 3], mx.int32)]
    first = paged_attention(*arrays, *pages, *places, scale=0.1, block_size=16)
    before = [mx.array(page) for page in pages]
    again = paged_attention(*arrays, *pages, *places, scale=0.1, block_size=16)
    assert mx.array_equal(first, again)
    assert all(mx.array_equal(page, same) for page, same in zip(pages, before, strict=True))


@pytest.mark.parametrize(("begin", "start", "num_new"), [(0, 0, 5), (37, 53, 30), (37, 37, 1), (16, 31, 2)])
def test_collect_reads_what_lies_before_a_chunk_and_writes_the_chunk(
    begin: int, start: int, num_new: int, kernels: dict[str, HostKernel]
) -> None:
    table = [0 if position < begin // 16 else block for position, block in enumerate([4, 1, 6, 2, 5, 7])]
    end = start + num_new
    slots = [table[position // 16] * 16 + position % 16 for position in range(begin, end)]
    new, pages, wanted = [], [], []
    for dim in (64, 96):
        rows = random(1, 2, num_new, dim)
        old = np.full((1, 2, 128, dim), np.nan, np.float32)
        old[:, :, slots[: start - begin]] = floats(random(1, 2, start - begin, dim)) if start > begin else 0
        page = mx.array(old).astype(mx.bfloat16)
        mx.eval(page)
        old[:, :, slots[start - begin :]] = floats(rows)
        new, pages, wanted = [*new, rows], [*pages, page], [*wanted, old]
    got = collect(
        *new, *pages, mx.array(table, mx.int32), mx.array([begin, start, 0, 0], mx.int32), block_size=16,
        length=end - begin,
    )  # fmt: skip
    for rows, page, expected in zip(got, pages, wanted, strict=True):
        assert np.array_equal(floats(rows), expected[:, :, slots])
        assert np.array_equal(floats(page), expected, equal_nan=True)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("dtype", "dim"), [(mx.bfloat16, 128), (mx.float16, 96), (mx.float32, 64)])
def test_rows_are_packed_to_the_bit_as_mlx_packs_them(
    dtype: mx.Dtype, dim: int, bits: int, kernels: dict[str, HostKernel]
) -> None:
    """By a chunk's launch and by a single row's; what a chunk gets back is what the pages hold."""
    size = group_size(dim)
    assert size is not None
    pages = [
        PackedPages(*(mx.contiguous(some) for some in mx.quantize(mx.zeros((1, 2, 96, dim), dtype), size, bits)))
        for _ in range(2)
    ]
    mx.eval(pages)
    rows = [random(1, 2, 41, dim, dtype=dtype, seed=seed) * 3 for seed in (1, 2)]
    table = mx.array([4, 1, 5, 0, 0, 0, 0, 0], mx.int32)
    chunk = [some[:, :, :40] for some in rows]
    got = collect(*chunk, *pages, table, mx.array([0, 0, 0, 0], mx.int32), block_size=16, length=40)
    single = [some[:, :, 40:] for some in rows]
    queries = random(1, 4, 1, dim, dtype=dtype)
    mx.eval(paged_attention(
        queries, *single, *pages, table[None], mx.array([40] + [-1] * 7, mx.int32), scale=0.1, block_size=16
    ))  # fmt: skip
    slots = [block * 16 + at for block in (4, 1, 5) for at in range(16)][:41]
    for some, page, back in zip(rows, pages, got, strict=True):
        wanted = mx.quantize(mx.contiguous(some), size, bits)
        for array, expected in zip(page, wanted, strict=True):
            assert mx.array_equal(array[:, :, mx.array(slots)], expected)
        unpacked = mx.dequantize(*(part[:, :, :40].astype(mx.float32) if part.dtype != mx.uint32 else part[:, :, :40]
                                   for part in wanted), group_size=size, bits=bits)  # fmt: skip
        assert mx.allclose(back, unpacked.astype(dtype), rtol=1e-2 if dtype == mx.bfloat16 else 1e-3, atol=1e-6)


@pytest.mark.parametrize("dialect", ["metal"])
@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("ATTENTION", "if (has_newest) BARRIER;", ""),
        ("ATTENTION", "paged = seen && t != position", "paged = t != position"),
        ("ATTENTION", "token + u >= low && token + u < end", "token + u < end"),
        ("ATTENTION", "sums[2 * ((first_head + g) * splits + split) + 1] = UNUSED;", ""),
        ("REDUCE", "weight = EXP2(sums[2 * (first + base + lane)] - top);", "weight = 1.0f;"),
        ("COLLECT_FUNCTIONS", "if (is_new)", "if (false)"),
    ],
)
def test_a_fault_in_the_text_is_found(
    name: str, right: str, wrong: str, kernels: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = getattr(text, name)
    assert right in whole
    monkeypatch.setattr(text, name, whole.replace(right, wrong))
    assert attention_problem(replace(LLAMA, window=100)) is not None


@pytest.mark.skipif(shutil.which("clang++") is None, reason="needs clang++, which knows address spaces")
@pytest.mark.parametrize("dialect", ["metal"])
@pytest.mark.parametrize(
    "one", [SHAPES["bf16 64 of 8, sinks, window"], PACKED["bf16 128 of 4, 8 bits"], LATENT["f32 128 and 32 of 3"]]
)
def test_every_pointer_has_its_address_space(one: AttentionShape, kernels: dict[str, HostKernel]) -> None:
    assert attention_problem(one) is None
    for kernel in kernels.values():
        for source in kernel.sources:
            flags = ["-std=c++17", "-fsyntax-only", "-DADDRESS_SPACES", "-Wno-everything", f"-I{HERE}"]
            said = subprocess.run(["clang++", *flags, str(source)], capture_output=True, text=True)
            assert said.returncode == 0, said.stderr[:2000]
