"""Grammars, thinking budgets and repetition detection through the whole engine, on a scripted model."""

import asyncio
import inspect
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import engine
from engine import LLM, SamplingParams
from engine.chat.request import PromptRequest
from engine.errors import GenerationError, RequestError
from engine.outputs import CompletionOutput
from engine.params.sampling_params import StructuredOutputsParams
from engine.params.structured_outputs import ThinkingBudget
from engine.runtime.stream import RequestStream
from tests.engine.parity.oracle import assert_nothing_is_held, shrink_pool
from tests.scripted_model import SUFFIX, THINK_END, install, write_scripted_model

GREEDY = SamplingParams(temperature=0, max_tokens=300, skip_special_tokens=False)
ANSWER = 'The answer is {"a": 1, "b": [true, null]}.'
THOUGHT = "<think>\nFirst this, then that, and then the end of it.\n</think>\n\n"
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "string"}}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
HELLO = [{"role": "user", "content": "Hello"}]
ScriptedLLM = Callable[..., LLM]


def submit(llm: LLM, params: SamplingParams = GREEDY, prompt: str = SUFFIX, **fields: Any) -> RequestStream:
    return llm.submit_prompt(prompt, params, **fields)


def run(llm: LLM, params: SamplingParams = GREEDY, prompt: str = SUFFIX, **fields: Any) -> CompletionOutput:
    return submit(llm, params, prompt, **fields).result().outputs[0]


FORMATS: list[tuple[dict[str, Any], str, Callable[[str], bool]]] = [
    (
        {"structured_outputs": {"choice": ["yes", "no", "größer"]}},
        "Well, no",
        lambda text: text in ("yes", "no", "größer"),
    ),
    ({"structured_outputs": {"regex": r"[a-c]{3}-\d+"}}, "abc", lambda text: bool(re.fullmatch(r"[a-c]{3}-\d+", text))),
    ({"structured_outputs": {"json": SCHEMA}}, ANSWER, lambda text: json.loads(text).keys() == {"a", "b"}),
    ({"structured_outputs": {"json_object": True}}, ANSWER, lambda text: isinstance(json.loads(text), dict)),
    ({"structured_outputs": {"grammar": 'root ::= "<" [a-z]+ ">"'}}, "<abc>", lambda text: text == "<abc>"),
    ({"response_format": {"type": "json_object"}}, ANSWER, lambda text: isinstance(json.loads(text), dict)),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        '{"a": 12, "b": ["x", "y\\n"]}',
        lambda text: json.loads(text) == {"a": 12, "b": ["x", "y\n"]},
    ),
    (
        {
            "response_format": {
                "type": "structural_tag",
                "structures": [{"begin": "<f>", "schema": {"type": "integer"}, "end": "</f>"}],
                "triggers": ["<f"],
            }
        },
        "I say <f>12</f> twice",
        lambda text: text == "I say <f>12</f> twice",
    ),
]


