"""What is remembered of requests, and how it is explained: with the real engine on a tiny model."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine import LLM, SamplingParams
from engine.chat.request import PreparedRequest
from engine.errors import RequestError
from engine.explain.request_log import MAX_BYTES, MAX_RECORDS, RequestLog, common_prefix, rough_bytes
from engine.outputs import CompletionDelta
from engine.params.structured_outputs import Constraints, StructuredOutput
from engine.runtime.stream import RequestStream

LONG = "The quick brown fox jumps over the lazy dog, and then it goes home to sleep until the next morning comes."


@pytest.fixture(scope="module")
def llm(tiny_model_dir: Any) -> Iterator[LLM]:
    folder: Path = tiny_model_dir("llama")
    with LLM(str(folder), max_model_len=512, override_generation_config={"top_k": 30}) as loaded:
        yield loaded


@pytest.fixture(autouse=True)
def forgetful(llm: LLM) -> None:
    llm.settings.reset()
    llm.reset_prefix_cache()
    llm.request_log = RequestLog()


def greedy(**more: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, **more)


def test_without_a_request_there_is_nothing_to_explain(llm: LLM) -> None:
    with pytest.raises(RequestError, match="no request yet"):
        llm.explain()
    llm.generate("One", greedy())
    with pytest.raises(RequestError, match="the latest 1 are remembered"):
        llm.explain(2)


def test_an_explanation_holds_prompt_tokens_output_and_times(llm: LLM) -> None:
    output = llm.generate(LONG, greedy())[0]
    told = llm.explain()
    assert told.prompt == LONG
    assert list(told.prompt_token_ids) == output.prompt_token_ids
    assert "".join(told.tokens) == LONG
    assert told.outputs[0].raw == llm.tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=False)
    assert told.outputs[0].stop == "max_tokens=4 tokens were generated"
    assert told.finished
    assert [told.queue_time is not None, told.prefill_time > 0, told.decode_time > 0] == [True] * 3  # type: ignore[operator]


def test_each_value_is_told_with_its_source(llm: LLM) -> None:
    llm.settings.update(preset="qwen-coding", min_p=0.05)
    resolved = llm.sampling_params(temperature=0.3, max_tokens=2)
    llm.submit_prompt("One", resolved).result()
    told = {value.name: (value.value, value.source) for value in llm.explain().sampling}
    assert told["temperature"] == (0.3, "request")
    assert told["top_k"] == (20, "preset qwen-coding")
    assert told["min_p"] == (0.05, "set")
    assert told["frequency_penalty"] == (0.0, "default")
    assert told["max_tokens"] == (2, "request")
    llm.settings.reset()
    llm.submit_prompt("One", llm.sampling_params(stop=["x"], logprobs=1)).abort()
    told = {value.name: (value.value, value.source) for value in llm.explain().sampling}
    assert told["top_k"] == (30, "--override-generation-config")
    assert told["stop"] == (("x",), "request")
    assert told["max_tokens"] == (512 - len(llm.tokenize("One")), "default: the rest of the context")


def test_values_of_plain_sampling_params_are_told_as_such(llm: LLM) -> None:
    llm.generate("One", greedy())
    told = {value.name: value.source for value in llm.explain().sampling}
    assert (told["temperature"], told["top_p"], told["ignore_eos"]) == ("SamplingParams", "default", "SamplingParams")


def test_the_first_request_finds_nothing_and_the_second_all_whole_blocks(llm: LLM) -> None:
    llm.generate(LONG, greedy())
    first = llm.explain().cache
    assert (first.num_cached_tokens, first.nearest, first.here) == (0, None, None)
    assert first.reason == "no earlier request is remembered"
    llm.generate(LONG, greedy())
    again = llm.explain().cache
    assert again.num_cached_tokens == (again.num_prompt_tokens - 1) // 16 * 16 == 16
    assert again.num_shared_tokens == again.num_prompt_tokens
    assert again.reason.startswith("all there is to reuse")


def test_the_first_differing_token_is_shown_on_both_sides(llm: LLM) -> None:
    llm.generate("Something else first", greedy())
    llm.generate(LONG * 2, greedy())
    other = LONG * 2
    other = other[: len(LONG) + 4] + "slow" + other[len(LONG) + 9 :]
    llm.generate(other, greedy())
    hit = llm.explain().cache
    ids, before = llm.tokenize(other), llm.tokenize(LONG * 2)
    assert hit.num_shared_tokens == next(i for i, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b)
    assert hit.num_cached_tokens == hit.num_shared_tokens // 16 * 16 > 0
    assert hit.nearest == 2
    assert str(hit.here).endswith(llm.tokenizer.token_text(ids[hit.num_shared_tokens]))
    assert str(hit.there).endswith(llm.tokenizer.token_text(before[hit.num_shared_tokens]))
    assert "are those of request 2" in hit.reason


def test_a_prompt_that_goes_on_from_a_reply_shares_its_tokens(llm: LLM) -> None:
    first = llm.generate(LONG, greedy())[0]
    ids = [*first.prompt_token_ids, *first.outputs[0].token_ids, *llm.tokenize(" And then?")]
    llm.generate(ids, greedy())
    hit = llm.explain().cache
    assert hit.num_shared_tokens == len(ids) - len(llm.tokenize(" And then?"))
    assert hit.here is None, "the earlier request ended there: nothing differs"


def test_evicted_blocks_another_salt_and_prompt_logprobs_are_told_apart(llm: LLM) -> None:
    llm.generate(LONG, greedy())
    llm.reset_prefix_cache()
    llm.generate(LONG, greedy())
    assert "not yet evicted" in llm.explain().cache.reason
    llm.submit_prompt(LONG, greedy(), cache_salt="mine").result()
    assert llm.explain().cache.reason == "no earlier request is remembered"
    llm.generate(LONG, greedy(prompt_logprobs=0))
    assert llm.explain().cache.reason == "prompt_logprobs need every prompt token computed"


def test_why_it_stopped_names_stop_strings_stop_tokens_and_aborts(llm: LLM) -> None:
    text = llm.generate("One", greedy())[0].outputs[0]
    llm.generate("One", greedy(stop_token_ids=[text.token_ids[1]]))
    assert llm.explain().outputs[0].stop.startswith("the stop token ")
    llm.generate("One", greedy(stop=[llm.tokenizer.token_text(text.token_ids[2])]))
    assert llm.explain().outputs[0].stop.startswith("the stop string ")
    stream = llm.submit_prompt("One", SamplingParams(max_tokens=500, ignore_eos=True))
    assert llm.explain().outputs[0].stop == "still running"
    stream.abort()
    stream.result()
    assert "it was stopped" in llm.explain().outputs[0].stop


def test_a_request_over_the_port_is_explained_as_any_other(llm: LLM) -> None:
    server = llm.serve(port=0)
    body = {"model": llm.args.names[0], "prompt": "One", "max_tokens": 3, "temperature": 0, "top_p": 0.5}
    headers = {"Authorization": f"Bearer {server.api_key}"}
    try:
        answer = httpx.post(f"{server.base_url}/completions", json=body, headers=headers, timeout=60).json()
    finally:
        server.stop()
    told = llm.explain()
    assert told.prompt == "One"
    assert told.outputs[0].content == answer["choices"][0]["text"]
    assert {value.name: value.source for value in told.sampling}["top_p"] == "request"
    assert told.request_id == answer["id"]


def test_a_chat_over_the_port_is_parsed_again_as_its_door_parsed_it(scripted_llm: Callable[..., LLM]) -> None:
    call = '<tool_call>\n{"name": "f", "arguments": {"city": "Köln"}}\n</tool_call>'
    llm = scripted_llm(
        f"<think>\nhm\n</think>\n\nLet me see.\n{call}", reasoning_parser="qwen3", tool_call_parser="hermes"
    )
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    body = {"model": "scripted", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "tools": [tool]}
    server = llm.serve(port=0)
    headers = {"Authorization": f"Bearer {server.api_key}"}
    answer = httpx.post(f"{server.base_url}/chat/completions", json=body, headers=headers, timeout=60).json()
    message = answer["choices"][0]["message"]
    output = llm.explain().outputs[0]
    assert (output.content, output.reasoning) == (message["content"], message["reasoning"]) == ("Let me see.", "hm")
    assert output.tool_calls == (message["tool_calls"][0]["function"],)
    assert output.raw.startswith("<think>")
    assert output.raw.endswith("</tool_call><|im_end|>")
    assert output.stop == "the model ended its turn with '<|im_end|>' (2)"


def test_constraints_are_told(llm: LLM) -> None:
    grammar = StructuredOutput(regex="[ab]+")
    llm.submit_prompt("One", greedy(), structured_outputs=grammar).result()
    assert any("regex" in row and "[ab]+" in row for row in llm.explain().constraints)
    llm.generate("One", greedy())
    assert llm.explain().constraints == ()


def thinking_of(llm: LLM) -> dict[str, tuple[Any, str]]:
    return {one.name: (one.value, one.source) for one in llm.explain().thinking}


def test_what_the_template_got_and_the_thinking_budget_are_told_with_their_sources(
    scripted_llm: Callable[..., LLM],
) -> None:
    template = "{{ messages[0].content }}{{ enable_thinking }}{{ style }}<|im_end|>\n<|im_start|>assistant\n"
    llm = scripted_llm(
        "<think>one two three four five</think>Yes.",
        chat_template=template,
        reasoning_parser="qwen3",
        default_chat_template_kwargs={"style": "brief", "tone": "warm"},
    )
    messages, params = [{"role": "user", "content": "Why?"}], greedy()
    llm.chat(messages, params)
    flag = "--default-chat-template-kwargs"
    assert thinking_of(llm) == {"style": ("brief", flag), "tone": ("warm", flag)}
    llm.settings.update(enable_thinking=True, thinking_token_budget=3)
    llm.chat(messages, params, chat_template_kwargs={"style": "long"})
    assert thinking_of(llm) == {
        "style": ("long", "request"),
        "tone": ("warm", flag),
        "enable_thinking": (True, "set"),
        "thinking_token_budget": (3, "set"),
    }
    llm.map(["Why?"], "{{ text }}", chat_template_kwargs={"enable_thinking": False}, use_tqdm=False)
    assert thinking_of(llm)["enable_thinking"] == (False, "map")
    llm.generate("Why?", params.replace(thinking_token_budget=2))
    assert thinking_of(llm) == {"thinking_token_budget": (2, "SamplingParams")}
    server = llm.serve(port=0)
    body = {"messages": messages, "max_tokens": 3, "reasoning_effort": "none", "thinking_token_budget": 4}
    headers = {"Authorization": f"Bearer {server.api_key}"}
    httpx.post(f"{server.base_url}/chat/completions", json=body, headers=headers, timeout=60).raise_for_status()
    told = thinking_of(llm)
    assert (told["reasoning_effort"], told["enable_thinking"]) == (("none", "request"), (False, "request"))
    assert told["thinking_token_budget"] == (4, "request")


def stream_of(number: int) -> RequestStream:
    stream = RequestStream(f"r{number}", None, [number], SamplingParams(), lambda: None)
    stream.put(CompletionDelta(0, "text", [7]))
    return stream


def request_of(stream: RequestStream) -> PreparedRequest:
    return PreparedRequest(None, stream.prompt_token_ids, stream.params)


def test_the_log_is_bounded_and_lets_go_of_finished_streams() -> None:
    log = RequestLog()
    streams = [stream_of(i) for i in range(MAX_RECORDS + 8)]
    records = []
    for stream in streams:
        records.append(log.add(stream, request_of(stream), max_tokens=16))
        stream.end()
    assert len(log) == MAX_RECORDS
    assert [record.stream is None for record in records[-3:]] == [True, True, False]
    assert records[-1].outcome.completions[0].text == "text"
    assert records[-1].stream is None
    assert [record.number for record in log.before(records[-1])][:2] == [MAX_RECORDS + 7, MAX_RECORDS + 6]


def test_the_log_is_bounded_in_what_prompts_tools_and_schemas_take_but_keeps_the_last() -> None:
    log = RequestLog()
    schema = StructuredOutput(json={"enum": ["x" * 1000] * 20_000})
    for number in range(8):
        stream = stream_of(number)
        request = PreparedRequest(None, [1], stream.params, Constraints(structured=schema))
        log.add(stream, request, max_tokens=16)
    assert len(log) == MAX_BYTES // rough_bytes(schema, MAX_BYTES) == 3
    large = StructuredOutput(json={"enum": ["x" * 1000] * 100_000})
    log.add(stream, PreparedRequest(None, [1], stream.params, Constraints(structured=large)), max_tokens=16)
    assert len(log) == 1
    log.add(stream, request_of(stream), max_tokens=16)
    log.add(stream, request_of(stream), max_tokens=16)
    assert len(log) == 2


def test_a_failed_request_keeps_its_error() -> None:
    log = RequestLog()
    stream = stream_of(1)
    record = log.add(stream, request_of(stream), max_tokens=16)
    assert not record.outcome.finished
    stream.end(RequestError("no finite logits"))
    assert (record.outcome.finished, record.outcome.error) == (True, "no finite logits")


@pytest.mark.parametrize(("one", "other", "shared"), [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 9], [1, 2], 1)])
def test_a_common_prefix_ends_at_the_first_difference_or_the_shorter_end(
    one: list[int], other: list[int], shared: int
) -> None:
    assert common_prefix(one, other) == shared


def test_an_explanation_can_be_written_as_json(llm: LLM) -> None:
    import dataclasses

    llm.generate("One", greedy())
    assert json.loads(json.dumps(dataclasses.asdict(llm.explain())))["prompt"] == "One"
