"""Calls that are broken or cut off, through the port; the packages' own clients put the pieces together."""

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import anthropic
import httpx
import openai
import pytest

from engine.memory.plan import MemoryPlan
from engine.openai.server import ServerHandle
from tests.engine.openai import strict, strict_more
from tests.engine.openai.fakes import FakeLLM

PARAMETERS = {
    "type": "object",
    "properties": {"command": {"type": "string"}, "count": {"type": "integer"}, "items": {"type": "array"}},
}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "Bash", "parameters": PARAMETERS}}]
FLAT_TOOLS: list[Any] = [{"type": "function", "name": "Bash", "parameters": PARAMETERS, "strict": False}]
CLAUDE_TOOLS: list[Any] = [{"name": "Bash", "input_schema": PARAMETERS}]
USER: list[Any] = [{"role": "user", "content": "Go"}]
Blocks = list[tuple[str, Any]]
"""Texts, and calls as their arguments, in order."""


@pytest.fixture(autouse=True)
def _long_replies(llm: FakeLLM) -> None:
    llm.plan = cast(MemoryPlan, SimpleNamespace(max_model_len=20_000))


@pytest.fixture
def claude(server: ServerHandle, monkeypatch: pytest.MonkeyPatch) -> Iterator[anthropic.Anthropic]:
    monkeypatch.setenv("NO_PROXY", "*")
    address = server.base_url.removesuffix("/v1")
    with anthropic.Anthropic(base_url=address, api_key=server.api_key, max_retries=0, timeout=60) as made:
        yield made


def post(http: httpx.Client, path: str, **body: Any) -> Any:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response


def blocks_of(message: dict[str, Any]) -> Blocks:
    return [
        ("call", block["input"]) if block["type"] == "tool_use" else ("text", block["text"])
        for block in message["content"]
    ]


def items_of(response: dict[str, Any]) -> Blocks:
    return [
        ("call", json.loads(item["arguments"])) if "arguments" in item else ("text", item["content"][0]["text"])
        for item in response["output"]
    ]


def replies(http: httpx.Client) -> tuple[Blocks, dict[str, Any]]:
    """The reply's blocks (the same in Messages and Responses, plain and streamed) and the chat's message."""
    asked: dict[str, Any] = {"messages": USER, "max_tokens": 15_000}
    message = strict_more.message(post(http, "/v1/messages", tools=CLAUDE_TOOLS, **asked).json())
    response = strict_more.response(post(http, "/v1/responses", input="Go", tools=FLAT_TOOLS).json())
    events = strict_more.response_events(post(http, "/v1/responses", input="Go", tools=FLAT_TOOLS, stream=True).text)
    strict_more.message_events(post(http, "/v1/messages", tools=CLAUDE_TOOLS, stream=True, **asked).text)
    assert blocks_of(message) == items_of(response) == items_of(events[-1]["response"])
    chat = strict.chat(post(http, "/v1/chat/completions", tools=TOOLS, **asked).json())["choices"][0]
    made = [json.loads(call["function"]["arguments"]) for call in chat["message"].get("tool_calls", ())]
    assert made == [given for kind, given in blocks_of(message) if kind == "call"]
    assert chat["finish_reason"] == ("tool_calls" if made else "stop")
    assert message["stop_reason"] == ("tool_use" if made else "end_turn")
    return blocks_of(message), chat["message"]


def bash(inside: str) -> str:
    return f"<tool_call>\n<function=Bash>\n{inside}\n</function>\n</tool_call>"


