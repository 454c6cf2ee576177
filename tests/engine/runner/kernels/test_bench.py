"""The report on the attention kernels: right or not, and times beside what reading the same bytes takes."""

import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from engine.runner.kernels import bench, paged_attention, self_check
from engine.runner.kernels.bench import NO_GPU, KernelRow, kernel_report
from engine.runner.kernels.self_check import AttentionShape
from tests.engine.runner.kernels.text_on_host import HostKernel

SHAPE = AttentionShape(dtype=mx.float32, heads=2, kv_heads=1, key_dim=16, value_dim=24, block_size=16)


@pytest.fixture
def on_host(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run on this machine, and nothing keeps it busy."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++ to compile the kernels' text")
    folder: Path = tmp_path_factory.mktemp("bench")
    made: dict[str, HostKernel] = {}

    def make(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str, header: str = "") -> HostKernel:
        return made.setdefault(name, HostKernel("metal", name, inputs, outputs, source, header, folder))

    for module in (bench, paged_attention):
        monkeypatch.setattr(module, "make_kernel", make)
    monkeypatch.setattr(bench, "kernels_available", lambda: True)
    monkeypatch.setattr(bench, "_busy_size", lambda: 8)
    monkeypatch.setattr(bench, "_READ_BYTES", 1 << 16)
    monkeypatch.setattr(bench, "_TIMES", 1)
    monkeypatch.setattr(bench, "_PAGE_BYTES", 20_000)
    monkeypatch.setattr(bench, "_DECODE_LAUNCHES", 3)
    bench.bytes_per_second.cache_clear()
    self_check_lengths = [1, 0, 50]
    monkeypatch.setattr(
        bench, "attention_problem", lambda shape: self_check.attention_problem(shape, lengths=self_check_lengths)
    )


def test_a_right_kernel_is_timed_at_each_size(on_host: None) -> None:
    rows = kernel_report("tiny", replace(SHAPE, window=32), [(1, 20), (2, 50)], (8, 64))
    assert [(row.kernel, row.shape, row.problem) for row in rows] == [
        ("attention", "tiny, 1 x 20", None), ("attention", "tiny, 2 x 50", None), ("collect", "tiny, 8 of 64", None),
    ]  # fmt: skip
    row_bytes = (16 + 24) * 4
    assert [row.num_bytes for row in rows] == [20 * row_bytes, 2 * 32 * row_bytes, (2 * 39 + 8) * row_bytes]
    for row in rows:
        assert row.microseconds is not None
        assert row.share is not None
        assert row.floor_microseconds == pytest.approx(row.microseconds * row.share)


def test_a_kernel_with_a_problem_is_not_timed() -> None:
    """As on this machine, where there is no GPU to run on."""
    assert kernel_report("tiny", SHAPE) == [KernelRow("attention", "tiny", NO_GPU)]


def test_a_wrong_kernel_is_named_and_not_timed(on_host: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "attention_problem", lambda shape: "5 tokens: not finite")
    assert kernel_report("tiny", SHAPE) == [KernelRow("attention", "tiny", "5 tokens: not finite")]


def test_figures_follow_from_time_and_bytes() -> None:
    row = KernelRow("attention", "x", None, 20.0, 15.0, 60_000)
    assert (row.share, row.gigabytes_per_second) == (0.75, 3.0)
    assert (KernelRow("attention", "x", "wrong").share, KernelRow("attention", "x", "wrong").gigabytes_per_second) == (
        None,
        None,
    )