@pytest.fixture(scope="module")
def formats_llm(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    install()
    folder = tmp_path_factory.mktemp("formats")
    write_scripted_model(folder, smollm2_gguf, [script for _, script, _ in FORMATS])
    with LLM(str(folder), max_model_len=1024, gpu_memory_utilization=0.2) as llm:
        yield llm


@pytest.mark.parametrize("number", range(len(FORMATS)), ids=[f"{next(iter(f[0].values()))!r}"[:40] for f in FORMATS])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_reply_fits_its_grammar_and_ends_with_it(formats_llm: LLM, number: int, temperature: float) -> None:
    fields, _, fits = FORMATS[number]
    params = GREEDY.replace(temperature=temperature, seed=1)
    output = run(formats_llm, params, f"<|script_{number}|>{SUFFIX}", **fields)
    assert fits(output.text), output.text
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    assert_nothing_is_held(formats_llm)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"structured_outputs": {"regex": "a("}}, "unclosed group"),
    ({"structured_outputs": {"json": "{nonsense"}}, "not valid JSON"),
    ({"structured_outputs": {"json": {"type": "strin"}}}, "strin"),
    ({"structured_outputs": {"json": [1]}}, "must be a schema"),
    ({"structured_outputs": {"grammar": "root ::= missing"}}, "bad grammar"),
    ({"structured_outputs": {"structural_tag": {"structures": []}}}, "structural_tag"),
    ({"structured_outputs": {"choice": []}}, "choice"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "exactly one"),
    ({"structured_outputs": {"yaml": "a"}}, "yaml"),
    ({"response_format": {"type": "xml"}}, "xml"),
    ({"response_format": {"type": "json_schema"}}, "schema"),
    ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "exclude each other"),
    ({"thinking_token_budget": -2}, "non-negative"),
    ({"thinking_token_budget": 5}, "--reasoning-parser"),
    ({"repetition_detection": {"max_pattern_size": 4}}, "min_count"),
    ({"repetition_detection": {"max_pattern_size": 2, "min_pattern_size": 3, "min_count": 2}}, "min_pattern_size"),
    ({"tools": [], "tool_choice": "required"}, "tools"),
    ({"tools": [{"function": {"name": "f"}}], "tool_choice": {"function": {"name": "g"}}}, "'g'"),
]


def test_what_cannot_be_is_refused_when_it_comes_in(scripted_llm: ScriptedLLM) -> None:
    llm = scripted_llm("text")
    for fields, message in BAD:
        with pytest.raises(RequestError, match=re.escape(message)):
            submit(llm, **fields)
    with pytest.raises(RequestError, match="allowed_token_ids"):
        submit(llm, GREEDY.replace(allowed_token_ids=[5]), structured_outputs={"regex": "a"})
    assert llm.stats().prompt_tokens == 0
    assert run(llm).text.startswith("text")


DOORS: dict[str, Callable[[LLM, SamplingParams], str]] = {
    "generate": lambda llm, params: llm.generate(SUFFIX, params)[0].outputs[0].text,
    "chat": lambda llm, params: llm.chat(HELLO, params)[0].outputs[0].text,
    "stream": lambda llm, params: "".join(delta.text for delta in llm.stream(HELLO, params)),
    "astream": lambda llm, params: asyncio.run(collected(llm, params)),
    "achat": lambda llm, params: asyncio.run(llm.achat(HELLO, params)).outputs[0].text,
    "submit": lambda llm, params: llm.submit_prompt(SUFFIX, params).result().outputs[0].text,
}


async def collected(llm: LLM, params: SamplingParams) -> str:
    return "".join([delta.text async for delta in llm.astream(HELLO, params)])


def test_sampling_params_constrain_the_reply_through_every_door(scripted_llm: ScriptedLLM) -> None:
    llm = scripted_llm(THOUGHT + "no no no no no no no no", reasoning_parser="qwen3")
    cut = {"thinking_token_budget": 3, "structured_outputs": StructuredOutputsParams(choice=["yes", "no"])}
    assert engine.StructuredOutputsParams is StructuredOutputsParams
    for name, door in DOORS.items():
        thought, _, answer = door(llm, GREEDY.replace(**cut)).partition(THINK_END)
        assert (len(llm.tokenize(thought)) <= 5, answer) == (True, "no"), name
        repeats = GREEDY.replace(repetition_detection={"max_pattern_size": 2, "min_count": 3})
        assert len(door(llm, repeats)) < len(door(llm, GREEDY)), name
    assert llm.generate(SUFFIX, llm.sampling_params(temperature=0, **cut))[0].outputs[0].thinking_cut == "budget"


