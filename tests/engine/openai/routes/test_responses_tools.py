"""``/v1/responses``: tools that are not plain functions, items that other servers wrote, thoughts that come back."""

import json
from typing import Any

import httpx
import pytest

from engine.openai.routes.responses_calls import CallItems
from engine.openai.schema.left_out import LeftOut
from engine.openai.schema.responses_tools import GivenTool, read_tools
from engine.openai.schema.sealed_thought import seal, unseal
from engine.params.structured_outputs import StructuredOutput
from engine.text.parse.scan.output_sink import ToolCallDelta
from engine.text.template.chat_template import ChatTemplate
from tests.engine.openai import strict
from tests.engine.openai.fakes import TEMPLATE, FakeLLM
from tests.engine.openai.routes.test_responses import TOOL, post, prompt_of, stream, without_ids

PATCH: dict[str, Any] = {"type": "custom", "name": "patch", "description": "Changes files."}
SEARCH = {"type": "tool_search", "execution": "client", "description": "Finds tools.", "parameters": {"type": "object"}}
ASKED = {"role": "user", "content": "Hi"}
TEXT = 'a "quote"\\ \n\t€ 😀 \u2028 {"input": "x"}'


@pytest.fixture
def llm() -> FakeLLM:
    llm = FakeLLM(max_model_len=8192)
    llm.reasoning_parser, llm.tool_call_parser = "qwen3", "hermes"
    return llm


def call_of(name: str, *, ascii: bool = False, **arguments: Any) -> str:
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=ascii)
    return f"<tool_call>\n{call}\n</tool_call>"


def namespace(name: str, *functions: str) -> dict[str, Any]:
    tools = [{"type": "function", "name": function, "parameters": {"type": "object"}} for function in functions]
    return {"type": "namespace", "name": name, "description": f"All about {name}.", "tools": tools}


def functions_shown(llm: FakeLLM, http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    """The functions as the prompt lists them."""
    response = http.post("/v1/responses", json={"input": "Hi", **body})
    assert response.status_code == 200, response.text
    shown: list[dict[str, Any]] = json.loads(prompt_of(llm).partition("<tools>")[2].partition("</tools>")[0])
    return [tool["function"] for tool in shown]


@pytest.fixture
def showing(llm: FakeLLM) -> FakeLLM:
    shown = TEMPLATE.replace("{{ tools | length }} tools", "<tools>{{ tools | tojson }}</tools>")
    llm.chat_template = ChatTemplate(shown)
    return llm


@pytest.mark.parametrize("ascii", [False, True])
def test_a_custom_tools_input_is_streamed_as_plain_text(http: httpx.Client, llm: FakeLLM, ascii: bool) -> None:
    llm.reply = call_of("patch", ascii=ascii, input=TEXT)
    reply = post(http, tools=[PATCH])
    (call,) = reply["output"]
    assert (call["type"], call["name"], call["input"], call["status"]) == (
        "custom_tool_call",
        "patch",
        TEXT,
        "completed",
    )
    llm.token_seconds = 0.001  # what comes at once is one event
    events = stream(http, tools=[PATCH])
    assert without_ids(events[-1]["response"]) == without_ids(reply)
    names = [event["type"].removeprefix("response.") for event in events[2:-1]]
    assert names[0] == "output_item.added"
    assert set(names[1:-2]) == {"custom_tool_call_input.delta"}
    assert names[-2:] == ["custom_tool_call_input.done", "output_item.done"]
    deltas = [event["delta"] for event in events if "delta" in event]
    assert len(deltas) > 10
    assert "".join(deltas) == events[-3]["input"] == TEXT


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"input": ""}', ""),
        ('{ "input" : "a\\u00e9\\ud83d\\ude00b" }', "aé😀b"),
        ('{"input": "a\\ud83d"}', "a\ufffd"),
        ('{"input": "a", "more": "b"}', "a"),
        ('{"patch": "a\\n"}', "a\n"),
        ('{"input": {"a": 1}}', '{"input": {"a": 1}}'),
        ("{}", "{}"),
        ('{"a": "b", "c": 1}', '{"a": "b", "c": 1}'),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_however_a_call_is_cut_its_input_is_the_same(arguments: str, text: str, size: int) -> None:
    calls = CallItems(read_tools([GivenTool("tools[0]", PATCH)], LeftOut()))
    item = calls.item(ToolCallDelta(0, "call_1", "patch"))
    pieces = [arguments[start : start + size] for start in range(0, len(arguments), size)]
    deltas = [*(item.add(piece) for piece in pieces), item.finish()]
    assert "".join(deltas) == item.json["input"] == text
    assert item.done() == {"input": text}


