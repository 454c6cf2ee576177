"""The check of the GPU kernels: where it runs, what it is given, and what it says where there is no GPU."""

import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import pytest

from engine import LLM, SamplingParams
from engine.batch import kernel_bench
from engine.batch.kernel_bench import KernelBench, bench_kernels
from engine.errors import DeviceFailedError
from engine.runner.kernels import bench
from engine.runner.kernels.bench import KernelRow
from engine.runner.kernels.common_shapes import common_shapes
from engine.runner.kernels.self_check import AttentionShape
from engine.runner.kv.attention_calls import kernel_shapes
from tests.conftest import TinyModelDir
from tests.engine.parity.tiny_architectures import tiny_model


@pytest.fixture(scope="module")
def llm(tiny_model_dir: TinyModelDir) -> Iterator[LLM]:
    with LLM(str(tiny_model_dir("gemma3_text")), max_model_len=512, gpu_memory_utilization=0.2) as loaded:
        yield loaded


ROWS = len(bench.DECODES) + 1
"""Of one shape."""


def reply(llm: LLM) -> list[int]:
    """The model's own tokens after three others."""
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    return llm.generate([[5, 6, 7]], greedy, use_tqdm=False)[0].outputs[0].token_ids


class Report:
    """In place of measuring: which shapes were asked about, and on which thread."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, AttentionShape]] = []
        self.threads: set[str] = set()
        self.problem: str | None = None

    def __call__(
        self,
        name: str,
        shape: AttentionShape,
        decodes: Sequence[tuple[int, int]] = bench.DECODES,
        chunk: tuple[int, int] | None = bench.CHUNK,
    ) -> list[KernelRow]:
        self.asked.append((name, shape))
        self.threads.add(threading.current_thread().name)
        if self.problem:
            return [KernelRow("attention", name, self.problem)]
        rows = [KernelRow("attention", f"{name}, {decode}", None, 2.0, 1.0) for decode in decodes]
        return [*rows, KernelRow("collect", name, None, 4.0, 1.0)] if chunk else rows


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Report:
    """As if there were a GPU."""
    report = Report()
    monkeypatch.setattr(kernel_bench, "kernels_here", lambda: True)
    monkeypatch.setattr(kernel_bench, "free_memory", lambda: 80 * 10**9)
    monkeypatch.setattr(bench, "bytes_per_second", lambda: 3.9e12)
    monkeypatch.setattr(bench, "kernel_report", report)
    return report


def test_without_a_gpu_nothing_runs_and_a_note_says_what_it_is_for(llm: LLM) -> None:
    for asked in (bench_kernels(), llm.bench_kernels()):
        assert list(asked.run()) == []
        assert asked.result.to_dict() == {
            "facts": {}, "rows": [], "notes": [kernel_bench.NO_GPU], "complete": True,
        }  # fmt: skip
    assert "no GPU: MLX computes on the CPU here" in kernel_bench.NO_GPU
    assert "\n" not in kernel_bench.NO_GPU


def test_without_a_model_common_shapes_run_on_a_thread_that_ends(on_gpu: Report) -> None:
    asked = bench_kernels()
    rows = list(asked.run())
    assert list(dict.fromkeys(name for name, _ in on_gpu.asked)) == [name for name, _ in common_shapes()]
    assert len(rows) == ROWS * len(common_shapes())
    assert on_gpu.threads == {"vm-kernels"}
    assert not any(thread.name == "vm-kernels" for thread in threading.enumerate())
    assert asked.result.complete
    facts = json.loads(json.dumps(asked.result.to_dict()))["facts"]
    assert facts["shapes of"] == "common models"
    assert {"device", "machine", "versions", "date"} <= facts.keys()
    assert facts["memory"] == "3900 GB/s to a kernel that only reads"
    assert "vm-magic " in facts["versions"]
    assert f"mlx {mx.__version__.split('.dev')[0]}" in facts["versions"]


def test_the_common_shapes_have_every_element_type_a_window_and_sinks() -> None:
    shapes = [shape for _, shape in common_shapes()]
    assert {shape.dtype for shape in shapes} == {mx.bfloat16, mx.float16, mx.float32}
    assert {64, 128, 256} <= {shape.key_dim for shape in shapes}
    assert any(shape.window for shape in shapes)
    assert any(shape.sinks for shape in shapes)


def test_a_loaded_model_is_asked_for_its_shapes_on_the_engines_own_thread(llm: LLM, on_gpu: Report) -> None:
    before = reply(llm)
    asked = llm.bench_kernels()
    stats = llm.stats()
    assert list(asked.run()) == asked.result.rows
    assert on_gpu.threads == {"vm-engine"}
    assert {name for name, _ in on_gpu.asked} == {llm.args.names[0]}
    windows = {shape.window for _, shape in on_gpu.asked}
    assert None in windows
    assert len(windows) == 2
    assert {shape.block_size for _, shape in on_gpu.asked} == {16}
    assert llm.stats() == stats
    assert reply(llm) == before


def test_requests_go_on_between_two_shapes(llm: LLM, on_gpu: Report) -> None:
    rows = llm.bench_kernels().run()
    next(rows)
    assert reply(llm)
    assert len(list(rows)) == 2 * ROWS - 1


def test_a_kernel_that_breaks_the_device_ends_the_check_with_what_to_do(on_gpu: Report) -> None:
    def on_thread(function: Any) -> Any:
        return function()

    on_gpu.problem = "RuntimeError: cudaGraphLaunch failed: an illegal memory access was encountered"
    with pytest.raises(DeviceFailedError, match="restart the kernel"):
        list(KernelBench("m", common_shapes(), on_thread).run())
    on_gpu.problem = "relative error 3e-1"
    rows = list(KernelBench("m", common_shapes(), on_thread).run())
    assert [row.problem for row in rows] == ["relative error 3e-1"] * len(common_shapes()), "none of them is timed"


def test_where_memory_is_short_kernels_are_checked_all_the_same(
    on_gpu: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(free: float) -> KernelBench:
        monkeypatch.setattr(kernel_bench, "free_memory", lambda: int(free))
        asked = KernelBench("m", common_shapes(), lambda function: function())
        assert len(list(asked.run()))
        return asked

    short = run(0.5e9).result
    assert [(row.kernel, row.problem, row.microseconds) for row in short.rows] == [("attention", None, None)] * len(
        common_shapes()
    )
    assert short.notes == [
        "0.5 GB are free on the device: kernels are checked but not timed; without a model there is more room"
    ]
    some = run(1.6e9).result
    assert len(common_shapes()) < len(some.rows) < ROWS * len(common_shapes()), (
        "long contexts of many rows are left out"
    )
    assert all(row.microseconds for row in some.rows)
    assert some.notes == [
        "1.6 GB are free on the device: the largest cases are not timed; without a model there is more room"
    ]


def test_a_model_without_such_layers_says_so(on_gpu: Report) -> None:
    asked = KernelBench("m", [], lambda function: function())
    assert list(asked.run()) == []
    assert asked.result.notes == [kernel_bench.NO_SHAPES]


@pytest.mark.parametrize(
    ("architecture", "windows", "sinks", "capped"),
    [
        ("gpt_oss", 2, {True}, {False}),
        ("gemma2", 1, {False}, {True}),
        ("qwen3_5", 1, {False}, {False}),
        ("deepseek_v3", 1, {False}, {False}),
        ("mamba2", 0, set(), set()),
    ],
)
def test_shapes_are_those_of_layers_that_kernels_are_made_for(
    architecture: str, windows: int, sinks: set[bool], capped: set[bool]
) -> None:
    shapes = kernel_shapes(tiny_model(architecture), 16)
    assert len({shape.window for shape in shapes}) == windows
    assert {shape.sinks for shape in shapes} == sinks
    assert {shape.softcap is not None for shape in shapes} == capped
    assert len(set(shapes)) == len(shapes)