COMMAND = "<parameter=command>\nls -l\n</parameter>"
LISTED = ("call", {"command": "ls -l"})
WAYS_TO_WRITE_A_CALL = {
    "an object in the tag": ("qwen3_coder", bash('{"command": "ls -l"}'), [LISTED]),
    "an object that is not closed": ("qwen3_coder", bash('{"command": "ls -l"'), [LISTED]),
    "an object of name and arguments": (
        "qwen3_coder",
        '<tool_call>\n{"name": "Bash", "arguments": {"command": "ls -l"}}\n</tool_call>',
        [LISTED],
    ),
    "prose before the arguments": (
        "qwen3_coder",
        bash(f"I look first.\n{COMMAND}"),
        [("text", "I look first."), LISTED],
    ),
    "prose behind the arguments": (
        "qwen3_coder",
        bash(f"{COMMAND}\nThat lists.") + "\nDone.",
        [LISTED, ("text", "That lists.\n\nDone.")],
    ),
    "prose around an object": (
        "qwen3_coder",
        bash('Like so: {"command": "ls -l"} Good.'),
        [("text", "Like so:"), LISTED, ("text", "Good.")],
    ),
    "nothing but prose": ("qwen3_coder", bash("ls -l"), [("text", "ls -l"), ("call", {})]),
    "a wrong tag": ("qwen3_coder", bash("<command>ls</command>"), [("text", "<command>ls</command>"), ("call", {})]),
    "a value that quotes its closing tag": (
        "qwen3_coder",
        bash("<parameter=command>\necho </parameter> x\n</parameter>"),
        [("call", {"command": "echo </parameter> x"})],
    ),
    "a value that is not closed": (
        "qwen3_coder",
        bash("<parameter=command>\nls -l\n<parameter=count>\n3\n</parameter>"),
        [("call", {"command": "ls -l", "count": 3})],
    ),
    "a closing tag with too much in it": (
        "qwen3_coder",
        "<tool_call>\n<function=Bash>\n<parameter=command>\nls -l\n</parameter_function>\n</tool_call>",
        [LISTED],
    ),
    "a closing tag that is not closed": ("qwen3_coder", bash("<parameter=command>\nls -l\n</parameter"), [LISTED]),
    "a value that quotes such a tag": (
        "qwen3_coder",
        bash("<parameter=command>\necho </parameters> x\n</parameter>"),
        [("call", {"command": "echo </parameters> x"})],
    ),
    "a value that quotes a parameter's tag": (
        "qwen3_coder",
        bash("<parameter=command>\necho\n<parameter=other>\n3\n</parameter>"),
        [("call", {"command": "echo\n<parameter=other>\n3"})],
    ),
    "a function that is not closed": (
        "qwen3_coder",
        f"<tool_call>\n<function=Bash>\n{COMMAND}\n</tool_call>",
        [LISTED],
    ),
    "an object behind the name": ("glm45", '<tool_call>Bash\n{"command": "ls -l"}\n</tool_call>', [LISTED]),
    "an object right behind the name": ("glm45", '<tool_call>Bash{"command": "ls -l"}</tool_call>', [LISTED]),
    "an object in the opening tag": (
        "minimax_m2",
        '<minimax:tool_call>\n<invoke name="Bash"{"command": "ls -l"}>\n</invoke>\n</minimax:tool_call>',
        [LISTED],
    ),
    "a name that no function has": (
        "minimax_m2",
        '<minimax:tool_call><invoke name="Bash"></invoke>\n<invoke name="a b"once>\n</invoke>\n</minimax:tool_call>',
        [("call", {}), ("text", '<invoke name="a b"once>')],
    ),
    "a tag that is not closed": (
        "minimax_m2",
        '<minimax:tool_call>\n<invoke name="Bash"\n<parameter name="command"ls -l</parameter>\n</invoke>\n'
        "</minimax:tool_call>",
        [LISTED],
    ),
    "prose before an object": (
        "kimi_k2",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.Bash:0<|tool_call_argument_begin|>Well, "
        '{"command": "ls -l"}<|tool_call_end|><|tool_calls_section_end|>',
        [("text", "Well,"), LISTED],
    ),
    "a call without its section": (
        "kimi_k2",
        '<|tool_call_begin|>functions.Bash:0<|tool_call_argument_begin|>{"command": "ls -l"}<|tool_call_end|>',
        [LISTED],
    ),
    "a member that calls do not have": (
        "hermes",
        '<tool_call>{"name": "Bash", "why": "I look.", "arguments": {"command": "ls -l"}}</tool_call>',
        [("text", '"why": "I look."'), LISTED],
    ),
    "a header that no mark ends": (
        "openai",
        '<|channel|>commentary to=functions.Bash <|constrain|>json{"command": "ls -l"}<|call|>',
        [LISTED],
    ),
    "words in a header": (
        "openai",
        '<|start|>assistantLet me.<|channel|>commentary to=functions.Bash<|message|>{"command": "ls -l"}<|call|>',
        [("text", "Let me."), LISTED],
    ),
}


@pytest.mark.parametrize("way", WAYS_TO_WRITE_A_CALL)
def test_a_broken_call_is_still_a_call_and_its_words_keep_their_place(
    http: httpx.Client, llm: FakeLLM, way: str
) -> None:
    llm.tool_call_parser, llm.reply, blocks = WAYS_TO_WRITE_A_CALL[way]
    found, chat = replies(http)
    assert [(kind, what.strip() if kind == "text" else what) for kind, what in found] == blocks
    assert (chat["content"] or "").split() == " ".join(what for kind, what in blocks if kind == "text").split()


def test_a_function_that_prose_only_names_is_not_called(http: httpx.Client, llm: FakeLLM) -> None:
    llm.tool_call_parser, llm.reply = "qwen3_coder", "Write <function=Bash> to run a command."
    assert replies(http)[0] == [("text", llm.reply)]


