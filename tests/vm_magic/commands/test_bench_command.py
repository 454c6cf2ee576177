"""``%vllm_metal bench``: its table, over an engine that measures nothing."""

from typing import Any

import pytest

from engine.batch.bench import BenchRow
from engine.errors import ConfigError, EngineClosedError
from engine.runner.kernels.bench import KernelRow
from tests.vm_magic.fakes import FakeBench, FakeKernelBench, FakeLLM
from tests.vm_magic.helpers import line, shown
from vm_magic.show.errors import Interrupted, MagicUsageError
from vm_magic.state import session as sessions

ROWS = [BenchRow("prefill", 512, 1, 0.25, 2048.0, 512), BenchRow("decode", 32, 4, 1.5, 100.0, 400)]


def test_the_table_has_numbers_machine_and_notes(shell: Any, loaded: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def bench(**options: Any) -> FakeBench:
        asked.update(options)
        return FakeBench(list(ROWS))

    monkeypatch.setattr(FakeLLM, "bench", lambda _, **options: bench(**options))
    table = line(shell, "bench --seconds 3 --batch 1,4")
    assert asked == {"seconds": 3.0, "batch_sizes": (1, 4)}
    text = repr(table)
    assert "prefill  512 tokens  1      250 ms       2,048.0" in text
    assert "decode   32 tokens   4      1.50 s       100.0     25.0" in text
    assert "machine: a <b>fast</b> one" in text
    assert "a note" in text
    assert "not complete" not in text
    assert "a &lt;b&gt;fast&lt;/b&gt; one" in table._repr_html_()
    assert table.result.to_dict()["rows"][1]["tokens_per_second"] == 100.0
    assert shown(shell)["text/plain"].startswith("bench: 2 cases in ")
    line(shell, "bench")
    assert asked == {"seconds": 3.0, "batch_sizes": (1, 4)}, "the engine has its own defaults"


def test_stopping_shows_what_was_measured(shell: Any, loaded: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeBench([ROWS[0], KeyboardInterrupt()])
    monkeypatch.setattr(FakeLLM, "bench", lambda _, **options: fake)
    with pytest.raises(Interrupted, match="the table has what was measured"):
        line(shell, "bench")
    assert "512 tokens" in shown(shell)["text/plain"]
    assert "not complete" in shown(shell)["text/plain"]


KERNELS = [
    KernelRow("attention", "Qwen3-4B, 1 × 512", None, 12.34, 8.0),
    KernelRow("collect", "Qwen3-4B, 64 × 512", "relative error <b>3e-1</b>", 7.0, None),
]


def test_kernels_are_checked_without_a_model_in_a_table_to_paste(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "kernel_bench", lambda: FakeKernelBench(list(KERNELS)))
    table = line(shell, "bench --kernels")
    rows = repr(table).splitlines()
    assert rows[0].split() == ["kernel", "shape", "right", "µs", "floor", "of", "floor"]
    assert rows[1].split() == ["attention", "Qwen3-4B,", "1", "×", "512", "yes", "12.3", "8.0", "65%"]
    assert "relative error <b>3e-1</b>  7.0" in rows[2]
    assert rows[3] == "device: a <b>GPU</b> (metal)"
    page = table._repr_html_()
    assert "<b>" not in page
    assert "relative error &lt;b&gt;3e-1" in page
    assert [row["kernel"] for row in table.result.to_dict()["rows"]] == ["attention", "collect"]
    assert shown(shell)["text/plain"].startswith("bench: 2 cases in ")


def test_a_loaded_models_own_shapes_are_taken(shell: Any, loaded: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeLLM, "bench_kernels", lambda _: FakeKernelBench(KERNELS[:1]), raising=False)
    assert len(line(shell, "bench --kernels").rows) == 1


def test_stopping_shows_the_kernels_so_far(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "kernel_bench", lambda: FakeKernelBench([KERNELS[0], KeyboardInterrupt()]))
    with pytest.raises(Interrupted, match="the table has what was measured"):
        line(shell, "bench --kernels")
    assert "not complete" in shown(shell)["text/plain"]
    assert "65%" in shown(shell)["text/plain"]


def test_without_a_gpu_one_line_says_so(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "kernel_bench", lambda: FakeKernelBench([], ["no GPU: <none>"]))
    table = line(shell, "bench --kernels")
    assert repr(table) == "no GPU: <none>"
    assert table._repr_html_() == "<div>no GPU: &lt;none&gt;</div>"
    assert shown(shell)["text/plain"] == "bench: nothing to measure"


@pytest.mark.parametrize("flags", ["--seconds 3", "--batch 1,2"])
def test_kernels_and_flags_about_the_models_speed_do_not_go_together(shell: Any, flags: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{flags.split()[0]} is about the model's speed, not about --kernels"):
        line(shell, f"bench --kernels {flags}")


def test_bench_wants_a_model_and_sizes(shell: Any) -> None:
    with pytest.raises(EngineClosedError, match="no model is loaded"):
        line(shell, "bench")
    with pytest.raises(MagicUsageError, match="'x' is not a list such as 1,4,16"):
        line(shell, "bench --batch x")
