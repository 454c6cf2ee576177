"""What Claude Code 2.1.332 sends while it mends a file, replayed before the real engine and a scripted model.

``claude_code.json`` is what it sent to this port: its fields, blocks and tool names; the texts and most of the schemas
are our own. ``@LENGTH WORDS`` stands for a text as long as that which was sent.
"""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine import LLM
from engine.explain.request_log import RequestLog
from engine.openai.server import ServerHandle
from tests import scripted_model
from tests.engine.openai import strict_more
from tests.engine.openai.conftest import KEY, http_client
from tests.engine.openai.recorded import called, expanded
from tests.engine.openai.routes.test_messages import blocks_of
from tests.engine.text.template.template_packages import TRL, template_source

FILE = "/home/user/greeter/greet.py"
SELECTORS = ("[step-0]", "[step-1]", "[step-2]", "[step-3]")


OLD, NEW = '"Helo, " + name  # [step-1]', '"Hello, " + name  # [step-2]'
RUN = called("Bash", command="python3 greet.py && echo '[step-3]'", description="Run the program")
SCRIPTS = (
    "<think>\nI read it first.\n</think>\n\nI read the file.\n\n" + called("Read", file_path=FILE),
    "<think>\nHelo is wrong.\n</think>\n\n" + called("Edit", file_path=FILE, old_string=OLD, new_string=NEW),
    "<think>\nNow I run it.\n</think>\n\nI run it.\n\n" + RUN,
    "<think>\nDone.\n</think>\n\nThe greeting is mended: it says Hello, world.",
)


RECORDED: dict[str, Any] = expanded(json.loads(Path(__file__).with_name("claude_code.json").read_text()))
TURNS: list[list[Any]] = RECORDED["turns"]


