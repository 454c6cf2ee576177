"""What of Anthropic's blocks, tools and fields reaches the model, and what is said to be left out."""

import json
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from engine.memory.plan import MemoryPlan
from engine.openai.server import ServerHandle
from engine.text.template.chat_template import ChatTemplate
from tests.engine.openai.conftest import Serve, http_client
from tests.engine.openai.fakes import FakeLLM
from tests.engine.openai.routes.test_messages import TOOL, body_of

TEMPLATE = (
    "{% set seen = {'messages': messages, 'tools': tools, 'thinks': enable_thinking | default(none),"
    " 'effort': reasoning_effort | default(none), 'keeps': preserve_thinking | default(none)} %}{{ seen | tojson }}"
)
ASK: dict[str, Any] = {"role": "user", "content": "Hi"}
HIDDEN: dict[str, Any] = {
    "name": "later",
    "description": "L",
    "input_schema": {"type": "object"},
    "defer_loading": True,
}
TEXT: dict[str, Any] = {"type": "text", "text": "So."}
SEARCHED: list[Any] = [
    {"type": "thinking", "thinking": "Hm.", "signature": "x"},
    {"type": "text", "text": "I look."},
    {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {"query": "rain"}},
    {
        "type": "web_search_tool_result",
        "tool_use_id": "s1",
        "content": [
            {"type": "web_search_result", "title": "Rain", "url": "https://a.example", "encrypted_content": "=="},
            {"type": "web_search_result", "title": "Sun", "url": "https://b.example", "encrypted_content": "=="},
        ],
    },
    TEXT,
]


@pytest.fixture
def server(serve: Serve, llm: FakeLLM) -> ServerHandle:
    llm.plan = cast(MemoryPlan, SimpleNamespace(max_model_len=20_000))
    llm.tool_call_parser = "hermes"
    return serve(trust_request_chat_template=True)


def seen(http: httpx.Client, llm: FakeLLM, **body: Any) -> dict[str, Any]:
    """What the template was given; the same body must be counted as so many tokens."""
    whole = body_of(chat_template=TEMPLATE, **body)
    response = http.post("/v1/messages?beta=true", json=whole, headers={"anthropic-beta": "novelty-2030-01-01"})
    assert response.status_code == 200, response.text
    counted = http.post("/v1/messages/count_tokens?beta=true", json=whole)
    assert counted.json() == {"input_tokens": len(llm.submitted[-1].prompt_token_ids)}
    given: dict[str, Any] = json.loads(str(llm.submitted[-1].prompt))
    return given


def told(http: httpx.Client, llm: FakeLLM, *blocks: Any, role: str = "user", **body: Any) -> list[dict[str, Any]]:
    """The messages that come of one message with ``blocks``."""
    messages = [{"role": role, "content": list(blocks)}]
    if role == "assistant":
        messages = [ASK, *messages, ASK]
    found: list[dict[str, Any]] = seen(http, llm, messages=messages, **body)["messages"]
    return found[1:-1] if role == "assistant" else found


def notes(llm: FakeLLM) -> str:
    return "\n".join(llm.options[-1]["notes"])


def document(**source: Any) -> dict[str, Any]:
    return {"type": "document", "title": "T", "source": source}


@pytest.mark.parametrize(
    ("block", "text"),
    [
        (document(type="text", media_type="text/plain", data="Plain."), "T\nPlain."),
        (document(type="content", content=[TEXT, TEXT]), "T\nSo.\nSo."),
        (document(type="content", content="Inside."), "T\nInside."),
        ({"type": "search_result", "title": "T", "source": "a.txt", "content": [TEXT]}, "T\na.txt\nSo."),
    ],
)
def test_documents_and_search_results_are_read_as_text_by_users_and_in_results(
    http: httpx.Client, llm: FakeLLM, block: dict[str, Any], text: str
) -> None:
    assert told(http, llm, block, TEXT) == [{"role": "user", "content": f"{text}\nSo."}]
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [block]}
    assert told(http, llm, result)[0]["content"] == text
    assert not notes(llm)


@pytest.mark.parametrize("kind", ["redacted_thinking", "container_upload", "mcp_tool_listing", "fallback"])
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_blocks_that_only_anthropics_servers_can_read_are_left_out_and_said(
    http: httpx.Client, llm: FakeLLM, kind: str, role: str
) -> None:
    assert told(http, llm, {"type": kind, "data": "x"}, TEXT, role=role) == [{"role": role, "content": "So."}]
    assert f"left out: a {kind} block: " in notes(llm)
    assert told(http, llm, *[{"type": kind, "data": "x"}] * 3, TEXT, role=role)
    assert f"left out: a {kind} block (3 times): " in notes(llm)