def test_constraints_in_sampling_params_are_checked_when_made_and_come_from_one_place(
    scripted_llm: ScriptedLLM,
) -> None:
    for field, value in (("structured_outputs", {}), ("structured_outputs", "json"), ("structured_outputs", {"xml": 1}),
                         ("thinking_token_budget", -2), ("repetition_detection", {"max_pattern_size": 4}),
                         ("repetition_detection", 3)):  # fmt: skip
        with pytest.raises(RequestError, match=field):
            SamplingParams(**{field: value})
    llm = scripted_llm("text")
    with pytest.raises(RequestError, match="structured_outputs was given twice, in SamplingParams and beside it"):
        submit(llm, GREEDY.replace(structured_outputs={"regex": "a"}), structured_outputs={"regex": "a"})
    both = llm.prepare(
        PromptRequest(prompt="a", sampling=GREEDY.replace(thinking_token_budget=3), structured_outputs={"regex": "a"})
    ).constraints
    assert both is not None
    assert (both.thinking, both.structured) == (ThinkingBudget(3), StructuredOutputsParams(regex="a"))
    with pytest.raises(RequestError, match="structured_outputs belongs to a single request"):
        llm.settings.update(structured_outputs={"regex": "a"})


@pytest.mark.parametrize(
    ("keyword", "advice"),
    [
        ("structured_outputs", r"give it as SamplingParams\(structured_outputs=…\)"),
        ("lora_request", "LoRA adapters are not in this version"),
        ("enable_thinking", "not known here; a chat takes sampling_params, tools, .*chat_template_kwargs"),
    ],
)
def test_a_keyword_that_no_chat_takes_is_refused_with_the_place_where_it_belongs(
    scripted_llm: ScriptedLLM, keyword: str, advice: str
) -> None:
    llm = scripted_llm("text")
    for door in (llm.chat, llm.stream, llm.achat):
        with pytest.raises(RequestError, match=f"{keyword}: {advice}"):
            ended(door(HELLO, GREEDY, **{keyword: {"a": 1}}))
    assert llm.chat(HELLO, GREEDY, **{keyword: None})[0].outputs[0].text == "text"


def test_a_text_is_no_conversation_and_is_not_continued_as_a_raw_prompt(scripted_llm: ScriptedLLM) -> None:
    llm = scripted_llm("text")
    for door in (llm.chat, llm.achat):
        with pytest.raises(RequestError, match=r"messages must be a list such as \[{'role': 'user'"):
            ended(door("Hello", GREEDY))  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="messages must be one conversation, got 2"):
        ended(llm.achat([HELLO, HELLO], GREEDY))  # type: ignore[arg-type]


def ended(answer: Any) -> None:
    asyncio.run(answer) if inspect.isawaitable(answer) else list(answer)


def test_a_grammar_leaves_the_rows_beside_it_as_they_are(scripted_llm: ScriptedLLM) -> None:
    texts = ["One free reply, and its end.", ANSWER, "Another free one: 1, 2, 3 and so on."]
    llm = scripted_llm(*texts)
    prompts = [f"<|script_{number}|>{SUFFIX}" for number in range(3)]
    alone = [run(llm, prompt=prompt).token_ids for prompt in prompts]
    llm.reset_prefix_cache()
    schema = {"structured_outputs": {"json": SCHEMA}}
    random = GREEDY.replace(temperature=1.0, seed=5)
    constrained = [run(llm, params, prompt=prompts[1], **schema).token_ids for params in (GREEDY, random)]
    streams = [
        submit(llm, prompt=prompts[0]),
        submit(llm, prompt=prompts[1], **schema),
        submit(llm, random, prompt=prompts[2]),
        submit(llm, random, prompt=prompts[1], **schema),
        submit(llm, prompt=prompts[2], structured_outputs={"choice": ["Another"]}),
    ]
    found = [stream.result().outputs[0] for stream in streams]
    assert [found[0].token_ids, found[2].token_ids] == [alone[0], alone[2]]
    assert [found[1].token_ids, found[3].token_ids] == constrained
    assert found[4].text == "Another"
    assert_nothing_is_held(llm)


