"""Functions of the notebook called by a model that says what the test wrote, through the real engine."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from IPython.core.error import UsageError

from engine import LLM
from engine.errors import RequestError
from engine.explain.request_log import RequestLog
from engine.params.sampling_params import SamplingParams
from tests import scripted_model
from tests.vm_magic import fakes
from tests.vm_magic.helpers import Capture, cell, line, shown
from vm_magic.chat.tools import read_tools
from vm_magic.show.errors import Interrupted
from vm_magic.state.session import current_session

TEMPLATE = r"""{% if tools %}<|im_start|>system
<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools><|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{{ "<|im_start|>assistant\n" }}"""


def call(name: str, **arguments: Any) -> str:
    """What the model writes to call a function."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


WEATHER = call("get_weather", city="Köln", days=3)


def get_weather(city: str, days: int = 1) -> str:
    """The weather in a city.

    Args:
        city: Name of the city.
    """
    return f"{days} days of rain in {city} <|script_1|>"


SCRIPTS = (
    f"Let me look.\n{WEATHER}",
    "It rains in Köln.",
    f"{WEATHER}\n{call('get_weather', city='Ulm')}",
    call("delete_all"),
    call("fails", x="3"),
    f"{call('fails', x='many')}\n{call('fails', y=1)}",
    call("again"),
    call("lookup", word="a"),
)
"""``<|script_N|>`` in a message, or in a result, chooses what the model says next."""


