"""The benchmark of loads runs, and its figures are a load's."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx.core")

from tests.benchmarks import load_time


def test_a_load_of_each_kind_in_a_process_of_its_own(tiny_model_dir: Any, tmp_path: Path) -> None:
    folder = str(tiny_model_dir("llama"))
    found = load_time.in_a_process("rehearsal", folder, tmp_path)
    parts = ["tokenizer", "weights", "kernels", "warm-up", "step cost", "other"]
    assert list(found) == ["imports", *parts, "load", "first token"]
    assert sum(found[part] for part in parts) == pytest.approx(found["load"])
    assert all(seconds > 0 for seconds in load_time.in_a_process("theirs", folder, tmp_path).values())


def test_a_load_that_fails_is_told_in_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"ours did not load: .*ModelNotFoundError"):
        load_time.in_a_process("ours", str(tmp_path), tmp_path)


def test_the_least_of_several_turns_counts(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    seconds = iter([4.0, 3.0, 9.0, 6.0, 2.0, 5.0, 8.0, 7.0])
    loads = lambda who, folder, caches: {"load": next(seconds), "first token": 1.0}  # noqa: E731
    monkeypatch.setattr(load_time, "in_a_process", loads)
    least = load_time.compare("folder", 2, parts=False)
    assert {title: found["load"] for title, found in least.items()} == {
        "mlx_lm.load, nothing compiled": 2.0,
        "mlx_lm.load, all compiled": 3.0,
        "LLM, nothing compiled": 8.0,
        "LLM, all compiled": 6.0,
    }
    assert len(capsys.readouterr().out.splitlines()) == 8