def test_n_completions_prefix_hits_and_lost_blocks_keep_to_the_grammar(scripted_llm: ScriptedLLM) -> None:
    llm = scripted_llm(ANSWER)
    prompt = "word " * 64 + SUFFIX
    fields = {"structured_outputs": {"json": SCHEMA}}
    expected = run(llm, prompt=prompt, **fields).text
    again = submit(llm, GREEDY.replace(n=3), prompt=prompt, **fields).result()
    assert again.num_cached_tokens > 0
    assert [output.text for output in again.outputs] == [expected] * 3
    drawn = submit(llm, GREEDY.replace(n=3, temperature=1.0, seed=1), prompt=prompt, **fields).result()
    assert all(json.loads(output.text).keys() == {"a", "b"} for output in drawn.outputs)
    shrink_pool(llm, 16)
    streams = [submit(llm, prompt=f"{number} {prompt}", **fields) for number in range(4)]
    assert [stream.result().outputs[0].text for stream in streams] == [expected] * 4
    assert llm.stats().num_preemptions > 0
    assert_nothing_is_held(llm)


def test_lengths_and_stops_bind_a_grammar_too(scripted_llm: ScriptedLLM) -> None:
    llm = scripted_llm("abcabcabc")
    fields = {"structured_outputs": {"regex": "[a-c]+"}}
    short = run(llm, GREEDY.replace(max_tokens=2), **fields)
    assert (short.finish_reason, len(short.token_ids)) == ("length", 2)
    stopped = run(llm, GREEDY.replace(stop=["bca"]), **fields)
    assert (stopped.text, stopped.stop_reason) == ("a", "bca")
    long = run(llm, GREEDY.replace(min_tokens=20, max_tokens=25), **fields)
    assert len(long.token_ids) >= 20
    assert set(long.text) <= set("abc")
    done = run(llm, GREEDY.replace(min_tokens=20), structured_outputs={"regex": "ab"})
    assert (done.text, done.finish_reason) == ("ab", "stop")
    biased = run(
        llm, GREEDY.replace(logit_bias={llm.tokenize("no")[0]: 100}), structured_outputs={"choice": ["no", "a"]}
    )
    assert biased.text == "no"
    with pytest.raises(GenerationError, match="bad_words"):
        run(llm, GREEDY.replace(bad_words=["a"]), structured_outputs={"regex": "a"})
    assert_nothing_is_held(llm)


@pytest.mark.parametrize("suffix", [SUFFIX, SUFFIX + "<think>\n", SUFFIX + "<think>\n\n</think>\n\n"])
def test_a_grammar_holds_from_the_end_of_the_thought_on(scripted_llm: ScriptedLLM, suffix: str) -> None:
    llm = scripted_llm(THOUGHT + ANSWER, reasoning_parser="qwen3")
    free = run(llm, prompt=suffix).text
    output = run(llm, prompt=suffix, structured_outputs={"json": SCHEMA})
    thought, mark, answer = output.text.rpartition(THINK_END)
    assert thought + mark == free.rpartition(THINK_END)[0] + mark
    assert json.loads(answer).keys() == {"a", "b"}


def test_a_model_that_does_not_think_keeps_to_the_grammar_from_its_first_token(scripted_llm: ScriptedLLM) -> None:
    llm = scripted_llm(ANSWER, reasoning_parser="qwen3")
    assert json.loads(run(llm, structured_outputs={"json": SCHEMA}).text)


def test_a_thought_under_a_grammar_cannot_end_the_reply(scripted_llm: ScriptedLLM) -> None:
    llm = scripted_llm("<think>\nNever mind.", reasoning_parser="qwen3")
    output = run(llm, GREEDY.replace(max_tokens=30), structured_outputs={"regex": "ab"})
    assert output.finish_reason == "length"
    cut = run(llm, GREEDY.replace(max_tokens=30), structured_outputs={"regex": "ab"}, thinking_token_budget=9)
    assert (cut.text.rpartition(THINK_END)[2], cut.finish_reason) == ("ab", "stop")