def test_an_assistants_turn_of_nothing_readable_is_no_message(http: httpx.Client, llm: FakeLLM) -> None:
    assert told(http, llm, {"type": "redacted_thinking", "data": "x"}, role="assistant") == []
    assert told(http, llm, {"type": "thinking", "thinking": "", "signature": "x"}, TEXT, role="assistant") == [
        {"role": "assistant", "content": "So."}
    ]


def test_a_hosted_tools_call_and_result_are_messages_of_their_own(http: httpx.Client, llm: FakeLLM) -> None:
    call, result, rest = told(http, llm, *SEARCHED, role="assistant")
    assert (call["content"], call["reasoning"]) == ("I look.", "Hm.")
    assert call["tool_calls"][0]["function"] == {"name": "web_search", "arguments": {"query": "rain"}}
    assert (result["role"], result["tool_call_id"], result["name"]) == ("tool", "s1", "web_search")
    assert result["content"] == "title: Rain\nurl: https://a.example\ntitle: Sun\nurl: https://b.example"
    assert rest == {"role": "assistant", "content": "So."}


@pytest.mark.parametrize(
    ("kind", "content", "text"),
    [
        ("mcp_tool_result", [TEXT], "So."),
        ("mcp_tool_result", "Plain.", "Plain."),
        ("code_execution_tool_result", {"type": "r", "stdout": "4", "stderr": "", "return_code": 0, "content": []},
         "stdout: 4\nreturn_code: 0"),
        ("web_fetch_tool_result", {"type": "web_fetch_result", "url": "u",
                                   "content": document(type="text", data="Page.")}, "url: u\nT\nPage."),
        ("web_search_tool_result", {"type": "web_search_tool_result_error", "error_code": "unavailable"},
         "error_code: unavailable"),
        ("novel_tool_result", {"verdict": True}, "verdict: True"),
    ],
)  # fmt: skip
def test_every_hosted_result_is_read_as_far_as_it_can_be(
    http: httpx.Client, llm: FakeLLM, kind: str, content: Any, text: str
) -> None:
    call = {"type": "mcp_tool_use", "id": "m1", "name": "look", "server_name": "s", "input": {}}
    found = told(http, llm, call, {"type": kind, "tool_use_id": "m1", "content": content}, role="assistant")
    assert [message["role"] for message in found] == ["assistant", "tool"]
    assert found[1]["content"] == text


def test_half_of_a_hosted_call_is_left_out_and_said(http: httpx.Client, llm: FakeLLM) -> None:
    assert told(http, llm, SEARCHED[2], TEXT, role="assistant") == [{"role": "assistant", "content": "So."}]
    assert "its result is not in its message" in notes(llm)
    assert told(http, llm, SEARCHED[3], TEXT, role="assistant") == [{"role": "assistant", "content": "So."}]
    assert "the call that it answers is not in its message" in notes(llm)


def test_a_summary_stands_for_what_came_before_it(http: httpx.Client, llm: FakeLLM) -> None:
    summary = {"type": "compaction", "content": "They met.", "encrypted_content": "x", "signature": "y"}
    short = {"role": "user", "content": "The conversation so far, in short:\nThey met."}
    old = [ASK, {"role": "assistant", "content": "Hello."}]
    messages = [*old, ASK, {"role": "assistant", "content": [TEXT, summary, {"type": "text", "text": "On."}]}, ASK]
    assert seen(http, llm, messages=messages)["messages"] == [short, {"role": "assistant", "content": "On."}, ASK]
    assert "messages before a compaction block" in notes(llm)
    messages = [{"role": "user", "content": [summary, TEXT]}]
    assert seen(http, llm, messages=messages)["messages"] == [short, {"role": "user", "content": "So."}]
    failed = {"type": "compaction", "content": None}
    assert seen(http, llm, messages=[*old, {"role": "user", "content": [failed, TEXT]}])["messages"][:2] == old


def test_a_picture_in_a_tools_result_does_not_end_the_conversation(http: httpx.Client, llm: FakeLLM) -> None:
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
    scan = document(type="base64", media_type="application/pdf", data="AA==")
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [TEXT, picture, scan]}
    content = told(http, llm, result)[0]["content"]
    assert content == "So.\n[an image, which this model cannot see]\n[a document, which this model cannot see]"
    assert "left out: an image in a tool's result" in notes(llm)
    for block in (
        picture,
        scan,
        document(type="url", url="https://a.example/b.pdf"),
        document(type="file", file_id="f"),
    ):
        refused = http.post("/v1/messages", json=body_of(messages=[{"role": "user", "content": [block]}]))
        assert refused.status_code == 400
        assert "serves text only" in refused.json()["error"]["message"]


