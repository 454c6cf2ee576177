"""Thinking budgets, repetition and grammars as token logic, without a model."""

import contextlib
import functools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from engine.chat.reply import read_whole
from engine.core.token_guide import COMPLETE, TokenGuide
from engine.errors import RequestError
from engine.params.sampling_params import SamplingParams
from engine.params.structured_outputs import Constraints, RepetitionDetection
from engine.text.guide.completion_guide import RepetitionDetector
from engine.text.guide.structured_output_manager import StructuredOutputManager
from engine.text.guide.thinking_state import thought_markers
from engine.text.parse.output_parser import ThinkingState, make_output_parser
from engine.text.parse.parser_choice import MakeParser, ParserChoice
from engine.text.tokens.tokenizer import Tokenizer
from tests import tiny_models

PARAMS = SamplingParams(temperature=0)
MARKS = ("<think>", "</think>", "<|channel>", "<channel|>", "<|channel|>", "<|message|>", "<|end|>", "<|start|>")
MARKS += ("<|call|>", "<|constrain|>", "<tool_call>", "</tool_call>")


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_models.write_tokenizer(folder, smollm2_gguf)
    hf = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    hf.add_special_tokens([tokenizers.AddedToken(mark, normalized=False, special=True) for mark in MARKS[2:-2]])
    hf.add_tokens([tokenizers.AddedToken(mark, normalized=False, special=False) for mark in MARKS[:2] + MARKS[-2:]])
    return Tokenizer(hf, named_tokens={"eos_token": "<|im_end|>"})


def make_manager(tokenizer: Tokenizer, parser: str | None = "qwen3", **options: object) -> StructuredOutputManager:
    return StructuredOutputManager(
        tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids, reasoning_parser=parser, **options
    )


def guide_of(manager: StructuredOutputManager, tokenizer: Tokenizer, prompt: str = "", **fields: object) -> TokenGuide:
    return guide_of_reply(manager, None, tokenizer.encode(prompt), **fields)


def guide_of_reply(
    manager: StructuredOutputManager, make_parser: MakeParser | None, prompt_ids: Sequence[int] = (1,), **fields: object
) -> TokenGuide:
    """The guide of a reply that ``make_parser``'s parsers read."""
    made = manager.prepare(Constraints.from_request(**fields), list(prompt_ids), PARAMS, make_parser)
    assert made is not None
    return made()


def drive(
    guide: TokenGuide, script: Sequence[int], *, overlap: bool, limit: int = 400, jumps: bool = True
) -> list[int]:
    """What a model that follows ``script`` writes, where a step may start before the last token is known.

    A forced token comes between the model's own, which ``jumps`` behind the script's matching end marker.
    """
    known: list[int] = []
    chosen: list[int] = []
    place = 0
    while len(chosen) < limit and place < len(script):
        token = guide.forced_token
        if token is None:
            token, place = script[place], place + 1
        elif jumps and token in script[place:]:
            place = script.index(token, place) + 1
        chosen.append(token)
        if overlap and not guide.waits:  # the next one is chosen before this one is known
            following = guide.forced_token
            assert following is None
            if place < len(script):
                chosen.append(script[place])
                place += 1
        for token in chosen[len(known) :]:
            known.append(token)
            if guide.advance(token) is not None:
                return known
    return known


def repeats(tokens: list[int], detection: RepetitionDetection) -> bool:
    """By the definition: the tail is one pattern ``min_count`` times."""
    for size in range(max(1, detection.min_pattern_size), detection.max_pattern_size + 1):
        tail = tokens[-size * detection.min_count :]
        if len(tail) == size * detection.min_count and tail == tail[-size:] * detection.min_count:
            return True
    return False


