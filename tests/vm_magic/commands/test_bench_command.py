"""``%vllm_metal bench``: its table, over an engine that measures nothing."""

from typing import Any

import pytest

from engine.batch.bench import BenchRow
from engine.errors import EngineClosedError
from tests.vm_magic.fakes import FakeBench, FakeLLM
from tests.vm_magic.helpers import line, shown
from vm_magic.show.errors import Interrupted, MagicUsageError

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
    assert "prefill  512 tokens  1      250 ms       2048.0" in text
    assert "decode   32 tokens   4      1.50 s       100.0     25.0" in text
    assert "machine: a <b>fast</b> one" in text
    assert "a note" in text
    assert "not complete" not in text
    assert "a &lt;b&gt;fast&lt;/b&gt; one" in table._repr_html_()
    assert table.result.to_dict()["rows"][1]["tokens_per_second"] == 100.0
    assert shown(shell)["text/plain"].startswith("bench: 2 cases in ")
    line(shell, "bench")
    assert asked == {"seconds": 20.0, "batch_sizes": (1, 2, 4, 8, 16)}


def test_stopping_shows_what_was_measured(shell: Any, loaded: FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeBench([ROWS[0], KeyboardInterrupt()])
    monkeypatch.setattr(FakeLLM, "bench", lambda _, **options: fake)
    with pytest.raises(Interrupted, match="the table has what was measured"):
        line(shell, "bench")
    assert "512 tokens" in shown(shell)["text/plain"]
    assert "not complete" in shown(shell)["text/plain"]


def test_bench_wants_a_model_and_sizes(shell: Any) -> None:
    with pytest.raises(EngineClosedError, match="no model is loaded"):
        line(shell, "bench")
    with pytest.raises(MagicUsageError, match="'x' is not a list such as 1,4,16"):
        line(shell, "bench --batch x")
