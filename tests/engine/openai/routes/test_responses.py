"""``/v1/responses``: items, events in the order that clients rely on, the store."""

import time
from types import SimpleNamespace
from typing import Any, cast

import httpx
import openai
import pytest

from engine.errors import UnknownResponseError
from engine.openai.routes.responses_calls import CallItems
from engine.openai.routes.responses_output import ResponseBuilder
from engine.openai.routes.responses_store import ResponseStore, RunningResponse
from engine.openai.schema.responses_tools import Toolbox
from engine.openai.server import ServerHandle
from engine.openai.serving.generation import Job
from tests.engine.openai import strict, strict_more
from tests.engine.openai.conftest import Serve, http_client
from tests.engine.openai.fakes import FakeLLM

NO_JOB = cast(Job, SimpleNamespace(release=lambda: None))
"""What ran a response that is over, and is let go."""
REPLY = "Hello, wörld!"
THOUGHT = "<think>\nSo be it.\n</think>\n\nHello!"
CALLS = (
    'I look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bad \\"Oeynhausen\\" {}"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'
)
TOOL = {
    "type": "function", "name": "weather", "description": "…", "strict": False,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}  # fmt: skip


@pytest.fixture
def thinking(llm: FakeLLM) -> FakeLLM:
    llm.reasoning_parser, llm.reply = "qwen3", THOUGHT
    return llm


@pytest.fixture
def calling(llm: FakeLLM) -> FakeLLM:
    llm.tool_call_parser, llm.reply = "hermes", CALLS
    return llm