@pytest.mark.parametrize("seed", range(6))
def test_repetition_is_found_exactly_when_the_tail_repeats(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.text.guide.completion_guide._HISTORY_ROOM", 37)
    rng = random.Random(seed)
    detection = RepetitionDetection(rng.randint(1, 9), rng.randint(0, 1), rng.randint(2, 4))
    detector, tokens = RepetitionDetector(detection), []
    for _ in range(600):
        if rng.random() < 0.1:
            pattern = [rng.randrange(3) for _ in range(rng.randint(1, 10))]
            added = pattern * rng.randint(1, 5)
        else:
            added = [rng.randrange(3)]
        for token in added:
            tokens.append(token)
            assert detector.add(token) == repeats(tokens, detection), tokens[-40:]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("end", ["</think>", "\n\nEnough now.</think>\n\n"])
def test_a_budget_holds_at_every_cut_however_steps_overlap(tokenizer: Tokenizer, overlap: bool, end: str) -> None:
    manager = make_manager(tokenizer, reasoning_config={"reasoning_end_str": end})
    script = tokenizer.encode("<think>\nOne two three four five six.</think>\n\nThe answer")
    thought = script.index(tokenizer.encode("</think>")[0]) - 1
    injected = tokenizer.encode(end)
    for budget in range(thought + 3):
        guide = guide_of(manager, tokenizer, thinking_token_budget=budget)
        written = drive(guide, script, overlap=overlap)
        if budget <= thought:
            assert written[: 1 + budget] == script[: 1 + budget]
            assert written[1 + budget : 1 + budget + len(injected)] == injected
            assert guide.thinking_cut == "budget"
        else:
            assert written == script
            assert guide.thinking_cut is None
        assert tokenizer.decode(written).endswith("The answer")


def test_repetition_ends_a_thought_at_the_same_token_however_steps_overlap(tokenizer: Tokenizer) -> None:
    manager = make_manager(tokenizer)
    script = tokenizer.encode("<think>\n" + "again and " * 150 + "</think>Done")
    written = [drive(guide_of(manager, tokenizer), script, overlap=overlap) for overlap in (False, True)]
    assert written[0] == written[1]
    assert tokenizer.decode(written[0]).endswith("</think>Done")
    assert len(written[0]) < 150
    off = guide_of(manager, tokenizer, repetition_detection={"max_pattern_size": 0, "min_count": 0})
    assert drive(off, script, overlap=True) == script


def test_a_thought_that_ends_by_itself_is_not_ended_again(tokenizer: Tokenizer) -> None:
    manager = make_manager(tokenizer)
    asked = {"max_pattern_size": 2, "min_count": 3}
    script = tokenizer.encode("<think> no no no</think>Yes")
    guide = guide_of(manager, tokenizer, repetition_detection=asked)
    assert drive(guide, script, overlap=True) == script
    assert guide.thinking_cut is None


@pytest.mark.parametrize("in_flight", [False, True])
def test_finish_thinking_lets_only_the_token_in_flight_pass(tokenizer: Tokenizer, in_flight: bool) -> None:
    guide = guide_of(make_manager(tokenizer), tokenizer)
    for token in tokenizer.encode("<think>One two"):
        assert guide.advance(token) is None
    guide.finish_thinking(in_flight=in_flight)
    if in_flight:
        assert guide.forced_token is None
        assert guide.waits
        guide.advance(tokenizer.encode(" three")[0])
    assert guide.forced_token == tokenizer.encode("</think>")[0]
    guide.advance(tokenizer.encode("</think>")[0])
    assert (guide.forced_token, guide.thinking_cut, guide.waits) == (None, "request", False)


@pytest.mark.parametrize(
    ("parser", "prompt", "state"),
    [
        ("qwen3", "<|im_start|>assistant\n", ThinkingState.BEFORE),
        ("qwen3", "<|im_start|>assistant\n<think>\n", ThinkingState.THOUGHT),
        ("qwen3", "<|im_start|>assistant\n<think>\nSo far", ThinkingState.THOUGHT),
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", ThinkingState.ANSWER),
        ("qwen3", "<|im_start|>user\nwhat is <think>?<|im_end|>\n<|im_start|>assistant\n", ThinkingState.BEFORE),
        ("gemma4", "<|im_start|>model\n", ThinkingState.BEFORE),
        ("gemma4", "<|im_start|>model\n<|channel>thought\n", ThinkingState.THOUGHT),
        ("openai_gptoss", "<|start|>assistant", ThinkingState.THOUGHT),
        ("openai_gptoss", "<|start|>assistant<|channel|>final<|message|>", ThinkingState.ANSWER),
    ],
)
def test_the_prompt_says_where_output_begins(parser: str, prompt: str, state: ThinkingState) -> None:
    made = make_output_parser(reasoning_parser=parser, tool_call_parser=None, prompt_suffix=prompt)
    assert made.thinking_state is state


def test_markers_come_from_the_parser_or_the_reasoning_config(tokenizer: Tokenizer) -> None:
    assert thought_markers(None, {}, tokenizer) is None
    config = {"reasoning_start_str": "<think>", "reasoning_end_str": "I must answer now.</think>\n\n"}
    own = thought_markers(None, config, tokenizer)
    assert own is not None
    assert (own.reasoning.start, own.reasoning.end) == ("<think>", "</think>")
    assert tokenizer.decode(own.injected) == config["reasoning_end_str"]
    both = thought_markers("qwen3", {"reasoning_end_str": "Enough.</think>"}, tokenizer)
    assert both is not None
    assert tokenizer.decode(both.injected) == "Enough.</think>"


ARGUMENTS = {"command": "rm -r /tmp/old\n" + "0, 0, 0\n" * 120}
QWEN_CALL = (
    f"<tool_call>\n<function=run>\n<parameter=command>\n{ARGUMENTS['command']}\n</parameter>\n</function>\n</tool_call>"
)
CALLS_IN_THOUGHTS = {
    "qwen3_coder": ("qwen3", "<think>\nLet me <b>look.\n" + QWEN_CALL),
    "hermes": (
        "qwen3",
        "<think>\nNo <tool_call> yet: look.\n<tool_call>\n"
        + json.dumps({"name": "run", "arguments": ARGUMENTS})
        + "\n</tool_call>",
    ),
    "openai": (
        "openai_gptoss",
        "<|channel|>analysis<|message|>Let me look.<|end|><|start|>assistant<|channel|>commentary to=functions.run "
        f"<|constrain|>json<|message|>{json.dumps(ARGUMENTS)}<|call|>",
    ),
}
RUN = {
    "type": "function",
    "function": {"name": "run", "parameters": {"type": "object", "properties": {"command": {"type": "string"}}}},
}


def reader(tool_parser: str, tokenizer: Tokenizer, **fields: Any) -> MakeParser:
    prompt = "<|start|>assistant" if tool_parser == "openai" else "<|im_start|>assistant\n"
    return functools.partial(
        ParserChoice(CALLS_IN_THOUGHTS[tool_parser][0], tool_parser, None, tokenizer.special_tokens).make,
        tools=[RUN],
        tool_choice="auto",
        prompt=prompt,
        parallel_tool_calls=True,
        **fields,
    )


def calls_in(written: list[int], make_parser: MakeParser, tokenizer: Tokenizer) -> list[Any]:
    reply = read_whole(make_parser(), tokenizer.decode(written, skip_special_tokens=False), "stop")
    return [json.loads(call["function"]["arguments"]) for call in reply.tool_calls]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("tool_parser", CALLS_IN_THOUGHTS)
def test_no_budget_cuts_a_call_that_begins_inside_a_thought(
    tokenizer: Tokenizer, tool_parser: str, overlap: bool
) -> None:
    reasoning, text = CALLS_IN_THOUGHTS[tool_parser]
    manager, make_parser = make_manager(tokenizer, reasoning), reader(tool_parser, tokenizer)
    script = tokenizer.encode(text)
    cuts = set()
    for budget in [*range(60), 200, len(script)]:
        guide = guide_of_reply(manager, make_parser, thinking_token_budget=budget)
        written = drive(guide, script, overlap=overlap, limit=2000, jumps=False)
        assert calls_in(written, make_parser, tokenizer) == [ARGUMENTS], tokenizer.decode(written)
        cuts.add(guide.thinking_cut)
    assert cuts == {None, "budget"}


@pytest.mark.parametrize("in_flight", [False, True])
@pytest.mark.parametrize("tool_parser", CALLS_IN_THOUGHTS)
def test_a_thought_told_to_end_ends_outside_a_call_and_not_at_all_behind_one(
    tokenizer: Tokenizer, tool_parser: str, in_flight: bool
) -> None:
    reasoning, text = CALLS_IN_THOUGHTS[tool_parser]
    manager, make_parser = make_manager(tokenizer, reasoning), reader(tool_parser, tokenizer)
    script = tokenizer.encode(text)
    for place in [*range(60), len(script) - 5]:
        guide = guide_of_reply(manager, make_parser)
        for token in script[:place]:
            guide.advance(token)
        guide.finish_thinking(in_flight=in_flight)
        written = script[:place] + drive(guide, script[place:], overlap=False, limit=2000, jumps=False)
        assert calls_in(written, make_parser, tokenizer) == [ARGUMENTS], tokenizer.decode(written)


@pytest.mark.parametrize("tool_parser", CALLS_IN_THOUGHTS)
def test_what_repeats_in_a_call_is_no_thought_that_goes_in_circles(tokenizer: Tokenizer, tool_parser: str) -> None:
    reasoning, text = CALLS_IN_THOUGHTS[tool_parser]
    guide = guide_of_reply(make_manager(tokenizer, reasoning), reader(tool_parser, tokenizer))
    script = tokenizer.encode(text)
    assert drive(guide, script, overlap=True, limit=2000) == script
    assert guide.thinking_cut is None


def test_under_a_grammar_a_call_in_a_thought_is_thought_for_both(tokenizer: Tokenizer) -> None:
    make_parser = reader("qwen3_coder", tokenizer, calls_in_thoughts=False)
    guide = guide_of_reply(make_manager(tokenizer), make_parser, structured_outputs={"choice": ["yes", "no"]})
    end = tokenizer.encode("</think>")
    for token in tokenizer.encode("<think>\n" + QWEN_CALL):
        assert guide.advance(token) is None
        assert guide.thinking
    guide.advance(end[0])
    assert not guide.thinking
    assert guide.advance(tokenizer.encode("no")[0]) == COMPLETE
    reply = read_whole(make_parser(), f"<think>\n{QWEN_CALL}</think>no", "stop")
    assert (reply.reasoning, reply.text, reply.tool_calls) == (QWEN_CALL, "no", [])


def allowed(guide: TokenGuide, tokenizer: Tokenizer) -> set[int] | None:
    words = np.zeros(-(-tokenizer.vocab_size // 32), dtype=np.int32)
    if not guide.fill_bitmask(words):
        return None
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


def test_a_grammar_frees_the_thought_but_for_the_end_of_the_reply(tokenizer: Tokenizer) -> None:
    guide = guide_of(make_manager(tokenizer), tokenizer, structured_outputs={"choice": ["yes", "no"]})
    start, end = (tokenizer.encode(mark)[0] for mark in ("<think>", "</think>"))
    first = allowed(guide, tokenizer)
    assert first is not None
    assert start in first
    assert {tokenizer.decode([token]) for token in first} <= {"<think>", "y", "ye", "yes", "n", "no"}
    guide.advance(start)
    inside = allowed(guide, tokenizer)
    assert inside is not None
    assert set(range(tokenizer.vocab_size)) - inside == set(tokenizer.eos_token_ids)
    guide.advance(end)
    after = allowed(guide, tokenizer)
    assert after == first - {start}
    assert guide.advance(tokenizer.encode("no")[0]) == COMPLETE


def test_filling_a_mask_twice_changes_nothing(tokenizer: Tokenizer) -> None:
    guide = guide_of(make_manager(tokenizer, None), tokenizer, structured_outputs={"regex": "a[bc]+"})
    assert allowed(guide, tokenizer) == allowed(guide, tokenizer)
    guide.advance(tokenizer.encode("ab")[0])
    later = allowed(guide, tokenizer)
    assert later == allowed(guide, tokenizer)
    assert later is not None
    assert tokenizer.eos_token_ids <= later


def test_a_request_that_asks_for_nothing_has_no_guide(tokenizer: Tokenizer) -> None:
    assert make_manager(tokenizer, None).prepare(None, [1], PARAMS) is None
    assert make_manager(tokenizer, "qwen3").prepare(None, [1], PARAMS) is not None
    with pytest.raises(RequestError, match="--reasoning-parser"):
        make_manager(tokenizer, None).prepare(Constraints.from_request(thinking_token_budget=3), [1], PARAMS)


DEEP: dict[str, object] = {}
for _ in range(400):
    DEEP = {"items": DEEP}


@pytest.mark.parametrize(
    "fields",
    [
        {"structured_outputs": {"regex": 5}},
        {"structured_outputs": {"regex": "\ud800"}},
        {"structured_outputs": {"regex": "(?=a)b"}},
        {"structured_outputs": {"choice": "abc"}},
        {"structured_outputs": {"choice": ["\ud800"]}},
        {"structured_outputs": {"json": DEEP}},
        {"structured_outputs": {"json": "[" * 100_000}},
        {"structured_outputs": {"json": {"$ref": "http://localhost/x"}}},
        {"structured_outputs": {"json": {"minimum": 10**400, "type": "integer"}}},
        {"structured_outputs": {"json": {}, "whitespace_pattern": "("}},
        {"structured_outputs": {"json": {"properties": {"a": {}}, "required": [{}]}}},
        {"structured_outputs": {"json": {"$id": "http://[x", "properties": {"a": {"$ref": "y"}}}}},
        {"structured_outputs": {"grammar": "start: start"}},
        {"structured_outputs": {"grammar": ""}},
        {"structured_outputs": {"structural_tag": {"structures": [5], "triggers": ["<"]}}},
        {"structured_outputs": {"structural_tag": {"structures": [{"begin": "<a>", "end": 5}], "triggers": [5, "<"]}}},
        {"response_format": {"type": ["x"]}},
        {"response_format": {"type": "json_schema", "json_schema": 5}},
        {"tools": [5], "tool_choice": "required"},
        {"tools": [{"function": {"name": "a", "parameters": 5}}], "tool_choice": "required"},
        {"tools": [{"function": {"name": "a"}}], "tool_choice": {"function": 5}},
        {"repetition_detection": {"max_pattern_size": "3"}},
        {"repetition_detection": {"max_pattern_size": 3, "min_count": 10**30}},
        {"thinking_token_budget": True},
        {"thinking_token_budget": 1.5},
    ],
    ids=lambda fields: f"{next(iter(fields))}-{next(iter(fields.values()))!r}"[:60],
)
def test_nonsense_of_any_type_is_the_clients_error(tokenizer: Tokenizer, fields: dict[str, object]) -> None:
    manager = make_manager(tokenizer)
    with pytest.raises(RequestError) as raised:
        manager.prepare(Constraints.from_request(**fields), [1], PARAMS)
    assert "\n" not in str(raised.value)


ODD: list[Any] = [None, True, -1, 1e400, 10**30, "", "#", "#/x", "string", ["a"], [1, {}], {}, [[]], "(", "é\ud800"]
HOLD = ("properties", "$defs", "patternProperties"), ("anyOf", "oneOf", "allOf", "prefixItems")
HOLD += (("items", "additionalProperties", "not", "propertyNames", "unevaluatedProperties", "contains"),)
SAY = (
    "type",
    "required",
    "$ref",
    "$id",
    "enum",
    "const",
    "pattern",
    "format",
    "minProperties",
    "uniqueItems",
    "minimum",
)


def odd_schema(rng: random.Random, depth: int = 0) -> Any:
    """A schema in which one value in three is of any kind."""
    if depth > 4 or rng.random() < 0.1:
        return rng.choice(ODD)
    schema: dict[str, Any] = {}
    for key in rng.sample([key for keys in (*HOLD, SAY) for key in keys], rng.randint(0, 5)):
        parts = [odd_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]
        if key in SAY or rng.random() < 0.2:
            schema[key] = rng.choice([*ODD, "object", "array", "#/$defs/a", ["a"]])
        elif key in HOLD[0]:
            schema[key] = dict(zip("ab^", parts, strict=False))
        else:
            schema[key] = parts if key in HOLD[1] else parts[0]
    return schema


@pytest.mark.parametrize("parser", [None, "hermes", "qwen3_coder"])
def test_a_schema_of_any_kind_is_taken_or_the_clients_error(tokenizer: Tokenizer, parser: str | None) -> None:
    manager, rng = make_manager(tokenizer, None, tool_call_parser=parser), random.Random(7)
    taken = 0
    for _ in range(500):
        tools = [{"function": {"name": f"f{number}", "parameters": odd_schema(rng, 1)}} for number in range(2)]
        described = {"type": "json_schema", "json_schema": {"schema": odd_schema(rng)}}
        for fields in ({"tools": tools, "tool_choice": "required"}, {"response_format": described, "tools": tools}):
            with contextlib.suppress(RequestError):
                manager.prepare(Constraints.from_request(**fields), [1], PARAMS)
                taken += 1
    assert 100 < taken < 900


MANY = [{"type": "object", "properties": {"k": {"const": n}}, "required": ["k"]} for n in range(2500)]


@pytest.mark.parametrize("asked", [{"choice": [f"choice {n}" for n in range(2500)]}, {"json": {"anyOf": MANY}}])
def test_a_grammar_that_is_too_large_for_its_first_token_is_refused_before_it_begins(
    tokenizer: Tokenizer, asked: dict[str, Any]
) -> None:
    with pytest.raises(RequestError, match=r"bad grammar or schema: .*max is 2000") as caught:
        guide_of(make_manager(tokenizer), tokenizer, structured_outputs=asked)
    assert caught.value.param == "structured_outputs"
    assert "<state>" not in str(caught.value)