@pytest.fixture(scope="module")
def llm(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    scripted_model.install()
    template = template_source(TRL, "qwen3_6")  # it takes a system message at the beginning only
    folder = scripted_model.write_scripted_model(
        tmp_path_factory.mktemp("scripted"),
        smollm2_gguf,
        SCRIPTS,
        chat_template=template,
        context_length=65536,
        selectors=SELECTORS,
    )
    with LLM(str(folder), max_model_len=65536, gpu_memory_utilization=0.3, served_model_name="local-coder") as made:
        yield made


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[ServerHandle]:
    handle = llm.serve(api_key=KEY)
    yield handle
    handle.stop()


@pytest.fixture(autouse=True)
def forgetful(llm: LLM) -> None:
    llm.reset_prefix_cache()
    llm.request_log = RequestLog()


@pytest.fixture
def http(server: ServerHandle) -> Iterator[httpx.Client]:
    with http_client(server) as client:
        client.headers.update(RECORDED["headers"])
        yield client


def body_of(messages: list[Any], **changes: Any) -> dict[str, Any]:
    return copy.deepcopy({**RECORDED["base"], "messages": messages, **changes})


def ask(http: httpx.Client, body: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The blocks of the answer, and its usage."""
    response = http.post(RECORDED["path"], json=body)
    assert response.status_code == 200, response.text
    events = strict_more.message_events(response.text)
    return blocks_of(events), events[-2]["usage"]


def prompt_tokens(usage: dict[str, Any]) -> int:
    return int(usage["input_tokens"] + usage["cache_read_input_tokens"])


def hit(usage: dict[str, Any]) -> float:
    return float(usage["cache_read_input_tokens"]) / prompt_tokens(usage)


def bare(blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Blocks without ids and without what the program adds to a call by itself."""
    found = []
    for block in blocks:
        kept = {name: value for name, value in block.items() if name != "id"}
        if block["type"] == "tool_use":
            kept["input"] = {name: value for name, value in block["input"].items() if name != "replace_all"}
        found.append(kept)
    return found


def test_a_whole_task_goes_through_and_each_turn_finds_the_one_before_in_the_cache(http: httpx.Client) -> None:
    hits = []
    for turn, messages in enumerate(TURNS):
        blocks, usage = ask(http, body_of(messages))
        hits.append(hit(usage))
        assert prompt_tokens(usage) > 5000
        if turn + 1 < len(TURNS):
            assert bare(blocks) == bare(TURNS[turn + 1][len(messages)]["content"])
        else:
            assert [block.get("text") for block in blocks[1:]] == ["The greeting is mended: it says Hello, world."]
    assert hits[0] == 0
    assert min(hits[1:]) >= 0.95, hits


def test_the_next_question_finds_the_thoughts_of_the_last_turn_in_the_cache(http: httpx.Client) -> None:
    blocks, _ = ask(http, body_of(TURNS[-1]))
    following = [
        *TURNS[-1],
        {"role": "assistant", "content": blocks},
        {"role": "user", "content": "Thank you. [step-3]"},
    ]
    _, usage = ask(http, body_of(following))
    assert hit(usage) >= 0.95
    ask(http, body_of(TURNS[-1], context_management=None))
    _, usage = ask(http, body_of(following, context_management=None))
    assert hit(usage) < 0.99, "without clear_thinking's keep the template drops the thoughts"


@pytest.mark.parametrize("as_text", [False, True])
def test_a_changed_billing_header_leaves_the_prefix_as_it_was(http: httpx.Client, llm: LLM, as_text: bool) -> None:
    usages = []
    for number in (1, 2):
        body = body_of(TURNS[0])
        body["system"][0]["text"] = f"x-anthropic-billing-header: cc_version=2.1.{number}; cch={number}f3a1;"
        if as_text:
            body["system"] = "\n".join(block["text"] for block in body["system"])
        usages.append(ask(http, body)[1])
        assert "billing" not in llm.explain().prompt
    assert hit(usages[1]) >= 0.95
    assert any("x-anthropic-billing-header" in note for note in llm.explain().notes)


def test_explain_says_what_was_left_out_and_what_the_template_was_given(http: httpx.Client, llm: LLM) -> None:
    ask(http, body_of(TURNS[0]))
    told = llm.explain()
    left_out = [note.removeprefix("left out: ").partition(":")[0] for note in told.notes]
    folded = "a system message stood where this model's template refuses it"
    assert left_out == ["the line x-anthropic-billing-header of `system`", "metadata", "thinking.display", folded]
    given = {value.name: value.value for value in told.thinking}
    assert given == {"preserve_thinking": True, "enable_thinking": True, "reasoning_effort": "high"}
    assert "DeferredToolPlaceholder" not in told.prompt
    body = body_of(TURNS[0], mcp_servers=[{"type": "url", "url": "https://tools.example"}], speed="fast", novelty=1)
    body["tools"].append({"type": "web_search_20250305", "name": "web_search"})
    body["context_management"]["edits"].append({"type": "clear_tool_uses_20250919"})
    _, usage = ask(http, body)
    assert hit(usage) >= 0.95, "what is left out changes no prompt"
    more = {note.removeprefix("left out: ").partition(":")[0] for note in llm.explain().notes} - set(left_out)
    assert more == {
        "the tool web_search of type web_search_20250305",
        "the edit clear_tool_uses_20250919 of context_management",
        *("mcp_servers", "speed", "novelty"),
    }


def test_a_tool_that_a_search_found_is_told_where_it_was_found(http: httpx.Client, llm: LLM) -> None:
    ask(http, body_of(TURNS[0]))
    search = RECORDED["search"]
    known = {tool["name"]: tool for tool in [*RECORDED["base"]["tools"], *search["found"]]}
    body = body_of(search["messages"], tools=[known[name] for name in search["tools"]])
    _, usage = ask(http, body)
    assert usage["cache_read_input_tokens"] > 5000, "the tools at the beginning are those of the request before"
    prompt = llm.explain().prompt
    for tool in search["found"]:
        assert prompt.count(f'"name": "{tool["name"]}"') == 1
        told = prompt[prompt.index("<tool_response>") : prompt.rindex("</tool_response>")]
        assert f"The tool {tool['name']} can be called from now on:" in told
    body["tool_choice"] = {"type": "tool", "name": "CronList"}
    blocks, _ = ask(http, body)
    assert [block["name"] for block in blocks if block["type"] == "tool_use"] == ["CronList"]


def test_tokens_are_counted_as_the_prompt_has_them(http: httpx.Client) -> None:
    for messages in TURNS:
        count = http.post("/v1/messages/count_tokens?beta=true", json=body_of(messages)).json()["input_tokens"]
        assert count == prompt_tokens(ask(http, body_of(messages))[1])
    counted = http.post("/v1/messages/count_tokens?beta=true", json=RECORDED["count"])
    assert counted.status_code == 200, counted.text


def test_a_small_request_of_its_own_is_answered_in_its_format(http: httpx.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"title": {"type": "string", "maxLength": 20}},
        "required": ["title"],
        "additionalProperties": False,
    }
    body = body_of(
        [{"role": "user", "content": [{"type": "text", "text": "Name this chat. [step-3]"}]}],
        tools=[],
        thinking={"type": "disabled"},
        temperature=1,
        output_config={"format": {"type": "json_schema", "schema": schema}},
        context_management=None,
    )
    blocks, _ = ask(http, body)
    assert [block["type"] for block in blocks] == ["text"]
    assert set(json.loads(blocks[0]["text"])) == {"title"}


def test_a_context_that_is_too_short_is_told_in_the_words_that_it_reads(http: httpx.Client) -> None:
    count = http.post("/v1/messages/count_tokens", json=body_of(TURNS[0])).json()["input_tokens"]
    told = http.post(RECORDED["path"], json=body_of(TURNS[0], max_tokens=65000)).json()["error"]
    assert told["type"] == "invalid_request_error"
    found = re.match(r"input length and `max_tokens` exceed context limit: (\d+) \+ (\d+) > (\d+)", told["message"])
    assert found is not None, told
    assert [int(number) for number in found.groups()] == [count, 65000, 65536]
    long = [*TURNS[0][:1], {"role": "user", "content": "word " * 70000}]
    told = http.post(RECORDED["path"], json=body_of(long)).json()["error"]
    assert re.fullmatch(r"prompt is too long: \d+ tokens > 65536 maximum", told["message"]), told
