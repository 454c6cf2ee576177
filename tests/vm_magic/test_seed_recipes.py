"""The commands that people already have for Gemma 4 and Qwen3.6, pasted into a cell as they are printed.

Only the model path and the placeholders are replaced. Each recipe runs on a tiny random model of the same architecture,
and on a scripted model that thinks and calls a tool in that family's own format, through that family's own template.
"""

import json
import os
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.errors import ConfigError
from tests import scripted_model, tiny_models
from tests.engine.text.template.template_packages import TRL, template_source
from tests.vm_magic.helpers import Capture, cell, line
from vm_magic.state.session import current_session

GEMMA = """\
export VLLM_METAL_MEMORY_FRACTION=0.65
vllm serve unsloth/gemma-4-26b-a4b-it-UD-MLX-4bit \\
--max-model-len 65536 \\
--enable-auto-tool-choice \\
--reasoning-parser gemma4 \\
--tool-call-parser gemma4 \\
--chat-template ~/.local/share/tool_chat_template_gemma4.jinja \\
--limit-mm-per-prompt image=0,audio=0 \\
--port <port> --api-key <your key>
"""
GEMMA_IN_ONE = """\
#!/bin/bash
env HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_METAL_MEMORY_FRACTION=0.65 \
PATH="$HOME/.venv-vllm-metal/bin:$PATH" "$HOME/.venv-vllm-metal/bin/vllm" serve \
unsloth/gemma-4-26b-a4b-it-UD-MLX-4bit \\
--max-model-len 65536 \\
--enable-auto-tool-choice \\
--reasoning-parser gemma4 \\
--tool-call-parser gemma4 \\
--chat-template ~/.local/share/tool_chat_template_gemma4.jinja \\
--port <port> --api-key <your key>
"""
QWEN = """\
#export VLLM_METAL_USE_PAGED_ATTENTION=0
export VLLM_METAL_MEMORY_FRACTION=0.80
vllm serve mlx-community/Qwen3.6-35B-A3B-4bit \\
--max-model-len 32768 \\
--enable-auto-tool-choice \\
--reasoning-parser qwen3 \\
--tool-call-parser qwen3_coder \\
--port <port> --api-key <your key>
"""
MODELS = ("unsloth/gemma-4-26b-a4b-it-UD-MLX-4bit", "mlx-community/Qwen3.6-35B-A3B-4bit")
KEY = "sk-of-the-recipe"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}
GEMMA_MARKS = (
    "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>",
    "<|tool_response>", "<tool_response|>", '<|"|>', "<|think|>",
)  # fmt: skip
QWEN_SCRIPT = """\
<think>
They ask about Köln.
</think>

<tool_call>
<function=get_weather>
<parameter=city>
Köln
</parameter>
<parameter=days>
3
</parameter>
</function>
</tool_call>"""
GEMMA_SCRIPT = (
    "<|channel>thought\nThey ask about Köln.<channel|>"
    '<|tool_call>call:get_weather{city:<|"|>Köln<|"|>,days:3}<tool_call|>'
)


@pytest.fixture
def home(tmp_path: Path, smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with the template where the recipe has it."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    share = tmp_path / "home" / ".local" / "share"
    share.mkdir(parents=True)
    (share / "tool_chat_template_gemma4.jinja").write_text(template_source(TRL, "gemma4"), encoding="utf-8")
    return tmp_path / "home"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def filled_in(recipe: str, model: Path, port: int) -> str:
    """The recipe with its placeholders and the model's path replaced, and nothing else."""
    for name in MODELS:
        recipe = recipe.replace(name, str(model))
    return recipe.replace("<port>", str(port)).replace("<your key>", KEY)


def random_model(folder: Path, gguf: Path, architecture: str) -> Path:
    folder.mkdir()
    tiny_models.write_weights(folder, tiny_models.family_config(architecture))
    tiny_models.write_tokenizer(folder, gguf)
    if architecture.startswith("qwen"):
        (folder / "chat_template.jinja").write_text(template_source(TRL, "qwen3_6"), encoding="utf-8")
    return folder


def scripted_family(folder: Path, gguf: Path, architecture: str) -> Path:
    gemma = architecture.startswith("gemma")
    scripted_model.install()
    scripted_model.write_scripted_model(
        folder,
        gguf,
        GEMMA_SCRIPT if gemma else QWEN_SCRIPT,
        prompt_suffix="<|turn>model\n" if gemma else scripted_model.SUFFIX,
        anchors=("<|channel>", "<channel|>") if gemma else ("<think>", "</think>"),
        special_tokens=GEMMA_MARKS if gemma else (),
        chat_template=None if gemma else template_source(TRL, "qwen3_6"),
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 131072}))
    return folder