def test_system_messages_stay_where_they_are_until_they_are_to_go(http: httpx.Client, llm: FakeLLM) -> None:
    brief = {"role": "system", "content": [{**TEXT, "cache_control": {"type": "ephemeral"}}]}
    answer = {"role": "assistant", "content": "Hello."}
    passing = {"role": "system", "content": "Now.", "clear_at": "next_user_message"}
    found = seen(http, llm, system="Be.", messages=[ASK, brief, answer, ASK, passing])["messages"]
    assert [(one["role"], one["content"]) for one in found] == [
        ("system", "Be."),
        ("user", "Hi"),
        ("system", "So."),
        ("assistant", "Hello."),
        ("user", "Hi"),
        ("system", "Now."),
    ]
    found = seen(http, llm, messages=[ASK, passing, answer, ASK])["messages"]
    assert [one["role"] for one in found] == ["user", "assistant", "user"]
    assert seen(http, llm, messages=[{"role": "ctx", "content": "Hi"}])["messages"] == [ASK]


def test_an_effort_in_a_system_message_is_for_its_turn(http: httpx.Client, llm: FakeLLM) -> None:
    low = {"role": "system", "output_config": {"effort": "low"}}
    config = {"effort": "high", "task_budget": {"total": 5}}
    assert seen(http, llm, messages=[ASK, low], output_config=config)["effort"] == "low"
    assert "left out: output_config.task_budget" in notes(llm)
    later = [ASK, low, {"role": "assistant", "content": "Hello."}, ASK]
    assert seen(http, llm, messages=later, output_config=config)["effort"] == "high"
    low["output_config"] = {"effort": "much"}
    refused = http.post("/v1/messages", json=body_of(messages=[ASK, low]))
    assert (refused.status_code, "low, medium" in refused.text) == (400, True)


@pytest.mark.parametrize(
    ("system", "text"),
    [
        ("x-anthropic-billing-header: a=1; cch=2;\nBe kind.", "Be kind."),
        ([{"type": "text", "text": "x-anthropic-billing-header: a=1;"}, TEXT], "So."),
        ([{"type": "text", "text": "x-anthropic-billing-header: a=1;"}], None),
        ("Tell me what x-anthropic-billing-header: means.", "Tell me what x-anthropic-billing-header: means."),
    ],
)
def test_the_billing_header_reaches_no_prompt(http: httpx.Client, llm: FakeLLM, system: Any, text: str | None) -> None:
    found = seen(http, llm, system=system)["messages"]
    assert [one["content"] for one in found if one["role"] == "system"] == ([text] if text else [])
    assert ("billing-header" in notes(llm)) == (text is None or "billing" not in text)


@pytest.mark.parametrize(
    ("thinking", "thinks", "note"),
    [
        ({"type": "adaptive", "display": "updates"}, True, "thinking.display"),
        ({"type": "enabled", "budget_tokens": 2000}, True, ""),
        ({"type": "between_tools"}, True, ""),
        ({"type": "disabled"}, False, ""),
        ({"type": "someday", "depth": 3}, None, "thinking of type 'someday'"),
    ],
)
def test_every_kind_of_thinking_is_taken(
    http: httpx.Client, llm: FakeLLM, thinking: dict[str, Any], thinks: bool | None, note: str
) -> None:
    assert seen(http, llm, thinking=thinking)["thinks"] is thinks
    assert note in notes(llm)


FIELDS: dict[str, Any] = {
    "mcp_servers": [{"type": "url", "url": "https://a.example", "name": "a"}],
    "container": {"id": "c", "skills": []},
    "metadata": {"user_id": "u"},
    "service_tier": "auto",
    "speed": "fast",
    "fallbacks": [{"model": "m"}],
    "fallback_credit_token": "t",
    "inference_geo": "eu",
    "billing_policy": {"type": "billing_policy"},
    "diagnostics": {"previous_message_id": "m"},
    "anything_new": {"a": [1]},
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_that_change_nothing_here_are_left_out_and_said(http: httpx.Client, llm: FakeLLM, name: str) -> None:
    assert seen(http, llm, **{name: FIELDS[name]})["messages"] == [ASK]
    assert f"left out: {name}: " in notes(llm)


def test_what_is_so_anyway_needs_no_note(http: httpx.Client, llm: FakeLLM) -> None:
    seen(http, llm, cache_control={"type": "ephemeral"}, betas=["novelty"], container=None)
    assert not notes(llm)


@pytest.mark.parametrize("kept", ["all", {"type": "thinking_turns", "value": 2}, None])
def test_thoughts_are_kept_where_the_template_can_keep_them(serve: Serve, llm: FakeLLM, kept: Any) -> None:
    llm.chat_template = ChatTemplate(TEMPLATE)
    edit = {"type": "clear_thinking_20251015"} | ({"keep": kept} if kept else {})
    with http_client(serve()) as http:
        body = body_of(context_management={"edits": [edit, {"type": "clear_tool_uses_20250919"}]})
        llm.plan = cast(MemoryPlan, SimpleNamespace(max_model_len=20_000))
        assert http.post("/v1/messages", json=body).status_code == 200
    assert json.loads(str(llm.submitted[-1].prompt))["keeps"] is (True if kept == "all" else None)
    assert "the edit clear_tool_uses_20250919 of context_management" in notes(llm)
    assert ("the edit clear_thinking_20251015" in notes(llm)) == (kept != "all")


def test_hosted_tools_are_left_out_beside_those_that_can_be_called(http: httpx.Client, llm: FakeLLM) -> None:
    hosted = [
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 3},
        {"type": "mcp_toolset", "mcp_server_name": "a"},
        {"type": "code_execution_20260521", "name": "code_execution"},
    ]
    found = seen(http, llm, tools=[*hosted, {**TOOL, "strict": True, "cache_control": {"type": "ephemeral"}}])
    assert [tool["function"]["name"] for tool in found["tools"]] == ["weather"]
    assert found["tools"][0]["function"]["strict"] is True
    for name in ("web_search", "tools[1]", "code_execution"):
        assert f"left out: the tool {name} of type " in notes(llm)
    assert not seen(http, llm, tools=hosted, tool_choice={"type": "auto"})["tools"]
    demanded = {"tools": hosted, "tool_choice": {"type": "tool", "name": "web_search"}}
    refused = http.post("/v1/messages", json=body_of(**demanded)).json()["error"]["message"]
    assert refused == "tool_choice demands 'web_search', but this server runs no tools itself: leave it out."


