"""What Codex 0.171.0 sends in three tasks, replayed before the real engine and a scripted model.

``codex.json`` is what it sent to this port under three names of the model: as an unknown one it offers functions, some
in a namespace; as ``gpt-5.5`` also a custom tool and a tool search; as ``gpt-6-sol`` all its tools in an input item.
Fields, items, tool names and schemas are its own, the texts are ours; ``@LENGTH WORDS`` stands for a text as long as
that which was sent.
"""

import copy
import json
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
from tests.engine.text.template.template_packages import TRL, template_source

SELECTORS = tuple(f"[step-{number}]" for number in range(8))
PATCH = '*** Begin Patch\n*** Add File: second.py\n+print("Hello, \\"wörld\\" 😀")\n*** End Patch'
PROGRAM = 'const one = await tools.exec_command({cmd: "cat step-3.txt"});\ntext(one.output);'


def shell(command: str) -> str:
    return called("exec_command", cmd=command)


CLOSE = called("close_agent", target="nobody") + "\n" + shell("cat step-3.txt")
SCRIPTS = (
    "<think>\nI read it first.\n</think>\n\nI read the file.\n\n" + shell("cat greet.py step-1.txt"),
    "<think>\nHelo is wrong.\n</think>\n\n"
    + shell("sed -i 's/Helo/Hello/' greet.py && python3 greet.py && cat step-2.txt"),
    "<think>\nNobody else works here.\n</think>\n\n" + CLOSE,
    "<think>\nDone.\n</think>\n\nThe greeting is mended: it says Hello.",
    "<think>\nA second program.\n</think>\n\nI add it.\n\n"
    + called("apply_patch", input=PATCH)
    + "\n"
    + shell("python3 second.py && cat step-5.txt"),
    "<think>\nAre there agents?\n</think>\n\n"
    + called("tool_search", query="close agents", limit="2")
    + "\n"
    + shell("cat step-6.txt"),
    "<think>\nI close one.\n</think>\n\n" + CLOSE,
    "<think>\nIn one go.\n</think>\n\n" + called("exec", input=PROGRAM),
)
RECORDED: dict[str, Any] = expanded(json.loads(Path(__file__).with_name("codex.json").read_text()))
RUNS: dict[str, Any] = RECORDED["runs"]
MINE = ("reasoning", "message", "function_call", "custom_tool_call", "tool_search_call")


@pytest.fixture(scope="module")
def llm(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    scripted_model.install()
    folder = scripted_model.write_scripted_model(
        tmp_path_factory.mktemp("scripted"),
        smollm2_gguf,
        SCRIPTS,
        chat_template=template_source(TRL, "qwen3_6"),
        context_length=65536,
        selectors=SELECTORS,
    )
    names = tuple(run["base"]["model"] for run in RUNS.values())
    with LLM(str(folder), max_model_len=65536, gpu_memory_utilization=0.3, served_model_name=names) as made:
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


def body_of(run: str, num_items: int, **changes: Any) -> dict[str, Any]:
    found = RUNS[run]
    return copy.deepcopy({**found["base"], "input": found["input"][:num_items], **changes})


def ask(http: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    """The response at the end of the stream, whose events and items are OpenAI's."""
    response = http.post(RECORDED["path"], json=body)
    assert response.status_code == 200, response.text
    events = strict_more.response_events(response.text)
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"]["output"] == done
    return strict_more.response(events[-1]["response"])


def hit(response: dict[str, Any]) -> float:
    usage = response["usage"]
    return float(usage["input_tokens_details"]["cached_tokens"] / usage["input_tokens"])


def bare(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in item.items() if name not in ("id", "call_id", "status")} for item in items]


def written(run: str, start: int) -> list[dict[str, Any]]:
    """The model's items that Codex sent back from ``start`` on, up to the next that are its own."""
    items = RUNS[run]["input"][start:]
    end = next((place for place, item in enumerate(items) if item["type"] not in MINE), len(items))
    return bare([item for item in items[:end] if item.get("role") != "user"])


@pytest.mark.parametrize("run", RUNS)
def test_a_whole_task_goes_through_and_each_turn_finds_the_one_before_in_the_cache(
    http: httpx.Client, run: str
) -> None:
    hits = []
    for num_items in RUNS[run]["lengths"]:
        response = ask(http, body_of(run, num_items))
        hits.append(hit(response))
        assert response["usage"]["input_tokens"] > 5000
        if num_items < len(RUNS[run]["input"]):
            assert bare(response["output"]) == written(run, num_items)
        else:
            answer = response["output"][-1]["content"][0]["text"]
            assert answer == "The greeting is mended: it says Hello."
    assert hits[0] == 0
    assert min(hits[1:]) >= 0.95, hits


@pytest.mark.parametrize("run", RUNS)
def test_a_plain_response_is_that_at_the_end_of_the_stream(http: httpx.Client, run: str) -> None:
    num_items = RUNS[run]["lengths"][0]
    plain = http.post(RECORDED["path"], json=body_of(run, num_items, stream=False)).json()
    assert bare(strict_more.response(plain)["output"]) == bare(ask(http, body_of(run, num_items))["output"])


def test_thoughts_are_read_from_what_was_sealed_alone(http: httpx.Client, llm: LLM) -> None:
    body = body_of("functions", 16)
    ask(http, body)
    prompt = llm.explain().prompt
    assert "<think>\nHelo is wrong.\n</think>" in prompt
    for item in body["input"]:
        item.pop("content") if item["type"] == "reasoning" else None
    ask(http, body)
    assert llm.explain().prompt == prompt


def test_what_was_left_out_is_said_in_explain(http: httpx.Client, llm: LLM) -> None:
    notes = {}
    for run in RUNS:
        ask(http, body_of(run, RUNS[run]["lengths"][0]))
        notes[run] = [note.removeprefix("left out: ").partition(":")[0] for note in llm.explain().notes]
    assert notes == {
        "functions": ["the tool web_search"],
        "custom": ["the tool web_search", "text.verbosity", "the grammar of the tool apply_patch"],
        "additional": ["text.verbosity", "the grammar of the tool exec"],
    }


def test_a_custom_tool_that_is_demanded_is_called_with_text_of_its_grammar(http: httpx.Client) -> None:
    demanded = {"tool_choice": {"type": "custom", "name": "apply_patch"}, "max_output_tokens": 100, "stream": False}
    for kind, definition in (("lark", 'start: "*** " /[a-z]{3}/ " Patch\\n+\\"1\\"\\n"'), ("regex", r"[0-9]{3}\\n")):
        body = body_of("custom", 4, **demanded)
        tool = next(tool for tool in body["tools"] if tool["type"] == "custom")
        tool["format"] |= {"syntax": kind, "definition": definition}
        response = strict_more.response(http.post(RECORDED["path"], json=body).json())
        thought, call = response["output"]
        assert (thought["type"], call["type"], call["name"]) == ("reasoning", "custom_tool_call", "apply_patch")
        text = call["input"]
        assert text.startswith("*** ") and text.endswith('Patch\n+"1"\n') if kind == "lark" else text[:3].isdigit()