def ask(port: int, **body: Any) -> Any:
    answer = httpx.post(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        headers={"Authorization": f"Bearer {KEY}"},
        json={"messages": [{"role": "user", "content": "What is the weather in Köln?"}], **body},
        timeout=120,
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


RECIPES = [
    pytest.param(GEMMA, "gemma4_text", 65536, 0.65, id="gemma"),
    pytest.param(GEMMA_IN_ONE, "gemma4_text", 65536, 0.65, id="gemma-in-one"),
    pytest.param(QWEN, "qwen3_5_moe", 32768, 0.80, id="qwen"),
    pytest.param(QWEN.replace("#export", "export"), "qwen3_5_moe", 32768, 0.80, id="qwen-not-paged"),
]


@pytest.mark.parametrize(("recipe", "architecture", "length", "fraction"), RECIPES)
def test_a_recipe_serves_a_model_of_its_architecture(
    engine_shell: Any, home: Path, smollm2_gguf: Path, tmp_path: Path, capsys: Capture,
    recipe: str, architecture: str, length: int, fraction: float,
) -> None:  # fmt: skip
    port = free_port()
    model = random_model(tmp_path / "model", smollm2_gguf, architecture)
    before = dict(os.environ)
    server = cell(engine_shell, "vllm_metal serve", filled_in(recipe, model, port))
    assert dict(os.environ) == before
    assert (server.port, server.api_key) == (port, KEY)
    llm = current_session().require()
    assert (llm.plan.max_model_len, llm.plan.fraction) == (length, fraction)
    parsers = ("gemma4", "gemma4") if architecture.startswith("gemma") else ("qwen3", "qwen3_coder")
    assert (llm.reasoning_parser, llm.tool_call_parser) == parsers
    assert ("PATH is not used" in capsys.readouterr().out) == ("PATH=" in recipe)
    choice = ask(port, tools=[TOOL], max_tokens=8, temperature=0)
    assert choice["finish_reason"] in ("length", "stop")
    assert cell(engine_shell, "chat --max-tokens 4 -t 0", "Hi").usage.completion_tokens == 4
    assert httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=10).status_code == 401


@pytest.mark.parametrize(("recipe", "architecture", "length", "fraction"), RECIPES[:1] + RECIPES[2:3])
def test_a_recipe_gives_thoughts_and_tool_calls_in_its_familys_own_format(
    engine_shell: Any, home: Path, smollm2_gguf: Path, tmp_path: Path,
    recipe: str, architecture: str, length: int, fraction: float,
) -> None:  # fmt: skip
    port = free_port()
    model = scripted_family(tmp_path / "model", smollm2_gguf, architecture)
    cell(engine_shell, "vllm_metal serve", filled_in(recipe, model, port))
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    choice = ask(port, tools=[TOOL], temperature=0, **thinking)
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["reasoning"] == message["reasoning_content"] == "They ask about Köln."
    assert not message["content"]
    (call,) = message["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Köln", "days": 3}
    reply = cell(engine_shell, "chat -t 0 --think", "What is the weather in Köln?")
    assert reply.reasoning == "They ask about Köln."
    explained = line(engine_shell, "explain 2").explanation.outputs[0]
    assert explained.tool_calls[0]["name"] == "get_weather"
    assert explained.reasoning == reply.reasoning


def test_a_recipe_with_its_placeholders_left_in_says_so(engine_shell: Any) -> None:
    with pytest.raises(ConfigError, match=r"line 8: <port> is a placeholder"):
        cell(engine_shell, "vllm_metal serve", QWEN)
