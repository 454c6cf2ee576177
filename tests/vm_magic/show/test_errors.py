"""Errors and help: one line that names the fix."""

from typing import Any

import pytest
from IPython.core.error import UsageError

from engine.errors import ConfigError, EngineClosedError
from tests.vm_magic import fakes
from tests.vm_magic.helpers import Capture, cell, line


def test_an_unknown_command_names_the_nearest(shell: Any) -> None:
    with pytest.raises(UsageError, match="did you mean load"):
        line(shell, "lod smollm2")


def test_a_cell_without_a_command_names_the_one_that_sends_it(shell: Any) -> None:
    with pytest.raises(UsageError, match=r"%%chat .* sends the cell's body"):
        cell(shell, "vllm_metal", "What is the capital of France?")


def test_a_plan_of_nothing_names_what_to_write(shell: Any) -> None:
    with pytest.raises(EngineClosedError, match="name the one to plan, as in %vllm_metal plan smollm2"):
        line(shell, "plan")


def test_a_line_command_refuses_a_cell(shell: Any) -> None:
    with pytest.raises(UsageError, match="takes no cell"):
        cell(shell, "vllm_metal load smollm2", "body")


def test_help_is_printed_and_raises_nothing(shell: Any, capsys: Capture) -> None:
    for words in ("--help", "load --help", "chat -h", "set --help"):
        assert line(shell, words) is None
    printed = capsys.readouterr().out
    assert "--gpu-memory-utilization" in printed
    assert "unload" in printed


def test_errors_are_usage_errors_of_the_engines_class_and_one_line(shell: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        line(shell, "load m --block-size 3")
    error: Any = caught.value
    assert isinstance(error, UsageError)
    assert error.flag.replace("_", "-") == "block-size"
    assert len(error._render_traceback_()) == 1
    assert "ConfigError" in error._render_traceback_()[0]
    assert error.__context__ is None


def test_tracebacks_can_be_had(shell: Any) -> None:
    shell.run_line_magic("config", "VLLMMetal.short_errors = False")
    with pytest.raises(ConfigError) as caught:
        line(shell, "load m --block-size 3")
    assert not isinstance(caught.value, UsageError)


def test_a_fault_of_ours_says_how_to_see_its_traceback(shell: Any, loaded: fakes.FakeLLM) -> None:
    loaded.stats = None  # type: ignore[assignment, method-assign]
    with pytest.raises(UsageError, match=r"TypeError.*short_errors = False"):
        line(shell, "status")


def test_a_plain_terminal_gets_deltas_and_no_copies(
    shell: Any, loaded: fakes.FakeLLM, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from IPython.core.displaypub import DisplayPublisher

    monkeypatch.setattr(shell, "display_pub", DisplayPublisher(parent=shell))
    loaded.delay = 0.01
    cell(shell, "chat", "hi")
    assert capsys.readouterr().out == " ".join(fakes.WORDS) + "\n"
    with pytest.raises(UsageError, match="--out NAME"):
        cell(shell, "chat --detach", "hi")
    line(shell, "load other")
    assert "other: 145.0 MB loaded" in capsys.readouterr().out
