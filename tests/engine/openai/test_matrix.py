"""Every request field that vLLM documents for chats: it changes something that can be seen, or is refused by name."""

import re
from typing import Any

import httpx
import pytest

from tests.engine.openai import strict
from tests.engine.openai.conftest import Serve, http_client
from tests.engine.openai.fakes import TEMPLATE, FakeLLM
from tests.engine.openai.test_replies import REPETITION, TOOLS

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]
BEGUN = [*MESSAGES, {"role": "assistant", "content": "Well, "}]
SHOWING = TEMPLATE + "{{ documents }}{{ reasoning_effort }}{{ enable_thinking }}"
CONTINUED = {"messages": BEGUN, "add_generation_prompt": False, "continue_final_message": True}

HONOURED: dict[str, tuple[Any, dict[str, Any]]] = {
    **{name: (value, {}) for name, value in {
        "temperature": 0.5, "top_p": 0.5, "top_k": 5, "min_p": 0.1, "n": 2, "seed": 3, "presence_penalty": 0.5,
        "frequency_penalty": 0.5, "repetition_penalty": 1.1, "logit_bias": {"5": 1}, "stop": "ö",
        "stop_token_ids": [9], "ignore_eos": True, "min_tokens": 1, "max_tokens": 3, "max_completion_tokens": 3,
        "skip_special_tokens": False, "spaces_between_special_tokens": False, "truncate_prompt_tokens": 5,
        "logprobs": True, "prompt_logprobs": 1, "allowed_token_ids": [1], "bad_words": ["x"],
        "add_generation_prompt": False, "add_special_tokens": True, "documents": [{"title": "T"}],
        "chat_template": "{{ messages[0].content }}", "chat_template_kwargs": {"extra": "!"}, "tools": TOOLS,
        "structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}, "priority": 1,
        "request_id": "mine", "return_token_ids": True, "return_prompt_text": True, "cache_salt": "s",
        "repetition_detection": REPETITION, "include_reasoning": False, "thinking_token_budget": 3,
        "reasoning_effort": "low", "stream": True,
    }.items()},
    "top_logprobs": (2, {"logprobs": True}),
    "return_tokens_as_token_ids": (True, {"logprobs": True}),
    "include_stop_str_in_output": (True, {"stop": "ö"}),
    "truncation_side": ("right", {"truncate_prompt_tokens": 5}),
    "continue_final_message": (True, {"messages": BEGUN, "add_generation_prompt": False}),
    "echo": (True, CONTINUED),
    "stream_options": ({"include_usage": True}, {"stream": True}),
    "tool_choice": ("none", {"tools": TOOLS}),
    "parallel_tool_calls": (False, {"tools": TOOLS}),
}  # fmt: skip
"""Field -> a value that must make a difference, and what it needs beside it."""

REFUSED: dict[str, Any] = {
    "use_beam_search": True, "length_penalty": 0.5, "logprob_token_ids": [1], "mm_processor_kwargs": {"a": 1},
    "media_io_kwargs": {"a": 1}, "kv_transfer_params": {"a": 1}, "vllm_xargs": {"a": 1}, "stream_interval": 4,
    "best_of": 2, "suffix": "x", "functions": [{"name": "f"}], "function_call": {"name": "f"}, "audio": {"voice": "x"},
    "modalities": ["audio"], "guided_json": {"type": "object"}, "guided_regex": "a", "guided_choice": ["a"],
    "guided_grammar": "x", "prompt_embeds": "x", "ec_transfer_params": {"a": 1},
}  # fmt: skip
HINTS = {"session_id": "s", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "prompt_cache_key": "k"}
"""Meant for routers, shops and archives: a single engine loses nothing by logging them as ignored."""

VLLM_CHAT_FIELDS = """
top_k min_p repetition_penalty use_beam_search length_penalty stop_token_ids include_stop_str_in_output ignore_eos
min_tokens skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side prompt_logprobs
logprob_token_ids allowed_token_ids bad_words echo add_generation_prompt continue_final_message add_special_tokens
documents chat_template chat_template_kwargs mm_processor_kwargs media_io_kwargs structured_outputs response_format
priority request_id session_id return_tokens_as_token_ids return_token_ids return_prompt_text cache_salt
kv_transfer_params vllm_xargs repetition_detection stream_interval include_reasoning thinking_token_budget
reasoning_effort stream_options max_tokens max_completion_tokens tool_choice tools parallel_tool_calls
"""
"""vLLM's own fields and the OpenAI ones that it gives a meaning of its own."""


@pytest.fixture
def http(serve: Serve) -> Any:
    with http_client(serve(trust_request_chat_template=True)) as made:
        yield made


@pytest.fixture
def llm() -> FakeLLM:
    made = FakeLLM()
    made.reasoning_parser, made.tool_call_parser = "qwen3", "hermes"
    call = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    made.reply = f"<think>\nHm.\n</think>\n\nTwo: wörld!\n{call}\n{call}"
    return made


def seen(http: httpx.Client, llm: FakeLLM, body: dict[str, Any]) -> tuple[Any, ...]:
    """All that a request leaves to be seen: the engine's side and the client's, without times and random names."""
    response = http.post(CHAT, json={"messages": MESSAGES, "chat_template": SHOWING, **body})
    assert response.status_code == 200, response.text
    stream, options = llm.submitted[-1], dict(llm.options[-1])
    if "mine" not in options["request_id"]:
        del options["request_id"]
    text = re.sub(r'"created":\d+|chatcmpl-(tool-)?[0-9a-f]{32}', "", response.text)
    return stream.params, stream.prompt_token_ids, repr(options), text


@pytest.mark.parametrize("name", sorted(HONOURED))
def test_the_field_makes_a_difference(http: httpx.Client, llm: FakeLLM, name: str) -> None:
    value, beside = HONOURED[name]
    without = seen(http, llm, beside)
    assert seen(http, llm, beside) == without
    assert seen(http, llm, {**beside, name: value}) != without


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_the_field_is_refused_by_name(http: httpx.Client, llm: FakeLLM, name: str) -> None:
    response = http.post(CHAT, json={"messages": MESSAGES, name: REFUSED[name]})
    assert f"`{name}`" in strict.error(response, 400, "BadRequestError", name)
    assert not llm.submitted


@pytest.mark.parametrize("name", sorted(HINTS))
def test_a_hint_is_accepted_and_changes_nothing(http: httpx.Client, llm: FakeLLM, name: str) -> None:
    assert seen(http, llm, {name: HINTS[name]}) == seen(http, llm, {})


def test_no_field_of_vllms_is_missing_here() -> None:
    assert set(VLLM_CHAT_FIELDS.split()) <= HONOURED.keys() | REFUSED.keys() | HINTS.keys()