@pytest.fixture(scope="module")
def model(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    scripted_model.install()
    folder = scripted_model.write_scripted_model(
        tmp_path_factory.mktemp("tools") / "model", smollm2_gguf, SCRIPTS, chat_template=TEMPLATE
    )
    with LLM(str(folder), max_model_len=2048, gpu_memory_utilization=0.2, tool_call_parser="hermes") as loaded:
        yield loaded


@pytest.fixture
def llm(shell: Any, model: LLM) -> Iterator[LLM]:
    """The model as the notebook's own, and a function for it."""
    model.request_log = RequestLog()
    current_session().llm = model
    shell.user_ns["get_weather"] = get_weather
    yield model
    current_session().llm = None


def roles(shell: Any) -> list[str]:
    """The conversation as roles; each call in it must have its answer."""
    messages = line(shell, "history").messages
    asked = [one["id"] for message in messages for one in message.get("tool_calls", ())]
    assert asked == [message["tool_call_id"] for message in messages if message["role"] == "tool"]
    return [message["role"] for message in messages]


def test_a_model_calls_a_function_and_answers_with_its_result(shell: Any, llm: LLM) -> None:
    reply = cell(shell, "chat -t 0 --tools get_weather", "How is the weather?")
    assert (reply.text, reply.finish_reason) == ("It rains in Köln.", "stop")
    assert roles(shell) == ["user", "assistant", "tool", "assistant"]
    assert line(shell, "history").messages[2]["content"].startswith("3 days of rain in Köln")
    data = shown(shell)
    assert data["text/plain"] == (
        "Let me look.\nget_weather(city='Köln', days=3) → 3 days of rain in Köln <|script_1|>\nIt rains in Köln."
    )
    card = next(row for row in data["text/markdown"].splitlines() if row.startswith("<div"))
    assert "get&#95;weather(city=&#x27;Köln&#x27;, days=3)" in card
    assert "3 days of rain in Köln &lt;" in card
    prompt = llm.explain(2).prompt
    assert '"description": "The weather in a city."' in prompt
    assert '"description": "Name of the city."' in prompt
    assert llm.explain(2).outputs[0].tool_calls[0]["name"] == "get_weather"
    assert len({output["transient"]["display_id"] for output in shell.display_pub.outputs}) == 1


def test_stats_are_those_of_the_whole_turn(shell: Any, llm: LLM, capsys: Capture) -> None:
    cell(shell, "chat -t 0 --stats --tools get_weather", "How is the weather?")
    told = capsys.readouterr().out
    requests = [llm.explain(2), llm.explain(1)]
    tokens = sum(request.outputs[0].num_tokens for request in requests)
    prompts = sum(len(request.tokens) for request in requests)
    assert told.startswith(f"2 requests · {tokens} tokens · ")
    assert f"prompts {prompts} tokens" in told
    cell(shell, "chat -n -t 0 --stats --max-tokens 3", "Hello")
    assert capsys.readouterr().out.splitlines()[-1].startswith("3 tokens · ")


def test_two_calls_of_one_turn_are_both_answered(shell: Any, llm: LLM) -> None:
    assert cell(shell, "chat -t 0 --tools get_weather", "Köln and Ulm? <|script_2|>").text == "It rains in Köln."
    assert roles(shell) == ["user", "assistant", "tool", "tool", "assistant"]
    assert "1 days of rain in Ulm" in line(shell, "history").messages[3]["content"]


def test_what_was_not_named_is_never_called(shell: Any, llm: LLM) -> None:
    called = []
    shell.user_ns["delete_all"] = lambda: called.append("delete_all")
    reply = cell(shell, "chat -t 0 --tools get_weather --max-tool-rounds 1", "Go on. <|script_3|>")
    assert called == []
    told = reply.messages[2]["content"]
    assert told == "Error: there is no function 'delete_all'; there are: get_weather"


def test_errors_and_wrong_arguments_are_told_to_the_model_and_shown(shell: Any, llm: LLM) -> None:
    def fails(x: int) -> int:
        raise ValueError(f"no {x}\nat all <|script_5|>")

    shell.user_ns["fails"] = fails
    reply = cell(shell, "chat -t 0 --tools fails --max-tool-rounds 2", "Try. <|script_4|>")
    contents = [message["content"] for message in reply.messages if message["role"] == "tool"]
    assert contents[0] == "Error: ValueError: no 3 at all <|script_5|>"
    assert contents[1].startswith("Error: wrong arguments: x: Input should be a valid integer")
    assert contents[2].startswith("Error: wrong arguments: x: Field required; y: Extra inputs are not permitted")
    assert "⚠ ValueError: no 3 at all" in shown(shell)["text/markdown"]


@pytest.mark.parametrize("written", ['{"city": "K', '"Köln"', "[1]", "Köln"])
def test_a_conversation_with_broken_arguments_goes_on_and_the_model_sees_them(
    shell: Any, llm: LLM, written: str
) -> None:
    made = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": written}}
    history: list[dict[str, Any]] = [
        {"role": "user", "content": "How is the weather?"},
        {"role": "assistant", "content": "", "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "c1", "name": "get_weather", "content": "Error: wrong arguments"},
    ]
    current_session().conversation(None).messages = list(history)
    assert cell(shell, "chat -t 0", "Well? <|script_1|>").text == "It rains in Köln."
    asked = [*history, {"role": "user", "content": "Well? <|script_1|>"}]
    (output,) = llm.chat(asked, SamplingParams(temperature=0, max_tokens=50))
    assert output.outputs[0].text == "It rains in Köln."
    shown = f'{{"name": "get_weather", "arguments": {written}}}'
    assert shown in llm.explain(1).prompt
    assert shown in llm.explain(2).prompt


def test_the_loop_stops_at_its_limit_and_says_so(shell: Any, llm: LLM, capsys: Capture) -> None:
    count = []

    def again() -> str:
        """Once more."""
        count.append(1)
        return "again"

    shell.user_ns["again"] = again
    reply = cell(shell, "chat -t 0 --tools again --max-tool-rounds 2", "Loop. <|script_6|>")
    assert len(count) == 2
    assert reply.finish_reason == "tool_calls"
    assert "stopped after 2 rounds of tool calls: a larger --max-tool-rounds" in capsys.readouterr().out
    assert roles(shell) == ["user", *["assistant", "tool"] * 3]
    assert reply.messages[-1]["content"] == "Error: not called: the limit of 2 rounds was reached"


def test_an_interrupt_in_a_function_leaves_no_call_open(shell: Any, llm: LLM) -> None:
    def stuck(city: str, days: int = 1) -> str:
        raise KeyboardInterrupt

    shell.user_ns["get_weather"] = stuck
    with pytest.raises(Interrupted, match="stopped in get_weather"):
        cell(shell, "chat -t 0 --tools get_weather", "Weather? <|script_2|>")
    assert roles(shell) == ["user", "assistant", "tool", "tool"]
    assert line(shell, "history").messages[-1]["content"] == "Error: interrupted by the user"
    assert "interrupted" in shown(shell)["text/plain"]
    assert not current_session().require().stats().num_running


def test_a_call_that_was_cut_off_is_not_made(shell: Any, llm: LLM) -> None:
    reply = cell(shell, "chat -t 0 --tools get_weather --max-tokens 16", "Weather?")
    assert reply.finish_reason == "length"
    assert roles(shell) == ["user", "assistant"]
    assert "tool_calls" not in line(shell, "history").messages[-1]


def test_coroutines_are_awaited_and_long_results_bounded(shell: Any, llm: LLM) -> None:
    async def lookup(word: str) -> dict[str, str]:
        await asyncio.sleep(0)
        return {"word": word, "text": "<|script_1|>" + "x " * 20_000}

    shell.user_ns["lookup"] = lookup
    reply = cell(shell, "chat -t 0 --tools lookup", "Look it up. <|script_7|>")
    result = reply.messages[2]["content"]
    assert result.startswith('{"word":"a","text":')
    assert len(result) < 1100
    assert result.endswith("characters left out)")
    assert reply.text == "It rains in Köln."


def test_a_demanded_call_is_made_in_the_first_turn_only(shell: Any, llm: LLM) -> None:
    for choice in ("required", "get_weather"):
        reply = cell(shell, f"chat -n -t 0 --tools get_weather --tool-choice {choice}", "Weather? <|script_2|>")
        assert reply.text == "It rains in Köln."
        assert any("tool_calls" in row for row in line(shell, "explain 2").explanation.constraints)
        assert not line(shell, "explain").explanation.constraints
    reply = cell(shell, "chat -n -t 0 --tools get_weather --tool-choice none", "Weather?")
    assert (reply.finish_reason, reply.tool_calls) == ("stop", [])


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--tools nothing", "no function of that name"),
        ("--tools number", "int is not a function"),
        ("--tools get_weather --tool-choice other", "one of --tools"),
        ("--tool-choice required", "goes with --tools"),
        ("--tools get_weather --json object", "does not go with --json"),
        ("--tools get_weather --detach", "does not go with --detach"),
        ("--tools get-weather", "not a variable name"),
        ("--tools get_weather --max-tool-rounds 0", "at least 1"),
        ("--tools bad_hints", "no JSON form"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_asked(shell: Any, llm: LLM, flags: str, told: str) -> None:
    def bad_hints(data: Iterator) -> None:  # type: ignore[type-arg]
        ...

    bad_hints.__annotations__["data"] = type("Odd", (), {})
    shell.user_ns.update(number=3, bad_hints=bad_hints)
    with pytest.raises((RequestError, UsageError), match=told):
        cell(shell, f"chat {flags}", "Hello?")
    assert len(llm.request_log) == 0


def test_a_model_without_a_form_for_tools_says_so_in_one_line(shell: Any, loaded: fakes.FakeLLM) -> None:
    shell.user_ns["get_weather"] = get_weather
    loaded.takes_tools = False
    with pytest.raises(RequestError, match=r"^--tools: this model's chat template has no known form for tools"):
        cell(shell, "chat --tools get_weather", "Weather?")


def test_the_line_form_calls_too_and_returns_the_last_reply(shell: Any, llm: LLM) -> None:
    reply = line(shell, "chat -t 0 --tools get_weather How is the weather?")
    assert str(reply) == "It rains in Köln."
    assert shell.display_pub.outputs == []


def test_probabilities_and_tools_are_shown_in_one_picture(shell: Any, llm: LLM) -> None:
    cell(shell, "chat -t 0 --logprobs 3 --tools get_weather", "Weather?")
    page = shown(shell)["text/html"]
    assert page.index("get&#95;weather(") < page.index("rain in Köln") < page.index(" rains")
    assert page.count("<pre") == page.count("</pre>") == 3


@pytest.mark.parametrize(
    "text",
    [
        "Add.\n\nParameters\n----------\nx, y : int\n    Numbers.\nscale : float, default: 2\n    Factor.\n"
        "*rest\n    More.",
        "Add.\n\nArgs:\n    x, y (int): Numbers.\n    scale (float, optional): Factor.\n    *rest (int): More.",
        "Add.\n\n:param int x, y: Numbers.\n:param dict[str, int] scale: Factor.\n:param \\\\*rest: More.",
        "Add.\n\n:arg list of int x,y: Numbers.\n:keyword scale: Factor.\n:type scale: float\n:returns: x: y",
    ],
)
def test_every_style_of_docstring_describes_each_argument(text: str) -> None:
    def add(x: int, y: int, *rest: int, scale: float = 2.0) -> float:
        return scale * (x + y + sum(rest))

    add.__doc__ = text
    function = read_tools(["add"], {"add": add})[0].schema["function"]
    described = {name: one["description"] for name, one in function["parameters"]["properties"].items()}
    assert described == {"x": "Numbers.", "y": "Numbers.", "scale": "Factor."}
    assert function["description"] == "Add."
