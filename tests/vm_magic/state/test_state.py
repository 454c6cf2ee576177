"""Settings, status, lists and logs."""

import logging
from typing import Any

import pytest

from engine.errors import RequestError
from engine.runner.kv.attention_path import AttentionPath
from tests.vm_magic import fakes
from tests.vm_magic.helpers import Capture, cell, line
from vm_magic.state.session import current_session


def test_settings_hold_for_this_model_and_the_next(shell: Any, capsys: Capture) -> None:
    line(shell, "set temperature=0.2")
    line(shell, "load smollm2")
    line(shell, "set top_p=0.9")
    cell(shell, "chat", "hi")
    params = fakes.MADE[-1].streams[-1].params
    assert (params.temperature, params.top_p) == (0.2, 0.9)
    line(shell, "load other")
    assert dict(current_session().settings.snapshot()) == {"temperature": 0.2, "top_p": 0.9}
    capsys.readouterr()
    line(shell, "set temperature=")
    assert capsys.readouterr().out == "top_p=0.9\n"


def test_a_bad_setting_fails_the_cell_and_changes_nothing(shell: Any, loaded: fakes.FakeLLM) -> None:
    with pytest.raises(RequestError, match="top_p must be in"):
        line(shell, "set temperature=0.2 top_p=2")
    assert not loaded.settings.snapshot()


def test_bare_and_status_show_the_card(shell: Any, loaded: fakes.FakeLLM) -> None:
    cell(shell, "chat", "hi")
    line(shell, "set temperature=0.2")
    card = line(shell, "")
    text = repr(card)
    for part in (
        "smollm2",
        "146.0 MB in use of 46.4 GB planned",
        "metal_limit=51.54GB",
        "32 of 128 used",
        "temperature=0.2",
        "8 tokens",
        "closed",
    ):
        assert part in text
    assert text.splitlines()[-1].split()[:2] == ["log", "line"]
    page = card._repr_html_()
    assert "<details" in page.partition("metal_limit")[0]
    assert "25.0%" in page
    assert "<script" not in page
    assert "var(" not in page, "a notebook that is not trusted would lose such a style"
    assert repr(line(shell, "status")) == text


def test_status_says_what_reads_the_pages_of_each_kind_of_layer(shell: Any, loaded: fakes.FakeLLM) -> None:
    row = "  attention   MLX's own operations (1 layer full: no GPU kernels on a CPU)"
    assert row in repr(line(shell, "status")).splitlines()
    why = "mismatch <b>2e-1</b>"
    loaded.attention_paths = (AttentionPath("full", (1,), "paged"), AttentionPath("sliding", (0,), "reference", why))
    card = line(shell, "status")
    assert f"pages read in place by kernels (1 layer full); MLX's own operations (1 layer sliding: {why})" in repr(card)
    assert "1 layer sliding: mismatch &lt;b&gt;2e-1&lt;/b&gt;)" in card._repr_html_()


def test_status_without_a_model_says_what_to_run(shell: Any) -> None:
    assert "%vllm_metal load smollm2" in repr(line(shell, "status"))


def test_models_are_listed_with_their_sizes(shell: Any) -> None:
    table = line(shell, "models")
    assert "93.0MB" in repr(table)
    assert "<td" in table._repr_html_()


def test_logs_show_the_latest_lines_of_the_engine_and_of_the_magics(
    shell: Any, loaded: fakes.FakeLLM, capsys: Capture
) -> None:
    line(shell, "logs")
    assert "INFO vm_magic.commands.load: metal_limit=51.54GB" in capsys.readouterr().out
    logging.getLogger("engine.runtime").info("a line of the engine")
    logging.getLogger("another").info("a line of somebody else")
    line(shell, "logs 1")
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 1
    assert shown[0].endswith("INFO engine.runtime: a line of the engine")


def test_metrics_are_a_table_without_buckets(shell: Any, loaded: fakes.FakeLLM) -> None:
    loaded.metrics.observe_preemptions(1)
    text = repr(line(shell, "metrics"))
    assert [row.split()[-1] for row in text.splitlines() if "vllm:num_preemptions_total" in row] == ["1"]
    assert "vllm:e2e_request_latency_seconds_sum" in text
    assert "_bucket" not in text