def test_a_custom_tool_is_a_function_of_one_text_that_shows_its_grammar(http: httpx.Client, showing: FakeLLM) -> None:
    regex = {**PATCH, "name": "number", "format": {"type": "grammar", "syntax": "regex", "definition": "[0-9]+"}}
    plain, number = functions_shown(showing, http, tools=[{**PATCH, "format": {"type": "text"}}, regex])
    assert plain["description"] == "Changes files."
    assert plain["parameters"]["properties"]["input"]["type"] == "string"
    assert number["description"].endswith("follows this regular expression:\n[0-9]+")
    assert number["parameters"]["properties"]["input"]["pattern"] == "^(?:[0-9]+)$"


@pytest.mark.parametrize(("syntax", "kind"), [("lark", "grammar"), ("regex", "regex")])
def test_a_demanded_custom_tool_is_written_in_its_grammar(
    http: httpx.Client, llm: FakeLLM, syntax: str, kind: str
) -> None:
    definition = 'start: "a"+' if syntax == "lark" else "a+"
    tool = {**PATCH, "format": {"type": "grammar", "syntax": syntax, "definition": definition}}
    llm.reply = "<think>\nHm.\n</think>\n\naaa"
    asked = {"tools": [TOOL, tool], "tool_choice": {"type": "custom", "name": "patch"}}
    reply = post(http, **asked)
    assert llm.options[-1]["constraints"].structured == StructuredOutput(**{kind: definition})
    assert [(item["type"], item.get("input")) for item in reply["output"]] == [
        ("reasoning", None),
        ("custom_tool_call", "aaa"),
    ]
    assert without_ids(stream(http, **asked)[-1]["response"]) == without_ids(reply)
    call = reply["output"][1]
    outcome = {"type": "custom_tool_call_output", "call_id": call["call_id"], "output": "good"}
    llm.reply = "Done."
    post(http, input=[outcome], previous_response_id=reply["id"], tools=[tool])
    assert prompt_of(llm).endswith("<|start|>tool:good1 tools<|start|>assistant:")
    refused = http.post("/v1/responses", json={"input": "x", **asked, "structured_outputs": {"regex": "b"}})
    strict.error(refused, 400, "BadRequestError", "structured_outputs")


def test_functions_of_a_namespace_are_called_by_name_and_come_back_with_it(http: httpx.Client, llm: FakeLLM) -> None:
    llm.reply = call_of("find", a=1) + call_of("mail__find", b=2) + call_of("weather", city="Köln")
    tools = [namespace("files", "find", "open"), namespace("mail", "find"), TOOL]
    reply = post(http, tools=tools)
    named = [(item.get("namespace"), item["name"]) for item in reply["output"]]
    assert named == [("files", "find"), ("mail", "find"), (None, "weather")]
    assert [tool["type"] for tool in reply["tools"]] == ["namespace", "namespace", "function"]
    chosen = {"type": "function", "name": "find", "namespace": "mail"}
    post(http, tools=tools, tool_choice=chosen)
    assert llm.options[-1]["constraints"].structured.tool_calls.names == ("mail__find",)


def test_what_a_namespace_is_for_is_told_once(http: httpx.Client, showing: FakeLLM) -> None:
    tools = [namespace("mail", "find", "search"), {"type": "function", "name": "find"}]
    shown = functions_shown(showing, http, tools=tools)
    assert [(tool["name"], tool.get("description")) for tool in shown] == [
        ("mail__find", "mail: All about mail."),
        ("search", None),
        ("find", None),
    ]