@pytest.mark.parametrize("opened", [False, True])
def test_a_budget_ends_the_thought_after_so_many_tokens_and_the_answer_follows(
    scripted_llm: ScriptedLLM, opened: bool
) -> None:
    llm = scripted_llm(THOUGHT + "So: 42.", reasoning_parser="qwen3")
    suffix = SUFFIX + ("<think>\n" if opened else "")
    whole = run(llm, prompt=suffix)
    inside = whole.text.removeprefix("<think>").partition(THINK_END)[0]
    num_thought = len(llm.tokenize(("" if opened else "<think>") + inside)) - (not opened)
    for budget in range(num_thought + 3):
        output = run(llm, prompt=suffix, thinking_token_budget=budget)
        thought, mark, answer = output.text.removeprefix("<think>").partition(THINK_END)
        assert mark, output.text
        assert inside.startswith(thought)
        begun = 0 if opened else 1
        assert output.token_ids.index(llm.tokenize(THINK_END)[0]) - begun == min(budget, num_thought)
        assert answer.strip() == "So: 42."
        assert output.thinking_cut == ("budget" if budget <= num_thought else None)
    assert run(llm, prompt=suffix, thinking_token_budget=-1).text == whole.text
    assert_nothing_is_held(llm)


def test_the_end_marker_may_bring_a_sentence_and_a_batch_changes_no_budget(scripted_llm: ScriptedLLM) -> None:
    end = "\n\nThat is enough.\n</think>\n\n"
    llm = scripted_llm(
        "<think>\n" + "around and around " * 30 + "</think>\n\nDone.",
        reasoning_parser="qwen3",
        reasoning_config={"reasoning_start_str": "<think>", "reasoning_end_str": end},
    )
    alone = {budget: run(llm, thinking_token_budget=budget) for budget in (0, 1, 2, 7, 20)}
    for output in alone.values():
        assert output.text.partition(end)[2] == "Done."
    free = run(llm)
    streams = {budget: submit(llm, thinking_token_budget=budget) for budget in alone}
    beside = submit(llm)
    assert {budget: stream.result().outputs[0].token_ids for budget, stream in streams.items()} == {
        budget: output.token_ids for budget, output in alone.items()
    }
    assert beside.result().outputs[0].token_ids == free.token_ids


def test_an_endless_thought_ends_by_itself_and_the_answer_follows(scripted_llm: ScriptedLLM) -> None:
    llm = scripted_llm("<think>\n" + "Wait, let me think again. " * 100 + "</think>\n\nFine.", reasoning_parser="qwen3")
    output = run(llm, GREEDY.replace(max_tokens=400))
    assert output.text.partition(THINK_END)[2].strip() == "Fine."
    assert (output.thinking_cut, output.finish_reason) == ("repetition", "stop")
    assert len(output.token_ids) < 300
    off = run(llm, GREEDY.replace(max_tokens=400), repetition_detection={"max_pattern_size": 0})
    assert (off.finish_reason, off.thinking_cut) == ("length", None)


def test_a_reply_that_repeats_itself_ends_where_that_is_asked_for(scripted_llm: ScriptedLLM) -> None:
    llm = scripted_llm("Start. " + "no no no no " * 40)
    fields = {"repetition_detection": {"max_pattern_size": 3, "min_count": 4}}
    output = run(llm, GREEDY.replace(max_tokens=100), **fields)
    assert (output.finish_reason, output.stop_reason) == ("repetition", "repetition_detected")
    assert output.text.startswith("Start. no no no")
    assert len(output.token_ids) <= 8
    assert llm.explain().outputs[0].stop == "it repeated itself (repetition_detection)"
    samples = [sample for family in llm.metrics.registry.collect() for sample in family.samples]
    ended = {one.labels["finished_reason"]: one.value for one in samples if one.name == "vllm:request_success_total"}
    assert (ended["repetition"], ended["stop"]) == (1, 0)
    assert run(llm, GREEDY.replace(max_tokens=100)).finish_reason == "length"


