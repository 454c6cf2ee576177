"""Tools in a cell with the templates and call formats of real model families."""

from pathlib import Path
from typing import Any

import pytest

from tests.engine.text.template.template_packages import TRL, template_source
from tests.vm_magic.helpers import cell, line
from tests.vm_magic.test_seed_recipes import scripted_family


@pytest.mark.parametrize(
    ("architecture", "template", "parsers"),
    [
        pytest.param("gemma4_text", "gemma4", "--reasoning-parser gemma4 --tool-call-parser gemma4", id="gemma"),
        pytest.param("qwen3_5_moe", "qwen3_6", "", id="qwen"),
    ],
)
def test_a_family_calls_a_function_and_reads_its_result(
    engine_shell: Any, smollm2_gguf: Path, tmp_path: Path, architecture: str, template: str, parsers: str
) -> None:
    shell = engine_shell
    model = scripted_family(tmp_path / "model", smollm2_gguf, architecture)
    source = tmp_path / "template.jinja"
    source.write_text(template_source(TRL, template), encoding="utf-8")
    line(shell, f"load {model} --max-model-len 4096 --gpu-memory-utilization 0.2 --chat-template {source} {parsers}")
    asked = []

    def get_weather(city: str, days: int) -> str:
        """The weather in a city."""
        asked.append((city, days))
        return "Nothing but rain."

    shell.user_ns["get_weather"] = get_weather
    reply = cell(shell, "chat -t 0 --think --tools get_weather --max-tool-rounds 1", "How is the weather in Köln?")
    assert asked == [("Köln", 3)]
    assert [message["role"] for message in reply.messages][:3] == ["user", "assistant", "tool"]
    assert line(shell, "explain 2").explanation.outputs[0].reasoning == "They ask about Köln."
    told = line(shell, "explain").explanation.prompt
    assert "The weather in a city." in told
    assert told.index("days") < told.index("How is the weather") < told.index("Nothing but rain.")