def test_a_clients_tool_search_is_called_and_what_it_finds_is_told_there(http: httpx.Client, showing: FakeLLM) -> None:
    showing.reply = call_of("tool_search", query="mail")
    (search,) = stream(http, tools=[TOOL, SEARCH])[-1]["response"]["output"]
    assert (search["type"], search["execution"], search["arguments"]) == (
        "tool_search_call",
        "client",
        {"query": "mail"},
    )
    found = {"type": "tool_search_output", "call_id": search["call_id"], "tools": [namespace("mail", "find")]}
    showing.reply = call_of("find", who="Ann")
    names = [
        tool["name"] for tool in functions_shown(showing, http, input=[ASKED, search, found], tools=[TOOL, SEARCH])
    ]
    assert names == ["weather", "tool_search"], "the beginning of the prompt is what it was"
    assert '<|start|>tool:[{"type": "function", "function": {"name": "find", "parameters"' in prompt_of(showing)
    reply = post(http, input=[ASKED, search, found], tools=[TOOL, SEARCH])
    assert [(item["namespace"], item["name"]) for item in reply["output"]] == [("mail", "find")]
    again = post(http, input="More", previous_response_id=reply["id"], tools=[TOOL, SEARCH])
    assert again["output"][0]["namespace"] == "mail", "a stored conversation keeps what was found in it"


def test_additional_tools_can_be_called(http: httpx.Client, llm: FakeLLM) -> None:
    llm.reply = call_of("patch", input="x")
    more = {"type": "additional_tools", "role": "developer", "tools": [PATCH, namespace("mail", "find")]}
    reply = post(http, input=[more, ASKED])
    assert [item["type"] for item in reply["output"]] == ["custom_tool_call"]
    assert len(reply["tools"]) == 2
    assert "2 tools" in prompt_of(llm)


@pytest.mark.parametrize(
    "kind", ["web_search", "web_search_preview_2025_03_11", "file_search", "mcp", "local_shell", "tool_search"]
)
def test_a_tool_that_nobody_here_can_run_is_left_out_and_said(http: httpx.Client, llm: FakeLLM, kind: str) -> None:
    reply = post(http, tools=[TOOL, {"type": kind}], include=["web_search_call.action.sources"])
    assert [tool["type"] for tool in reply["tools"]] == ["function"]
    assert "1 tools" in prompt_of(llm)
    assert llm.prepared[-1].account.notes == (f"left out: the tool {kind}: this server runs no tools itself",)
    assert "tools" not in prompt_after(http, llm, tools=[{"type": kind}])


def prompt_after(http: httpx.Client, llm: FakeLLM, **body: Any) -> str:
    post(http, **body)
    return prompt_of(llm)