def test_a_thought_can_be_ended_while_it_goes_on(scripted_llm: ScriptedLLM) -> None:
    words = " ".join(f"word{number}" for number in range(200))
    llm = scripted_llm(f"<think>\n{words}</think>\n\nEnd.", reasoning_parser="qwen3", step_seconds=0.01)
    stream = submit(llm, GREEDY.replace(max_tokens=900))
    for _ in zip(range(10), stream, strict=False):
        pass
    stream.finish_thinking()
    output = stream.result().outputs[0]
    stream.finish_thinking()
    assert output.thinking_cut == "request"
    assert output.text.partition(THINK_END)[2].strip() == "End."
    assert len(output.token_ids) < 100


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln \\"x\\"", "days": 3}}\n</tool_call>'


@pytest.mark.parametrize("parser", ["hermes", "llama3_json", "qwen3_coder", "pythonic"])
@pytest.mark.parametrize("choice", ["required", "named"])
def test_a_demanded_call_is_one_whatever_the_model_would_say(
    scripted_llm: ScriptedLLM, parser: str, choice: str
) -> None:
    llm = scripted_llm("I would rather not.", CALL + "\n" + CALL, tool_call_parser=parser)
    wanted: Any = "required" if choice == "required" else {"type": "function", "function": {"name": "clock"}}
    for script in (0, 1):
        output = run(llm, prompt=f"<|script_{script}|>{SUFFIX}", tools=[WEATHER, CLOCK], tool_choice=wanted)
        parsed = llm.preparer.parsers.make(
            tools=[WEATHER, CLOCK], tool_choice=wanted, prompt="", parallel_tool_calls=True
        )
        deltas = [parsed.feed(output.text), parsed.finish(output.finish_reason)]
        calls = [call for delta in deltas for call in delta.tool_calls]
        names = [call.name for call in calls if call.name]
        assert names, output.text
        assert set(names) <= ({"clock"} if choice == "named" else {"weather", "clock"})
        arguments = ["".join(call.arguments for call in calls if call.index == index) for index in range(len(names))]
        assert all(isinstance(json.loads(text), dict) for text in arguments)
        assert not "".join(delta.content for delta in deltas).strip()


def test_a_call_of_the_models_own_passes_its_grammar_unchanged(scripted_llm: ScriptedLLM) -> None:
    llm = scripted_llm(CALL + "\n" + CALL, tool_call_parser="hermes")
    assert run(llm, tools=[WEATHER, CLOCK], tool_choice="required").text == f"{CALL}\n{CALL}"
    one = run(llm, tools=[WEATHER, CLOCK], tool_choice="required", parallel_tool_calls=False)
    assert one.text == CALL


CHANNELS = [
    (
        "gemma4",
        ["<|channel>", "<channel|>"],
        "<|channel>thought\nFirst this and then that.<channel|>",
        "<channel|>",
    ),
    (
        "openai_gptoss",
        ["<|channel|>", "<|message|>", "<|end|>", "<|start|>"],
        "<|channel|>analysis<|message|>First this and then that.<|end|><|start|>assistant<|channel|>final<|message|>",
        "<|channel|>final<|message|>",
    ),
]


@pytest.mark.parametrize(("parser", "tokens", "thought", "end"), CHANNELS, ids=[channel[0] for channel in CHANNELS])
def test_channels_are_thoughts_like_others(
    scripted_llm: ScriptedLLM, parser: str, tokens: list[str], thought: str, end: str
) -> None:
    llm = scripted_llm(thought + ANSWER, reasoning_parser=parser, tool_call_parser="hermes", special_tokens=tokens)
    assert run(llm).text == thought + ANSWER
    output = run(llm, structured_outputs={"json": SCHEMA})
    assert output.text.startswith(thought)
    assert json.loads(output.text.removeprefix(thought)).keys() == {"a", "b"}
    cut = run(llm, structured_outputs={"json": SCHEMA}, thinking_token_budget=4)
    assert cut.thinking_cut == "budget"
    before, _, answer = cut.text.partition(end)
    assert len(before) < len(thought.partition(end)[0]) + len("<|end|><|start|>assistant")
    assert json.loads(answer).keys() == {"a", "b"}
    calls = run(llm, tools=[CLOCK], tool_choice="required", thinking_token_budget=6)
    assert '"clock"' in calls.text.partition(end)[2]
