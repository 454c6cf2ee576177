"""The text of the kernel that samples, both dialects, compiled for this machine and run on it, against numpy."""

import shutil
import subprocess
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from engine.runner.kernels import draw_rows as module
from engine.runner.kernels import kernel_cache
from engine.runner.kernels.draw_check import (
    Row,
    Wish,
    block_size,
    draw_problem,
    kept_weights,
    some_rows,
    token_problem,
    wishes_array,
)
from engine.runner.kernels.draw_rows import draw_rows, takes
from tests.engine.runner.kernels.conftest import TextKernels
from tests.engine.runner.kernels.host_draw_rows import HostDrawRows, drawn_token
from tests.engine.runner.kernels.text_on_host import HERE, HostKernel

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the kernel's text")
BF16, F16, F32 = mx.bfloat16, mx.float16, mx.float32


@pytest.fixture
def kernels(text_kernels: TextKernels) -> dict[str, HostKernel]:
    return text_kernels(module)


def tokens_of(logits: np.ndarray[Any, Any] | mx.array, wishes: list[Wish], uniforms: Any) -> list[int]:
    """Of rows with the same or their own logits."""
    if not isinstance(logits, mx.array):
        logits = mx.array(np.broadcast_to(logits, (len(wishes), logits.shape[-1])))
    pairs = np.zeros((max(4, len(wishes)), 2), np.float32)
    pairs[: len(wishes)] = uniforms
    found: list[int] = draw_rows(logits, mx.array(wishes_array(wishes)), mx.array(pairs)).tolist()
    return found


@needs_compiler
@pytest.mark.parametrize(
    ("dialect", "dtype", "width"),
    [("metal", BF16, 328), ("metal", F32, 1056), ("cuda", F16, 1100)],
)
def test_rows_of_every_kind_give_the_token_that_their_uniforms_point_to(
    dtype: mx.Dtype, width: int, kernels: dict[str, HostKernel]
) -> None:
    assert draw_problem([dtype], draw_rows, (width,)) is None
    assert set(kernels) == {"draw_rows", "draw_penalized_rows"}


@needs_compiler
@pytest.mark.parametrize("dialect", ["cuda"])
def test_a_wide_row_is_drawn_from_in_blocks(kernels: dict[str, HostKernel]) -> None:
    for row in some_rows(20_000)[:12]:
        given = mx.array(row.logits[None]).astype(BF16)
        (token,) = tokens_of(given, [row.wish], row.uniforms)
        assert token_problem(np.array(given.astype(F32))[0], row, token) is None


@needs_compiler
@pytest.mark.parametrize("dialect", ["metal"])
@pytest.mark.parametrize(
    "wish",
    [Wish(1.0), Wish(0.7, top_k=20, top_p=0.8), Wish(1.0, top_p=0.6), Wish(1.0, min_p=0.2)],
    ids=["plain", "top_k", "top_p", "min_p"],
)
def test_a_grid_of_uniforms_gives_every_token_as_often_as_its_weight_says(
    wish: Wish, kernels: dict[str, HostKernel]
) -> None:
    logits = np.random.default_rng(4).standard_normal(200).astype(np.float32)
    side = 12
    grid = (np.stack(np.meshgrid(*[np.arange(side)] * 2), -1).reshape(-1, 2) + 0.5) / side
    found = tokens_of(logits, [wish] * len(grid), grid)
    assert found == [drawn_token(logits, wish, pair) for pair in grid]
    assert set(found) <= set(np.flatnonzero(kept_weights(logits, wish)).tolist())


@needs_compiler
@pytest.mark.parametrize("dialect", ["cuda"])
def test_every_tie_at_the_last_place_is_kept_and_counted(kernels: dict[str, HostKernel]) -> None:
    logits = np.zeros(64, np.float32)
    logits[:8] = [3, 1, 1, 1, 1, -9, -9, -9]
    logits[8:] = -9
    grid = [(0.5, (i + 0.5) / 50) for i in range(50)]
    for wish, kept in ((Wish(1.0, top_k=2), 5), (Wish(1.0, top_k=2, top_p=0.8), 5), (Wish(1.0, top_k=1), 1)):
        assert set(tokens_of(logits, [wish] * len(grid), grid)) == set(range(kept))
    assert set(tokens_of(logits, [Wish(1.0, top_k=2, top_p=0.5)] * len(grid), grid)) == {0}


@needs_compiler
@pytest.mark.parametrize("dialect", ["metal"])
def test_a_row_depends_on_no_other(kernels: dict[str, HostKernel]) -> None:
    rows = some_rows(1000)[:9]
    logits = np.stack([row.logits for row in rows])
    together = tokens_of(mx.array(logits), [row.wish for row in rows], [row.uniforms for row in rows])
    backwards = tokens_of(
        mx.array(logits[::-1].copy()), [row.wish for row in rows[::-1]], [row.uniforms for row in rows[::-1]]
    )
    assert backwards == together[::-1]
    assert [tokens_of(row.logits, [row.wish], row.uniforms)[0] for row in rows] == together