def test_a_deferred_tool_is_told_where_it_is_referred_to(http: httpx.Client, llm: FakeLLM) -> None:
    use = {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "weather", "input": {}}]}
    found_one = [{"type": "tool_reference", "tool_name": name} for name in ("later", "weather", "unknown")]
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": found_one}]}
    before = seen(http, llm, tools=[TOOL], messages=[ASK, use])
    after = seen(http, llm, tools=[TOOL, HIDDEN], messages=[ASK, use, result, use, result])
    assert after["tools"] == before["tools"], "the beginning of the prompt stays"
    assert after["messages"][:2] == before["messages"]
    first, _, again = after["messages"][2:]
    line, told_as, unknown = first["content"].split("\n")
    assert line == "The tool later can be called from now on:"
    assert json.loads(told_as)["function"] == {"name": "later", "description": "L", "parameters": {"type": "object"}}
    assert unknown == "The tool unknown is not available."
    assert again["content"].split("\n")[0] == "The tool later can be called."
    assert "left out: the tool unknown (2 times): " in notes(llm)


def test_only_tools_on_offer_can_be_demanded(http: httpx.Client, llm: FakeLLM) -> None:
    choice = {"type": "tool", "name": "later"}
    add = {
        "role": "system",
        "content": [{"type": "tool_addition", "tool": {"type": "tool_reference", "name": "later"}}],
    }
    remove = {"role": "system", "content": [{**add["content"][0], "type": "tool_removal"}]}
    answer = {"role": "assistant", "content": "So."}

    def status(*messages: Any) -> int:
        body = body_of(tools=[TOOL, HIDDEN], tool_choice=choice, messages=[ASK, *messages])
        return http.post("/v1/messages/count_tokens", json=body).status_code

    assert [status(), status(add), status(add, answer, ASK, remove)] == [400, 200, 400]
    found = seen(http, llm, tools=[TOOL, HIDDEN], messages=[ASK, add, answer, ASK, remove])
    assert found["messages"][1]["content"].startswith("The tool later can be called from now on:\n{")
    assert found["messages"][-1] == {"role": "system", "content": "The tool later can no longer be called."}
    assert len(found["tools"]) == 1


def test_a_tool_that_a_message_defines_can_be_called(http: httpx.Client, llm: FakeLLM) -> None:
    new = {"name": "novel", "input_schema": {"type": "object"}}
    add = {"type": "tool_addition", "tool": {"type": "tool_definition", "definition": new}}
    mcp = {"type": "tool_addition", "tool": {"type": "mcp_toolset_reference", "server_name": "a"}}
    messages = [ASK, {"role": "system", "content": [add, mcp]}]
    found = seen(http, llm, tools=[TOOL], messages=messages, tool_choice={"type": "tool", "name": "novel"})
    assert '"name": "novel"' in found["messages"][1]["content"]
    assert "left out: a tool_addition of type mcp_toolset_reference" in notes(llm)


def test_deferred_tools_are_shown_where_anthropics_servers_would_search_them(http: httpx.Client, llm: FakeLLM) -> None:
    search = {"type": "tool_search_tool_regex_20251119", "name": "tool_search_tool_regex"}
    found = seen(http, llm, tools=[TOOL, HIDDEN, search])
    assert [tool["function"]["name"] for tool in found["tools"]] == ["weather", "later"]