ODD_VALUES = {
    "a number past a float's range": ('{"count": 1e999}', {"count": "1e999"}),
    "a fraction past a float's range": ('{"count": ' + "9" * 400 + ".5}", {"count": "9" * 400 + ".5"}),
    "not a number": ('{"count": NaN}', {"count": "NaN"}),
    "halves of surrogate pairs": (r'{"command": "\ud83d", "items": ["\ude00"]}', {"command": "�", "items": ["�"]}),
}
ODD_FORMS = {
    "hermes": '<tool_call>{"name": "Bash", "arguments": %s}</tool_call>',
    "granite": '<|tool_call|>[{"arguments": %s, "name": "Bash"}]',
    "qwen3_coder": "<tool_call><function=Bash>%s</function></tool_call>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>Bash<|tool_call_argument_begin|>%s<|tool_call_end|>",
}


@pytest.mark.parametrize("name", ODD_FORMS)
@pytest.mark.parametrize("odd", ODD_VALUES)
def test_a_value_that_json_cannot_carry_does_not_fail_the_reply(
    http: httpx.Client, llm: FakeLLM, odd: str, name: str
) -> None:
    written, read = ODD_VALUES[odd]
    llm.tool_call_parser, llm.reply = name, ODD_FORMS[name] % written
    assert replies(http)[0] == [("call", read)]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("count", "9" * 5000),
        ("count", "1e999"),
        ("items", "[1e999]"),
        ("items", "[" * 900 + "]" * 900),
        ("other", "NaN"),
    ],
)
def test_a_parameters_text_that_clients_could_not_read_as_json_stays_text(
    http: httpx.Client, llm: FakeLLM, key: str, value: str
) -> None:
    llm.tool_call_parser, llm.reply = "qwen3_coder", bash(f"<parameter={key}>\n{value}\n</parameter>")
    assert replies(http)[0] in ([("call", {key: value})], [("call", {key: ["1e999"]})])


def test_calls_of_one_id_get_ids_of_their_own(http: httpx.Client, llm: FakeLLM) -> None:
    call = '<tool_call>{"name": "Bash", "id": "same", "arguments": {}}</tool_call>'
    llm.tool_call_parser, llm.reply = "hermes", call + call
    ids = [call["id"] for call in replies(http)[1]["tool_calls"]]
    assert ids[0] == "same"
    assert len(set(ids)) == 2


CUT = {
    "hermes": "Let me.\n<tool_call>\n"
    '{"name": "Bash", "arguments": {"command": "rm -r /tmp/x", "items": [1, {"a": "b"}]}}\n</tool_call>',
    "qwen3_coder": "Let me.\n"
    + bash("<parameter=command>\nrm -r /tmp/x\n</parameter>\n<parameter=items>\n[1, 2]\n</parameter>"),
}


@pytest.mark.parametrize("name", CUT)
def test_the_clients_read_a_cut_call_as_valid_and_are_told_that_it_was_cut(
    client: openai.OpenAI, claude: anthropic.Anthropic, llm: FakeLLM, name: str
) -> None:
    llm.tool_call_parser, llm.reply = name, CUT[name]
    commands = set()
    for size in range(9, len(llm.reply), 4):
        asked: Any = {"model": "fake", "max_tokens": size, "messages": USER}
        plain = claude.messages.create(**asked, tools=CLAUDE_TOOLS)
        with claude.messages.stream(**asked, tools=CLAUDE_TOOLS) as message_stream:
            message = message_stream.get_final_message()
        assert (message.stop_reason, plain.stop_reason) == ("max_tokens", "max_tokens")
        assert [block.model_dump(exclude={"id"}) for block in message.content] == [
            block.model_dump(exclude={"id"}) for block in plain.content
        ]
        with (
            client.chat.completions.stream(**asked, tools=TOOLS) as chat_stream,
            pytest.raises(openai.LengthFinishReasonError) as told,
        ):
            chat_stream.get_final_completion()
        choice = told.value.completion.choices[0]
        assert choice.finish_reason == "length"
        with client.responses.stream(
            model="fake", max_output_tokens=size, input="Go", tools=FLAT_TOOLS
        ) as response_stream:
            response: Any = list(response_stream)[-1].response  # type: ignore[union-attr]
        assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert [item.status for item in response.output] == ["completed"] * (len(response.output) - 1) + ["incomplete"]
        inputs = [block.input for block in message.content if block.type == "tool_use"]
        assert [json.loads(call.function.arguments) for call in choice.message.tool_calls or ()] == inputs  # type: ignore[union-attr]
        assert [json.loads(item.arguments) for item in response.output if item.type == "function_call"] == inputs
        assert all(isinstance(given, dict) for given in inputs)
        assert (choice.message.content or "").strip().startswith("Let me.")
        commands |= {given["command"] for given in cast(list[Any], inputs) if "command" in given}
    assert "rm -r /tmp/x" in commands
    assert all("rm -r /tmp/x".startswith(command.rstrip("\n")) for command in commands), commands