@needs_compiler
@pytest.mark.parametrize("dialect", ["metal"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf])
def test_one_logit_that_is_no_number_spoils_its_row(value: float, kernels: dict[str, HostKernel]) -> None:
    logits = np.zeros((4, 100), np.float32)
    logits[[0, 2], [99, 3]] = value
    logits[3] = -np.inf
    logits[3, 5] = 1.0
    wishes = [Wish(1.0, top_k=5), Wish(1.0, top_k=5), Wish(0.0), Wish(0.0)]
    assert [token >= 0 for token in tokens_of(mx.array(logits), wishes, [(0.3, 0.3)] * 4)] == [False, True, False, True]


@needs_compiler
@pytest.mark.parametrize("dialect", ["metal"])
@pytest.mark.parametrize(
    ("width", "right", "wrong"),
    [
        (320, "if (key > own[e])", "if (key >= own[e])"),
        (1056, "if (number < top_k)", "if (number <= top_k)"),
        (320, "(larger[e] < most &&", "(larger[e] <= most &&"),
        (320, "(column + i == newest ? 1.0f : 0.0f)", "0.0f"),
        (320, "[newest] += 1.0f;", "[newest] += 2.0f;"),
        (320, "if (bits == 0x80000000u) bits = 0u;", ""),
    ],
)
def test_a_fault_in_the_text_is_found(
    width: int, right: str, wrong: str, kernels: dict[str, HostKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = module.draw_text

    def broken(*, penalties: bool) -> tuple[str, str]:
        body, header = original(penalties=penalties)
        return body.replace(right, wrong), header.replace(right, wrong)

    assert right in "".join(original(penalties=True))
    monkeypatch.setattr(module, "draw_text", broken)
    assert draw_problem([F32], draw_rows, (width,)) is not None


@needs_compiler
@pytest.mark.skipif(shutil.which("clang++") is None, reason="needs clang++, which knows address spaces")
@pytest.mark.parametrize("dialect", ["metal"])
def test_every_pointer_has_its_address_space(kernels: dict[str, HostKernel]) -> None:
    assert draw_problem([BF16], draw_rows, (1000,)) is None
    for kernel in kernels.values():
        for source in kernel.sources:
            flags = ["-std=c++17", "-fsyntax-only", "-DADDRESS_SPACES", "-Wno-everything", f"-I{HERE}"]
            said = subprocess.run(["clang++", *flags, str(source)], capture_output=True, text=True)
            assert said.returncode == 0, said.stderr[:2000]


def test_numpys_own_tokens_pass_the_check() -> None:
    assert draw_problem([BF16, F16, F32], HostDrawRows(), (1000, 4099)) is None


def test_what_is_to_be_compiled_is_collected_before_anything_is_checked() -> None:
    """While kernels are collected they give zeros, which no check may look at."""

    class Kernel(HostDrawRows):
        def __init__(self) -> None:
            super().__init__()
            self.collected: list[tuple[mx.Dtype, int]] = []

        def __call__(self, logits: mx.array, *others: Any) -> mx.array:
            if kernel_cache._awaited.get() is None:
                return super().__call__(logits, *others)
            assert not self.calls
            self.collected.append((logits.dtype, len(others)))
            return mx.zeros((len(logits),), mx.int32)

    kernel = Kernel()
    assert draw_problem([BF16, F32], kernel, (1000,)) is None
    assert kernel.collected == [(BF16, 2), (BF16, 4), (F32, 2), (F32, 4)]


def test_a_kernel_that_fails_is_a_line() -> None:
    def refuses(*_given: object) -> mx.array:
        raise RuntimeError("error:\nexpected ';'")

    assert draw_problem([F32], refuses, (1000,)) == "RuntimeError: error: expected ';'"  # type: ignore[arg-type]


def test_another_token_than_the_uniforms_point_to_is_wrong() -> None:
    logits = np.log(np.float32([0.5, 0.25, 0.25] + [1e-9] * 29))
    row = Row(logits, Wish(1.0), (0.5, 0.6))
    assert token_problem(logits, row, 1) is None
    assert "token 0 is not where" in str(token_problem(logits, row, 0))
    assert token_problem(logits, Row(logits, Wish(0.0), (0.0, 0.0)), 2) == "token 2, the largest is 0"
    assert token_problem(np.full(32, -np.inf, np.float32), row, 3) == "token 3 of a row without any"


def test_widths_and_element_types_that_the_kernel_knows() -> None:
    assert takes(BF16, 151_936)
    assert takes(F32, 262_208)
    assert not takes(BF16, 31)
    assert not takes(BF16, 600_000)
    assert not takes(mx.float64, 1000)
    assert [block_size(width) for width in (151_936, 128_256, 50_257, 262_208, 262_144)] == [128, 256, 256, 256, 256]
