"""``explain``, ``export`` and ``llm`` as typed, with the scripted model; the llm tool itself reads what was written."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError, EngineClosedError
from tests.vm_magic import fakes
from tests.vm_magic.helpers import Capture, cell, line

COMMANDS = ["explain", "export", "export --client curl", "llm", "llm --show"]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "llm"
    monkeypatch.setenv("LLM_USER_PATH", str(folder))
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_without_a_model_each_says_how_to_load_one(shell: Any, tool: Path, command: str) -> None:
    with pytest.raises(EngineClosedError, match="load smollm2"):
        line(shell, command)


@pytest.mark.parametrize("command", COMMANDS[2:])
def test_without_a_port_clients_are_told_to_serve(shell: Any, loaded: fakes.FakeLLM, tool: Path, command: str) -> None:
    with pytest.raises(ConfigError, match="%vllm_metal serve opens it"):
        line(shell, command)
    assert not tool.exists()


def test_export_gives_the_command_of_this_model_and_port(shell: Any, loaded: fakes.FakeLLM) -> None:
    server = line(shell, "serve smollm2 --port 8123")
    text = str(line(shell, "export"))
    assert text.endswith(
        "vllm serve HuggingFaceTB/SmolLM2-135M-Instruct \\\n  --served-model-name smollm2 \\\n  --port 8123\n"
    )
    assert server.api_key not in text.split()
    assert f"export VLLM_API_KEY={server.api_key}" in str(line(shell, "export --show-key"))


def test_pasted_variables_are_exported_and_forgotten_with_the_model(shell: Any, loaded: fakes.FakeLLM) -> None:
    body = "export HF_HUB_OFFLINE=1\nVLLM_METAL_MEMORY_FRACTION=0.5 vllm serve smollm2 --port 8124"
    cell(shell, "vllm_metal serve", body)
    text = str(line(shell, "export"))
    assert "export HF_HUB_OFFLINE=1\n" in text
    assert "export VLLM_METAL_MEMORY_FRACTION=0.5\n" in text
    line(shell, "load smollm2")
    assert "export HF" not in str(line(shell, "export"))


def test_a_client_snippet_has_the_key_only_when_asked_for(shell: Any, loaded: fakes.FakeLLM) -> None:
    server = line(shell, "serve smollm2 --api-key sk-mine")
    assert "$VLLM_API_KEY" in str(line(shell, "export --client curl"))
    assert server.base_url in str(line(shell, "export --client openai"))
    assert "Bearer sk-mine" in str(line(shell, "export --client curl --show-key"))


def test_the_status_card_offers_the_snippets_while_the_port_is_open(shell: Any, loaded: fakes.FakeLLM) -> None:
    assert "curl" not in line(shell, "status")._repr_html_()
    server = line(shell, "serve smollm2 --api-key sk-mine")
    page = line(shell, "status")._repr_html_()
    assert all(name in page for name in ("openai", "anthropic", "curl", "codex", server.base_url))
    assert "sk-mine" not in page


def test_the_llm_tool_lists_the_model_that_was_written(
    shell: Any, loaded: fakes.FakeLLM, tool: Path, capsys: Capture
) -> None:
    line(shell, "serve smollm2 --api-key sk-mine")
    shown = line(shell, "llm --show")
    assert not tool.exists()
    line(shell, "llm --model-id here")
    assert "llm -m here" in capsys.readouterr().out
    assert str(shown).replace('"smollm2"', '"here"', 1) == (tool / "extra-openai-models.yaml").read_text()
    assert json.loads((tool / "keys.json").read_text())["vm-magic"] == "sk-mine"
    command = [sys.executable, "-m", "llm", "models", "list", "-q", "here"]
    found = subprocess.run(command, env={**os.environ}, capture_output=True, text=True, check=True, timeout=60)
    assert "OpenAI Chat: here" in found.stdout


def test_what_is_printed_does_not_name_the_users_home(
    shell: Any, loaded: fakes.FakeLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path / "own" / "llm"))
    line(shell, "serve smollm2 --api-key sk-mine")
    assert "~/own/llm/extra-openai-models.yaml" in line(shell, "llm --show").note
    line(shell, "llm")
    printed = capsys.readouterr().out
    assert "~/own/llm/keys.json" in printed
    assert str(tmp_path) not in printed
    assert "sk-mine" not in printed