def post(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/v1/responses", json={"input": "Hi", **body})
    assert response.status_code == 200, response.text
    return strict_more.response(response.json())


def stream(http: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    response = http.post("/v1/responses", json={"input": "Hi", "stream": True, **body})
    assert response.headers["content-type"].startswith("text/event-stream")
    return strict_more.response_events(response.text)


def prompt_of(llm: FakeLLM, position: int = -1) -> str:
    return llm.tokenizer.decode(llm.submitted[position].prompt_token_ids, skip_special_tokens=False)


def without_ids(value: Any) -> Any:
    """``value`` without what differs from request to request."""
    if isinstance(value, dict):
        varying = ("id", "call_id", "created_at", "completed_at", "item_id")
        return {key: without_ids(item) for key, item in value.items() if key not in varying}
    return [without_ids(item) for item in value] if isinstance(value, list) else value


def test_an_input_is_answered(http: httpx.Client) -> None:
    reply = post(http, instructions="Be kind.")
    assert reply["status"] == "completed"
    assert reply["output"][0]["content"][0]["text"] == REPLY
    usage = reply["usage"]
    assert usage["output_tokens"] == len(REPLY.encode())
    assert usage["input_tokens"] + usage["output_tokens"] == usage["total_tokens"]
    assert usage["input_tokens_details"]["cached_tokens"] == usage["output_tokens_details"]["reasoning_tokens"] == 0


def test_the_events_of_a_text_come_in_order_with_their_done_twins(http: httpx.Client) -> None:
    events = stream(http)
    names = [event["type"].removeprefix("response.") for event in events]
    deltas = names.count("output_text.delta")
    assert names == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * deltas,
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta") == REPLY
    assert events[-4]["text"] == REPLY
    assert without_ids(events[-1]["response"]) == without_ids(post(http))


def test_a_thought_is_an_item_of_its_own(http: httpx.Client, thinking: FakeLLM) -> None:
    reply = post(http)
    thought, answer = reply["output"]
    assert (thought["type"], thought["content"]) == ("reasoning", [{"type": "reasoning_text", "text": "So be it."}])
    assert answer["content"][0]["text"] == "Hello!"
    assert 0 < reply["usage"]["output_tokens_details"]["reasoning_tokens"] < reply["usage"]["output_tokens"]
    events = stream(http)
    names = [event["type"].removeprefix("response.") for event in events]
    begin = ["output_item.added", "content_part.added"]
    assert names[2:4] == begin
    closing = names.index("reasoning_text.done")
    assert names[closing : closing + 5] == ["reasoning_text.done", "content_part.done", "output_item.done", *begin]
    assert without_ids(events[-1]["response"]) == without_ids(reply)


def test_the_thought_can_be_left_out(http: httpx.Client, thinking: FakeLLM) -> None:
    assert [item["type"] for item in post(http, include_reasoning=False)["output"]] == ["message"]


def test_calls_are_items_whose_arguments_are_streamed_and_done(http: httpx.Client, calling: FakeLLM) -> None:
    reply = post(http, tools=[TOOL])
    text, first, second = reply["output"]
    assert text["content"][0]["text"].strip() == "I look."
    assert (first["name"], first["arguments"]) == ("weather", '{"city": "Bad \\"Oeynhausen\\" {}"}')
    assert second["arguments"] == '{"city": "Köln"}'
    events = stream(http, tools=[TOOL])
    assert without_ids(events[-1]["response"]) == without_ids(reply)
    for index, item in ((1, first), (2, second)):
        mine = [event for event in events if event.get("output_index") == index]
        names = [event["type"].removeprefix("response.") for event in mine]
        assert names[0] == "output_item.added"
        assert names[-2:] == ["function_call_arguments.done", "output_item.done"]
        assert set(names[1:-2]) == {"function_call_arguments.delta"}
        assert "".join(event["delta"] for event in mine[1:-2]) == item["arguments"] == mine[-2]["arguments"]


def test_one_call_at_most_without_parallel_tool_calls(http: httpx.Client, calling: FakeLLM) -> None:
    output = post(http, tools=[TOOL], parallel_tool_calls=False)["output"]
    assert [item["type"] for item in output] == ["message", "function_call"]


def test_an_answer_that_is_cut_off_is_incomplete(http: httpx.Client) -> None:
    reply = post(http, max_output_tokens=4)
    assert (reply["status"], reply["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert reply["output"][0]["status"] == "incomplete"
    assert stream(http, max_output_tokens=4)[-1]["type"] == "response.incomplete"


def test_a_conversation_goes_on_from_a_stored_response(http: httpx.Client, calling: FakeLLM) -> None:
    first = post(http, input="Weather?", instructions="Be kind.", tools=[TOOL])
    outputs = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "rain"}
        for item in first["output"]
        if item["type"] == "function_call"
    ]
    calling.reply = "It rains."
    second = post(http, input=outputs, previous_response_id=first["id"], tools=[TOOL])
    prompt = prompt_of(calling)
    assert "Be kind." not in prompt
    order = ["user:Weather?", "assistant:I look.", "tool:rain", "tool:rain"]
    places = [prompt.index(part) for part in order[:3]]
    assert places == sorted(places)
    assert prompt.count("tool:rain") == 2
    post(http, input="And now?", previous_response_id=second["id"])
    assert "It rains.<|start|>user:And now?" in prompt_of(calling)


def test_items_sent_back_make_the_same_prompt_as_the_stored_ones(http: httpx.Client, thinking: FakeLLM) -> None:
    first = post(http, input="Hi")
    post(http, input="Go on", previous_response_id=first["id"])
    post(http, input=[{"role": "user", "content": "Hi"}, *first["output"], {"role": "user", "content": "Go on"}])
    assert prompt_of(thinking, -1) == prompt_of(thinking, -2)


def test_all_leading_system_texts_become_one_message(http: httpx.Client, llm: FakeLLM) -> None:
    parts = [{"type": "input_text", "text": "One."}, {"type": "input_text", "text": "Two."}]
    post(http, instructions="Zero.", input=[
        {"type": "message", "role": "developer", "content": parts}, {"role": "user", "content": "Hi"},
    ])  # fmt: skip
    assert prompt_of(llm).startswith("<|start|>system:Zero.\n\nOne.\nTwo.<|start|>user:Hi")


def test_template_variables_reach_the_template_as_in_chats(http: httpx.Client, llm: FakeLLM) -> None:
    post(http, chat_template_kwargs={"extra": "!!"})
    through_responses = prompt_of(llm)
    http.post(
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "Hi"}], "chat_template_kwargs": {"extra": "!!"}},
    )
    assert prompt_of(llm) == through_responses
    assert through_responses.endswith("!!")


def test_sampling_fields_reach_the_engine(http: httpx.Client, llm: FakeLLM) -> None:
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "seed": 3, "repetition_penalty": 1.1, "ignore_eos": True}
    reply = post(http, **given, stop="w", max_output_tokens=9)
    params = llm.submitted[-1].params
    for name, value in given.items():
        assert getattr(params, name) == value
    assert (params.stop, params.max_tokens) == (("w",), 9)
    assert (reply["temperature"], reply["top_p"]) == (0.5, 0.9)
    assert reply["output"][0]["content"][0]["text"] == "Hello, "


def test_logprobs_are_told_for_the_answers_tokens(http: httpx.Client, thinking: FakeLLM) -> None:
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    output = post(http, **asked)["output"]
    logprobs = output[-1]["content"][0]["logprobs"]
    assert "".join(entry["token"] for entry in logprobs).strip().endswith("Hello!")
    assert "So be it" not in "".join(entry["token"] for entry in logprobs)
    assert all(len(entry["top_logprobs"]) == 2 for entry in logprobs)
    streamed = [e for event in stream(http, **asked) for e in event.get("logprobs", ()) if "delta" in event]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in logprobs]


