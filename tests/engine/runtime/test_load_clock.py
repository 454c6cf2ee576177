"""What the parts of a load take."""

import logging
import time
from typing import Any

import pytest

pytest.importorskip("mlx.core")

from engine.llm import LLM
from engine.runtime.load_clock import LoadClock


def test_parts_are_counted_one_after_the_other(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    now = iter([10.0, 12.5, 12.75])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = LoadClock()
    with caplog.at_level(logging.DEBUG, "engine"):
        clock.ended("weights")
        clock.ended("warm-up")
    assert clock.seconds == {"weights": 2.5, "warm-up": 0.25}
    assert [record.getMessage() for record in caplog.records] == ["load: weights 2.50 s", "load: warm-up 0.25 s"]


def test_a_load_tells_what_its_parts_took(tiny_model_dir: Any) -> None:
    began = time.perf_counter()
    with LLM(str(tiny_model_dir("llama")), max_model_len=256) as llm:
        took = time.perf_counter() - began
        assert list(llm.load_seconds) == ["tokenizer", "weights", "kernels", "warm-up", "step cost"]
        assert all(seconds >= 0 for seconds in llm.load_seconds.values())
        assert 0 < sum(llm.load_seconds.values()) <= took