def test_calls_of_all_kinds_and_their_results_are_read(http: httpx.Client, showing: FakeLLM) -> None:
    showing.chat_template = ChatTemplate(
        "{% for m in messages %}{{ m.role }}:{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        "{{ c.function.arguments | tojson }}{% endfor %}{{ m.content }}\n{% endfor %}"
    )
    shell = {"type": "exec", "command": ["ls"], "env": {}}
    diff = {"type": "update_file", "path": "a", "diff": "+b"}
    image = {"type": "input_image", "image_url": "data:image/png;base64,AA=="}
    items: list[dict[str, Any]] = [
        ASKED,
        {"type": "custom_tool_call", "call_id": "1", "name": "patch", "input": 'a"b'},
        {"type": "custom_tool_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "one"}, image]},
        {"type": "local_shell_call", "id": "ls_1", "call_id": "2", "status": "completed", "action": shell},
        {"type": "local_shell_call_output", "id": "2", "output": "two"},
        {"type": "apply_patch_call", "call_id": "3", "operation": diff},
        {"type": "apply_patch_call_output", "call_id": "3", "status": "completed", "output": "three"},
        {"type": "function_call", "call_id": "4", "name": "find", "namespace": "mail", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "4", "output": {"found": 4}},
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
        {"type": "compaction", "encrypted_content": "gAAAA"},
        {"role": "assistant", "phase": "commentary", "content": "So."},
    ]
    post(http, input=items, tools=[{"type": "function", "name": "find"}, namespace("mail", "find")])
    assert prompt_of(showing).splitlines() == [
        "user:Hi",
        'assistant:patch{"input": "a\\"b"}',
        "tool:one",
        "[image left out: only text can be read here]",
        'assistant:local_shell{"type": "exec", "command": ["ls"], "env": {}}',
        "tool:two",
        'assistant:apply_patch{"type": "update_file", "path": "a", "diff": "+b"}',
        "tool:three",
        'assistant:mail__find{"a": 1}',
        'tool:{"found": 4}',
        "assistant:So.",
    ]
    left_out = [note.split(": ")[1] for note in showing.prepared[-1].account.notes]
    assert left_out == ["input_image of a tool's result", "web_search_call of `input`", "compaction of `input`"]


def test_a_stored_item_can_be_referred_to(http: httpx.Client, llm: FakeLLM) -> None:
    llm.reply = "Well."
    said = post(http)["output"][0]["id"]
    for reference in ({"type": "item_reference", "id": said}, {"id": said}):
        post(http, input=[ASKED, reference, {"role": "user", "content": "And?"}])
        assert "user:Hi<|start|>assistant:Well.<|start|>user:And?" in prompt_of(llm)


def test_a_thought_comes_back_sealed_and_is_read_again(http: httpx.Client, llm: FakeLLM) -> None:
    source = "{% for m in messages %}{{ m.role }}:{{ m.reasoning }}|{{ m.content }}\n{% endfor %}"
    llm.chat_template = ChatTemplate(source)
    llm.reply = "<think>\nHm, wörld.\n</think>\n\nHello!"
    assert "encrypted_content" not in post(http)["output"][0]
    reply = stream(http, include=["reasoning.encrypted_content"], store=False)[-1]["response"]
    thought, answer = reply["output"]
    assert "wörld" not in thought["encrypted_content"]
    del thought["content"]
    for sealed, shown in (
        (thought["encrypted_content"], "Hm, wörld."),
        (thought["encrypted_content"][:-2] + "AA", ""),
        ("gAAAAABo", ""),
    ):
        post(http, input=[ASKED, thought | {"encrypted_content": sealed}, answer, ASKED])
        assert prompt_of(llm).splitlines()[1] == f"assistant:{shown}|Hello!"
        notes = llm.prepared[-1].account.notes
        assert [note.split(":")[1] for note in notes] == ([] if shown else [" a thought of `input`"])


@pytest.mark.parametrize("sealed", [None, 3, "", "vm1.", "vm1.é", "vm1.AAA", "vm2.AAAA", seal("x")[:-1], seal("")])
def test_what_was_not_sealed_here_is_no_thought(sealed: object) -> None:
    assert not unseal(sealed)


@pytest.mark.parametrize(
    ("tool", "words"),
    [
        ({"type": "custom"}, "tools[0].name"),
        ({"type": "custom", "name": "x", "format": {"type": "grammar", "syntax": "ebnf"}}, "tools[0].format"),
        ({"type": "custom", "name": "x", "format": 3}, "tools[0].format"),
        ({"type": "namespace", "name": "x"}, "tools[0] must have a name and tools"),
        ({"type": "namespace", "name": "x", "tools": [{"type": "mcp"}]}, "tools[0].tools[0]"),
        ({"type": "namespace", "name": "x", "tools": [{"type": "function"}]}, "tools[0].name"),
        ({"type": 3}, "tools[0]"),
        ({}, "tools[0]"),
    ],
)
def test_a_tool_that_is_not_whole_is_refused_with_its_place(
    http: httpx.Client, tool: dict[str, Any], words: str
) -> None:
    response = http.post("/v1/responses", json={"input": "Hi", "tools": [tool]})
    assert words in strict.error(response, 400, "BadRequestError", "tools")


@pytest.mark.parametrize(
    "item",
    [
        {"type": "additional_tools", "role": "developer"},
        {"type": "tool_search_output", "call_id": "1", "tools": [3]},
        {"type": "custom_tool_call", "call_id": "1", "name": "x"},
        {"type": "custom_tool_call_output", "output": "x"},
        {"type": "item_reference", "id": "msg_gone"},
    ],
)
def test_an_item_that_is_not_whole_is_refused_with_its_place(http: httpx.Client, item: dict[str, Any]) -> None:
    response = http.post("/v1/responses", json={"input": [ASKED, item]})
    assert "input[1]" in strict.error(response, 400, "BadRequestError", "input")