def test_stored_responses_are_retrieved_and_deleted_and_others_are_not_kept(http: httpx.Client) -> None:
    kept, streamed, gone = post(http), stream(http)[-1]["response"], post(http, store=False)
    for reply in (kept, streamed):
        assert http.get(f"/v1/responses/{reply['id']}").json() == reply
    missing = http.get(f"/v1/responses/{gone['id']}")
    assert gone["id"] in strict.error(missing, 404, "NotFoundError", "response_id")
    assert http.delete(f"/v1/responses/{kept['id']}").json()["deleted"] is True
    assert http.get(f"/v1/responses/{kept['id']}").status_code == 404
    refused = http.post("/v1/responses", json={"input": "x", "previous_response_id": kept["id"]})
    assert strict.error(refused, 404, "NotFoundError", "previous_response_id")


def test_a_background_response_is_polled_and_its_events_can_be_followed(http: httpx.Client, llm: FakeLLM) -> None:
    llm.token_seconds = 0.02
    queued = post(http, background=True)
    assert (queued["status"], queued["output"]) == ("queued", [])
    early = http.post("/v1/responses", json={"input": "x", "previous_response_id": queued["id"]})
    assert "in progress" in strict.error(early, 400, "BadRequestError", "previous_response_id")
    text = http.get(f"/v1/responses/{queued['id']}", params={"stream": True}).text
    events = strict_more.response_events(text)
    assert [event["type"] for event in events[:3]] == ["response.created", "response.queued", "response.in_progress"]
    final = http.get(f"/v1/responses/{queued['id']}").json()
    assert final == events[-1]["response"]
    assert final["status"] == "completed"
    later = http.get(f"/v1/responses/{queued['id']}", params={"stream": True, "starting_after": 4}).text
    assert strict_more.named_events(later) == events[5:]


def test_a_background_response_survives_its_client_and_can_be_cancelled(http: httpx.Client, llm: FakeLLM) -> None:
    llm.token_seconds = 0.1
    with http.stream("POST", "/v1/responses", json={"input": "x", "background": True, "stream": True}) as response:
        first = next(response.iter_lines())
    assert first == "event: response.created"
    time.sleep(0.3)
    assert not llm.aborted.is_set()
    queued = post(http, background=True)
    cancelled = http.post(f"/v1/responses/{queued['id']}/cancel").json()
    assert cancelled["status"] == "cancelled"
    assert llm.aborted.wait(30)
    assert http.post(f"/v1/responses/{queued['id']}/cancel").json() == cancelled
    assert http.get("/load").json() == {"server_load": 1}


def test_only_background_responses_can_be_cancelled_or_followed(http: httpx.Client) -> None:
    reply = post(http)
    refused = http.post(f"/v1/responses/{reply['id']}/cancel")
    assert strict.error(refused, 400, "BadRequestError", "response_id") == "Cannot cancel a synchronous response."
    assert http.get(f"/v1/responses/{reply['id']}", params={"stream": True}).status_code == 400
    assert http.post("/v1/responses/resp_x/cancel").status_code == 404


def test_a_failure_midway_is_an_event_and_keeps_what_was_written(http: httpx.Client, llm: FakeLLM) -> None:
    llm.fail_after = 4
    events = stream(http)
    names = [event["type"] for event in events]
    assert names[-4:] == [
        *("response.output_text.done", "response.content_part.done", "response.output_item.done", "response.failed"),
    ]
    failed = events[-1]["response"]
    assert (failed["status"], failed["error"]["code"]) == ("failed", "server_error")
    assert "out of luck" in failed["error"]["message"]
    assert failed["output"][0]["content"][0]["text"] == "Hell"
    assert http.get(f"/v1/responses/{failed['id']}").json() == failed
    response = http.post("/v1/responses", json={"input": "Hi"})
    assert strict.error(response, 500, "InternalServerError")
    queued = post(http, background=True)
    http.get(f"/v1/responses/{queued['id']}", params={"stream": True})
    assert http.get(f"/v1/responses/{queued['id']}").json()["status"] == "failed"


def test_a_client_that_leaves_frees_its_request(http: httpx.Client, llm: FakeLLM) -> None:
    llm.token_seconds = 0.1
    with http.stream("POST", "/v1/responses", json={"input": "x", "stream": True}) as response:
        next(response.iter_lines())
    assert llm.aborted.wait(30)


