"""Pasted shell text: what documentation prints, without a shell."""

import pytest

from engine.errors import ConfigError
from vm_magic.commands.shell_text import read_shell_text

ENVIRON = {"HOME": "/home/me", "PATH": "/bin", "PORT0": "9"}


def arguments(text: str) -> list[str]:
    return read_shell_text(text, ENVIRON).arguments


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_shell_text(text, ENVIRON)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_documented_block_reads_as_it_would_in_a_shell() -> None:
    text = """#!/bin/bash
# Serve it
export VLLM_METAL_MEMORY_FRACTION=0.8  # leave some
HF_HUB_OFFLINE=1 vllm serve org/model \\
    --max-model-len 32K \\
    --override-generation-config '{"temperature": 0.2, "top_p": 0.9}' \\
    --served-model-name "my model"
"""
    found = read_shell_text(text, ENVIRON)
    assert found.environment == {"VLLM_METAL_MEMORY_FRACTION": "0.8", "HF_HUB_OFFLINE": "1"}
    assert found.arguments == [
        "org/model", "--max-model-len", "32K", "--override-generation-config",
        '{"temperature": 0.2, "top_p": 0.9}', "--served-model-name", "my model",
    ]  # fmt: skip
    assert found.notes == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("vllm serve m", ["m"]),
        ("$ vllm serve m", ["m"]),
        ("/opt/venv/bin/vllm serve m", ["m"]),
        ("~/.venv/bin/vllm serve ~/models/m", ["/home/me/models/m"]),
        ("env A=1 B=2 vllm serve m", ["m"]),
        ("vllm serve m &", ["m"]),
        ("A=1; vllm serve m --seed $A", ["m", "--seed", "1"]),
        ("export A=1 && vllm serve m --seed ${A}", ["m", "--seed", "1"]),
        ("M=org/m\nvllm serve $M", ["org/m"]),
        ("M=org/m\nvllm serve \"$M\" '$M'", ["org/m", "$M"]),
        ("vllm serve m --port ${NOPE:-8001}", ["m", "--port", "8001"]),
        ("vllm serve $HOME/m --port $PORT0", ["/home/me/m", "--port", "9"]),
        ("vllm serve m --tokenizer=~/t", ["m", "--tokenizer=/home/me/t"]),
        ("vllm serve m --x 'a # b' # comment", ["m", "--x", "a # b"]),
        ("vllm serve m#1", ["m#1"]),
        ('vllm serve m --j "{\\"a\\": 1}"', ["m", "--j", '{"a": 1}']),
        ("vllm serve m --j '{\n \"a\": 1\n}'", ["m", "--j", '{\n "a": 1\n}']),
        ("vllm serve m\\ 1", ["m 1"]),
        ("vllm serve m \\\r\n  --seed 1", ["m", "--seed", "1"]),
        ('vllm serve m --t "<think>"x', ["m", "--t", "<think>x"]),
        ("vllm serve m --x ''", ["m", "--x", ""]),
        ("", []),
        ("# nothing\n", []),
    ],
)
def test_words_are_split_quoted_and_expanded_as_in_a_shell(text: str, words: list[str]) -> None:
    assert arguments(text) == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pip install vllm\nvllm serve m", ["line 1", "'pip'"]),
        ("vllm serve m\n\ncurl http://localhost:8000", ["line 3", "'curl'"]),
        ("source ~/.venv/bin/activate", ["line 1", "'source'"]),
        ("vllm bench serve", ["line 1", "'vllm bench'"]),
        ("vllm serve a\nvllm serve b", ["line 2", "second vllm serve", "line 1"]),
        ("vllm serve m --port <port>", ["line 1", "<port>", "placeholder"]),
        ("\nexport VLLM_API_KEY=<your key>\n", ["line 2", "<your key>", "placeholder"]),
        ('export VLLM_API_KEY="<your key>"', ["line 1", "<your key>", "placeholder"]),
        ("vllm serve m > log.txt", ["'>'", "%vllm_metal logs"]),
        ("vllm serve m | tee log", ["'|'"]),
        ("vllm serve $(cat model)", ["line 1", "run a command"]),
        ("vllm serve `cat model`", ["line 1", "run a command"]),
        ("vllm serve $NOPE", ["line 1", "$NOPE is not set"]),
        ("vllm serve 'm", ["line 1", "never closed"]),
        ('vllm serve "m', ["line 1", "never closed"]),
        ("alias v=vllm", ["line 1", "'alias'"]),
        ("env -i vllm serve m", ["line 1", "env -i"]),
    ],
)
def test_anything_else_is_refused_by_name_and_line(text: str, words: list[str]) -> None:
    message = refused(text)
    assert all(word in message for word in words), message


def test_path_is_left_alone_and_unknown_vllm_variables_are_said() -> None:
    found = read_shell_text("PATH=$HOME/bin:$PATH VLLM_USE_V1=1 vllm serve m", ENVIRON)
    assert "PATH" not in found.environment
    assert [note.split()[0] for note in found.notes] == ["PATH", "VLLM_USE_V1"]


def test_a_quoted_assignment_is_a_command_as_in_a_shell() -> None:
    assert "'A=1'" in refused("'A=1' vllm serve m")


def test_an_exported_value_keeps_its_spaces() -> None:
    assert read_shell_text("export A=\"x  y\" B='$Z'", ENVIRON).environment == {"A": "x  y", "B": "$Z"}


def test_vllms_variable_for_the_attention_backend_is_said_to_have_another_name() -> None:
    found = read_shell_text("VLLM_ATTENTION_BACKEND=FLASHINFER VLLM_LOGGING_LEVEL=DEBUG vllm serve m", ENVIRON)
    assert found.notes == [
        "VLLM_ATTENTION_BACKEND is not read by this engine; VLLM_METAL_ATTENTION_BACKEND is",
        "VLLM_LOGGING_LEVEL is not read by this engine",
    ]
    assert read_shell_text("VLLM_METAL_ATTENTION_BACKEND=paged vllm serve m", ENVIRON).notes == []