def test_a_stopping_server_fails_what_runs(serve: Serve, llm: FakeLLM) -> None:
    llm.token_seconds = 0.1
    server = serve()
    with (
        http_client(server) as http,
        http.stream("POST", "/v1/responses", json={"input": "x", "stream": True}) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        server.stop()
        assert [line for line in lines if line.startswith("event:")][-1] == "event: response.failed"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"background": True, "store": False}, "background"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"previous_input_messages": [{"role": "user", "content": "x"}]}, "previous_input_messages"),
        ({"enable_response_messages": True}, "enable_response_messages"),
        ({"include": ["everything"]}, "include"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "funktion", "name": "f"}]}, "tools"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"type": "computer_calls"}]}, "input"),
        ({"input": [{"type": "function_call", "call_id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "messages"),
        ({"input": 3}, "input"),
        ({"tools": [TOOL], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"temperature": -1}, "temperature"),
        ({"chat_template": "x"}, "chat_template"),
        ({"vllm_xargs": {"a": 1}}, "vllm_xargs"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(http: httpx.Client, body: dict[str, Any], param: str) -> None:
    response = http.post("/v1/responses", json={"input": "Hi", **body})
    assert strict.error(response, 400, "BadRequestError", param)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"tools": [{"type": "allowed_tools"}]}, "send only the tools"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}},
            "send only the tools",
        ),
        ({"tools": [{"type": "function", "name": "a b"}], "tool_choice": "required"}, "'a b'"),
    ],
)
def test_a_tool_that_is_no_function_is_refused_with_what_to_do_instead(
    http: httpx.Client, body: dict[str, Any], words: str
) -> None:
    response = http.post("/v1/responses", json={"input": "Hi", **body})
    param = "tool_choice" if "allowed_tools" in str(body.get("tool_choice")) else "tools"
    assert words in strict.error(response, 400, "BadRequestError", param)


def test_the_openai_clients_helper_reads_the_stream(client: openai.OpenAI, calling: FakeLLM) -> None:
    with client.responses.stream(model="fake", input="Hi", tools=[TOOL]) as events:  # type: ignore[list-item]
        kinds = {event.type for event in events}
        final = events.get_final_response()
    assert "response.function_call_arguments.done" in kinds
    assert [item.type for item in final.output] == ["message", "function_call", "function_call"]
    assert final.output[2].arguments == '{"city": "Köln"}'  # type: ignore[union-attr]
    again = client.responses.retrieve(final.id)
    assert again.output_text.strip() == "I look."


def test_a_request_as_codex_sends_it_is_answered_without_being_kept(http: httpx.Client, llm: FakeLLM) -> None:
    llm.reasoning_parser, llm.tool_call_parser = "qwen3", "hermes"
    llm.reply = "<think>\nHm.\n</think>\n\n" + CALLS
    shell = {"type": "function", "name": "shell", "strict": False, "parameters": {"type": "object", "properties": {}}}
    body = {
        "model": "fake", "instructions": "You are an agent.", "tools": [TOOL, shell], "tool_choice": "auto",
        "parallel_tool_calls": False, "reasoning": {"effort": "medium", "summary": "auto"}, "store": False,
        "include": ["reasoning.encrypted_content"], "prompt_cache_key": "019", "service_tier": None,
        "text": {"verbosity": "low"},
    }  # fmt: skip
    asked = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}
    events = stream(http, **body, input=[{**asked, "role": "developer"}, asked])
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert [item["type"] for item in done] == ["reasoning", "message", "function_call"]
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"]["output"] == done
    output = {"type": "function_call_output", "call_id": done[-1]["call_id"], "output": "rain"}
    again = stream(http, **body, input=[asked, *done, output])
    assert again[-1]["type"] == "response.completed"
    assert prompt_of(llm).startswith("<|start|>system:You are an agent.<|start|>user:Hi<|start|>assistant:I look.")
    assert http.get(f"/v1/responses/{events[-1]['response']['id']}").status_code == 404


def test_a_stored_response_lets_go_of_what_ran_it(server: ServerHandle, http: httpx.Client) -> None:
    ids = [post(http)["id"], stream(http)[-1]["response"]["id"], post(http, background=True)["id"]]
    store = server._server.config.app.state.responses  # type: ignore[union-attr]
    for response_id in ids:
        kept = store.get(response_id)
        while not kept.builder.over:
            http.get(f"/v1/responses/{response_id}")
        assert http.get(f"/v1/responses/{response_id}").json()["status"] == "completed"
        assert (kept.job.streams, kept.job.prompts, kept.job.choices) == ((), (), [])


def test_the_store_is_bounded_in_number_and_bytes_and_forgets_the_oldest(http: httpx.Client, llm: FakeLLM) -> None:
    store = ResponseStore(max_responses=3, max_bytes=5000)
    calls = CallItems(Toolbox())
    replies = [ResponseBuilder(post(http, store=False), calls) for _ in range(5)]
    kept = [RunningResponse(reply, NO_JOB, []) for reply in replies]
    for response in kept:
        store.add(response)
        store.settle(response)
    assert len(store) == 3
    with pytest.raises(UnknownResponseError):
        store.get(kept[1].id)
    assert store.get(kept[2].id) is kept[2]
    kept[4].events.append({"type": "x" * 3000})
    store.settle(kept[4])
    assert len(store) == 1
    assert store.get(kept[4].id) is kept[4]
