"""Formats, grammars and demanded calls through the port and ``LLM.chat``, before a scripted model."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
import tokenizers
from pydantic import BaseModel

from engine import LLM, SamplingParams
from engine.errors import RequestError
from engine.openai.server import ServerHandle
from tests import scripted_model, tiny_models
from tests.engine.openai import strict
from tests.engine.openai.conftest import KEY, http_client

CHAT = "/v1/chat/completions"
HARMONY = ("<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|call|>", "<|constrain|>", "<|return|>")
RAMBLING = '{"name": "Ann", "age": 30, "gender": "female", "city": "Oslo", "more": {"a": [1, 2, 3]}}'
IN_FORMAT = '{"name": "Bo", "age": 7}'
HEAD = "<|start|>assistant<|channel|>"
CALLS = {
    "hermes": '<tool_call>\n{"name": "look_up", "arguments": {"word": "x"}}\n</tool_call>',
    "llama3_json": '{"name": "look_up", "parameters": {"word": "x"}}',
    "qwen3_coder": ("<tool_call>\n<function=look_up>\n<parameter=word>\nx\n</parameter>\n</function>\n</tool_call>"),
    "glm45": "<tool_call>look_up\n<arg_key>word</arg_key>\n<arg_value>x</arg_value>\n</tool_call>",
    "mistral": '[TOOL_CALLS]look_up[ARGS]{"word": "x"}',
    "pythonic": '[look_up(word="x")]',
    "xlam": '[{"name": "look_up", "arguments": {"word": "x"}}]',
    "gigachat3": 'function call<|role_sep|>\n{"name": "look_up", "arguments": {"word": "x"}}',
    "openai": (
        f"<|channel|>analysis<|message|>Hm.<|end|>{HEAD}commentary to=functions.look_up <|constrain|>json"
        '<|message|>{"word": "x"}<|call|>'
    ),
}
ANSWERS = {"openai": f"<|channel|>analysis<|message|>Hm.<|end|>{HEAD}final<|message|>{RAMBLING}"}


class Person(BaseModel):
    name: str
    age: int


SCHEMA = Person.model_json_schema()
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
OPEN_FORMAT = {"type": "json_schema", "json_schema": {"name": "p", "schema": {**SCHEMA, "additionalProperties": True}}}


def function(name: str, properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {
        "type": "function",
        "function": {"name": name, "parameters": {**parameters, **more.pop("beside", {})}, **more},
    }


LOOK_UP = function("look_up", {"word": {"type": "string"}})


@contextmanager
def served(llm: LLM) -> Iterator[httpx.Client]:
    """A client of an engine's port."""
    with http_client(llm.server or llm.serve(api_key=KEY)) as http:
        yield http


@pytest.fixture(scope="module")
def make_llm(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., LLM]]:
    """An engine for each parser: script 0 rambles, 1 calls, 2 answers in prose."""
    made: dict[str, LLM] = {}

    def make(parser: str) -> LLM:
        if parser not in made:
            scripted_model.install()
            folder = tmp_path_factory.mktemp(parser)
            scripts = [ANSWERS.get(parser, RAMBLING), CALLS[parser], "I would rather say it in prose."]
            scripts += (
                [] if parser == "openai" else [f"<think>\nHm.\n{CALLS[parser]}", f"<think>\nHm.</think>{RAMBLING}"]
            )
            special = HARMONY if parser == "openai" else ("<|role_sep|>",)
            scripted_model.write_scripted_model(folder, smollm2_gguf, scripts, special_tokens=special)
            reasoning = {"reasoning_parser": "openai_gptoss" if parser == "openai" else "qwen3"}
            made[parser] = LLM(
                str(folder), tool_call_parser=parser, max_model_len=1024, gpu_memory_utilization=0.2,
                served_model_name="scripted", **reasoning,
            )  # fmt: skip
        return made[parser]

    yield make
    for llm in made.values():
        llm.close()


@pytest.fixture(scope="module")
def llm(make_llm: Callable[..., LLM]) -> LLM:
    return make_llm("hermes")


@pytest.fixture(scope="module")
def server(llm: LLM) -> Iterator[ServerHandle]:
    handle = llm.serve(api_key=KEY)
    yield handle
    handle.stop()


def body(script: int = 0, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Hi <|script_{script}|>"}]
    return {"messages": messages, "temperature": 0, "max_tokens": 200, **fields}


def ask(http: httpx.Client, script: int = 0, **fields: Any) -> dict[str, Any]:
    """The choice of a chat."""
    choice: dict[str, Any] = strict.chat(http.post(CHAT, json=body(script, **fields)).json())["choices"][0]
    return choice


def calls_of(choice: dict[str, Any]) -> list[tuple[str, Any]]:
    calls = choice["message"].get("tool_calls") or []
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": FORMAT},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
    ],
    ids=["response_format", "structured_outputs", "text"],
)
def test_a_model_that_would_go_on_inventing_ends_with_the_declared_properties(
    http: httpx.Client, fields: dict[str, Any]
) -> None:
    choice = ask(http, **fields)
    assert json.loads(choice["message"]["content"]) == {"name": "Ann", "age": 30}
    assert choice["finish_reason"] == "stop"


def test_an_object_that_is_said_to_be_open_is_open(http: httpx.Client) -> None:
    for fields in ({"response_format": OPEN_FORMAT}, {"response_format": {"type": "json_object"}}):
        assert json.loads(ask(http, **fields)["message"]["content"]) == json.loads(RAMBLING)


def test_a_schema_of_a_chat_in_python_is_closed_too(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=200, structured_outputs={"json": SCHEMA})
    assert json.loads(llm.chat(body()["messages"], params)[0].outputs[0].text) == {"name": "Ann", "age": 30}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
@pytest.mark.parametrize("strict_tool", [None, True, False])
def test_arguments_are_closed_unless_the_tool_is_not_strict(
    make_llm: Callable[..., LLM], choice: Any, strict_tool: bool | None
) -> None:
    with served(make_llm("qwen3_coder")) as http:  # vLLM's form: the arguments alone, or a list
        said = {} if strict_tool is None else {"strict": strict_tool}
        tool = function("add", SCHEMA["properties"], **said)
        found = dict(calls_of(ask(http, tools=[tool], tool_choice=choice)))["add"]
    assert set(found) == {"name", "age"} or (strict_tool is False and {"name", "age"} < set(found))
    if choice != "required":
        assert ("gender" in found) == (strict_tool is False)


ITEM = {"item": {"$ref": "#/$defs/Item"}}


def an_item(properties: dict[str, Any]) -> dict[str, Any]:
    return {"$defs": {"Item": {"type": "object", "properties": properties, "required": list(properties)}}}


TOOLS_OF_ONE_NAME = [
    function("add_user", ITEM, beside=an_item({"user": {"type": "string"}})),
    function("add_price", ITEM, beside=an_item({"price": {"const": -2}})),
    function("nest", {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}),
    function("repeat", {"a": {"type": "boolean"}, "b": {"$ref": "#/properties/a"}}),
    function(
        "known",
        {"x": {"$ref": "#/definitions/X"}},
        beside={"$id": "http://localhost/t", "definitions": {"X": {"const": 5}}, "$defs": None},
    ),
    function("values", {"properties": {"const": {"properties": {"q": 1}}}}),
]  # fmt: skip
OF_ONE_NAME = {
    "add_user": lambda found: isinstance(found["item"].pop("user"), str) and found == {"item": {}},
    "add_price": lambda found: found == {"item": {"price": -2}},
    "nest": lambda found: set(found) == {"next"} and (found["next"] is None or set(found["next"]) == {"next"}),
    "repeat": lambda found: isinstance(found["a"], bool) and isinstance(found["b"], bool),
    "known": lambda found: found == {"x": 5},
    "values": lambda found: found == {"properties": {"properties": {"q": 1}}},
}


@pytest.mark.parametrize("name", OF_ONE_NAME)
@pytest.mark.parametrize("parser", ["hermes", "qwen3_coder"])
def test_each_tools_references_mean_its_own_schema(make_llm: Callable[..., LLM], parser: str, name: str) -> None:
    others = [{**tool, "function": {**tool["function"]}} for tool in TOOLS_OF_ONE_NAME]
    with served(make_llm(parser)) as http:
        named = {"type": "function", "function": {"name": name}}
        assert OF_ONE_NAME[name](calls_of(ask(http, 2, tools=others, tool_choice=named))[0][1])
        first = [tool for tool in others if tool["function"]["name"] == name]
        rest = [tool for tool in others if tool["function"]["name"] != name]
        for tools in ([*first, *rest], [*rest, *first]):
            for called, arguments in calls_of(ask(http, 2, tools=tools, tool_choice="required")):
                assert OF_ONE_NAME[called](arguments), (called, arguments)


@pytest.mark.parametrize("parser", ["hermes", "qwen3_coder"])
def test_a_schema_that_is_refused_names_the_tool_and_the_keyword(make_llm: Callable[..., LLM], parser: str) -> None:
    bad = function("odd_one", {"a": {"not": {"type": "string"}}})
    with served(make_llm(parser)) as http:
        answer = http.post(CHAT, json=body(tools=[LOOK_UP, bad], tool_choice="required"))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "tools")
    assert "'odd_one'" in error["message"]
    assert '"not"' in error["message"]


@pytest.mark.parametrize("parser", CALLS)
def test_the_model_may_call_or_answer_in_the_format(make_llm: Callable[..., LLM], parser: str) -> None:
    with served(make_llm(parser)) as http:
        for fields in ({"response_format": FORMAT}, {"structured_outputs": {"json": SCHEMA}}):
            for choice in ({}, {"tool_choice": "auto"}):
                called = ask(http, 1, tools=[LOOK_UP], **choice, **fields)
                assert calls_of(called) == [("look_up", {"word": "x"})], called
                assert called["finish_reason"] == "tool_calls"
                answered = ask(http, 0, tools=[LOOK_UP], **choice, **fields)
                assert json.loads(answered["message"]["content"]) == {"name": "Ann", "age": 30}
                assert not answered["message"].get("tool_calls")
        suppressed = ask(http, 1, tools=[LOOK_UP], tool_choice="none", response_format=FORMAT)
        assert not suppressed["message"].get("tool_calls")


@pytest.mark.parametrize("parser", ["hermes", "qwen3_coder"])
def test_a_call_inside_the_thought_is_a_call_under_a_format_too(make_llm: Callable[..., LLM], parser: str) -> None:
    with served(make_llm(parser)) as http:
        called = ask(http, 3, tools=[LOOK_UP], response_format=FORMAT)
        assert calls_of(called) == [("look_up", {"word": "x"})], called
        assert (called["message"]["reasoning"], called["finish_reason"]) == ("Hm.", "tool_calls")
        answered = ask(http, 4, tools=[LOOK_UP], response_format=FORMAT)
        assert answered["message"]["reasoning"] == "Hm."
        assert json.loads(answered["message"]["content"]) == {"name": "Ann", "age": 30}


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("parser", ["hermes", "llama3_json"])
def test_a_model_that_wants_neither_gives_one_of_them(
    make_llm: Callable[..., LLM], parser: str, temperature: float
) -> None:
    tools = [LOOK_UP, function("odd_one", {"a": {"not": {"type": "string"}}})]
    with served(make_llm(parser)) as http:
        for seed in range(3):
            choice = ask(http, 2, tools=tools, response_format=FORMAT, temperature=temperature, seed=seed)
            if not calls_of(choice):
                Person.model_validate_json(choice["message"]["content"])


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look_up"}}])
@pytest.mark.parametrize("parser", ["hermes", "qwen3_coder", "openai"])
def test_a_demanded_call_wins_over_the_format(make_llm: Callable[..., LLM], parser: str, choice: Any) -> None:
    llm = make_llm(parser)
    with served(llm) as http:
        called = calls_of(ask(http, 0, tools=[LOOK_UP], tool_choice=choice, response_format=FORMAT))
    assert called
    assert {name for name, _ in called} == {"look_up"}
    assert "response_format: left out, since tool_choice demands a call" in llm.explain().notes
    with served(llm) as http:
        both = http.post(CHAT, json=body(tools=[LOOK_UP], tool_choice=choice, structured_outputs={"json": SCHEMA}))
    assert both.status_code == 400


def test_responses_take_a_format_beside_tools_in_every_turn(server: ServerHandle) -> None:
    tool: Any = {"type": "function", "strict": True, **LOOK_UP["function"]}
    text: Any = {"format": {"type": "json_schema", "name": "person", "schema": SCHEMA, "strict": True}}
    options: dict[str, Any] = {"base_url": server.base_url, "api_key": KEY, "max_retries": 0}
    with openai.OpenAI(http_client=httpx.Client(trust_env=False, timeout=60), **options) as client:
        asked: dict[str, Any] = {"model": "scripted", "tools": [tool], "text": text, "temperature": 0}
        called = client.responses.create(input="Hi <|script_1|>", **asked)
        assert [item.type for item in called.output] == ["function_call"]
        call_id = called.output[0].call_id  # type: ignore[union-attr]
        result: Any = [{"type": "function_call_output", "call_id": call_id, "output": "found <|script_0|>"}]
        answered = client.responses.create(input=result, previous_response_id=called.id, **asked)
        assert Person.model_validate_json(answered.output_text) == Person(name="Ann", age=30)
        demanded = client.responses.create(input="Hi", tool_choice="required", **asked)
        assert {item.type for item in demanded.output} == {"function_call"}


@pytest.mark.parametrize(
    ("structured", "fits"),
    [
        ({"regex": r"\d{3}"}, lambda text: text.isascii() and text.isdigit() and len(text) == 3),
        ({"regex": r"\b\w+\b"}, lambda text: text.isascii()),
        ({"json": {"type": "string", "pattern": r"^\d{2}\s\w$"}}, str.isascii),
        (
            {"grammar": '?start: word "!"\nword: "a" -> first | /\\d/ -> second'},
            lambda text: text in ("a!", *(f"{digit}!" for digit in range(10))),
        ),
        ({"grammar": 'start: "x" // not ::= GBNF\n'}, lambda text: text == "x"),
        ({"grammar": 'root ::= "<" [a-z] ">"'}, lambda text: text[0] + text[-1] == "<>"),
        ({"choice": ["a\x7f", "\x01b", "c\n\x85"]}, lambda text: text in ("a\x7f", "\x01b", "c\n\x85")),
    ],
    ids=lambda value: "" if callable(value) else ascii(value)[:40],
)  # fmt: skip
def test_a_pattern_a_grammar_and_a_choice_mean_what_they_do_in_vllm(
    http: httpx.Client, structured: dict[str, Any], fits: Callable[[str], bool]
) -> None:
    for seed in range(4):
        choice = ask(http, 2, structured_outputs=structured, temperature=1, seed=seed, max_tokens=60)
        text = choice["message"]["content"]
        if choice["finish_reason"] == "stop":
            assert fits(json.loads(text) if "json" in structured else text), text


def test_what_a_grammar_does_not_enforce_is_explained(llm: LLM) -> None:
    class Bag(BaseModel):
        numbers: set[Literal[1, 2]]

    with served(llm) as http:
        choice = ask(
            http, 2, response_format={"type": "json_schema", "json_schema": {"schema": Bag.model_json_schema()}}
        )
        Bag.model_validate_json(choice["message"]["content"])
        assert llm.explain().notes == ("uniqueItems: not enforced, the grammar cannot say it",)
        tool = function("put", Bag.model_json_schema()["properties"])
        ask(http, 2, tools=[tool], tool_choice="required")
        assert llm.explain().notes == (
            "uniqueItems in the parameters of 'put': not enforced, the grammar cannot say it",
        )


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"allowed_token_ids": [27], "bad_words": ["+"]}, "bad_words"),
        ({"allowed_token_ids": [2], "min_tokens": 3}, "min_tokens"),
        ({"allowed_token_ids": [2, 27], "min_tokens": 3, "bad_words": ["+"]}, "bad_words and min_tokens"),
    ],
    ids=["bad words", "end tokens", "both"],
)
def test_tokens_that_are_allowed_and_all_forbidden_are_the_requests_error(
    llm: LLM, http: httpx.Client, fields: dict[str, Any], named: str
) -> None:
    assert llm.tokenize("+") == [27]
    answer = http.post(CHAT, json=body(**fields))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "allowed_token_ids")
    assert f"no token is left, {named} forbid all of" in error["message"]


def test_allowed_tokens_that_run_out_on_the_way_end_their_own_request_only(llm: LLM, http: httpx.Client) -> None:
    hello = llm.tokenize("Hello")
    assert llm.tokenize("HelloHello") == hello * 2
    fields = {"allowed_token_ids": hello, "bad_words": ["HelloHello"], "ignore_eos": True}
    beside = llm.submit_prompt("word " * 30 + scripted_model.SUFFIX, SamplingParams(temperature=0, max_tokens=40))
    answer = http.post(CHAT, json=body(**fields))
    assert answer.status_code == 500
    assert "no token is left of allowed_token_ids" in answer.json()["error"]["message"]
    assert beside.result().outputs[0].text.startswith('{"name": "Ann"')


@pytest.mark.parametrize("bias", [float("inf"), float("nan")])
def test_a_bias_that_is_no_number_is_refused(llm: LLM, bias: float) -> None:
    with pytest.raises(RequestError, match="logit_bias of token 5 must be a number"):
        llm.submit_prompt("a" + scripted_model.SUFFIX, SamplingParams(logit_bias={5: bias}))


def test_a_bias_that_forbids_all_allowed_tokens_is_told(llm: LLM) -> None:
    params = SamplingParams(logit_bias={5: -float("inf")}, allowed_token_ids=[5])
    with pytest.raises(RequestError, match=r"no token is left, logit_bias forbid all of \[5\]"):
        llm.submit_prompt("a" + scripted_model.SUFFIX, params)


@pytest.fixture(scope="module")
def short_llm(tiny_model_dir: Callable[..., Path]) -> Iterator[LLM]:
    """A model with fewer rows than its tokenizer has tokens."""
    folder = tiny_model_dir("llama", vocab_size=tiny_models.VOCAB_SIZE - 37)
    with LLM(str(folder), max_model_len=512, gpu_memory_utilization=0.2, tool_call_parser="hermes") as made:
        yield made


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_tokenizer_with_more_tokens_than_the_model_has_rows_takes_grammars(
    short_llm: LLM, temperature: float
) -> None:
    assert short_llm.tokenizer.vocab_size == tiny_models.VOCAB_SIZE
    with served(short_llm) as http:
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "temperature": temperature, "seed": 1}
        answered = http.post(CHAT, json={**asked, "structured_outputs": {"choice": ["yes", "no"]}}).json()
        assert answered["choices"][0]["message"]["content"] in ("yes", "no")
        tools = [function("pick", {"one": {"enum": [1, 2]}})]
        called = http.post(
            CHAT, json={**asked, "tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
        )
        assert calls_of(called.json()["choices"][0])[0][1]["one"] in (1, 2)


def test_a_tokenizer_that_no_grammar_can_be_read_with_is_told_at_load_and_refused_by_request(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(tiny_model_dir("llama"), folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.save(str(folder / "tokenizer.json"))
    with LLM(str(folder), max_model_len=512, gpu_memory_utilization=0.2) as llm:
        line = next(note for note in llm.notes if note.startswith("structured output and demanded calls: none"))
        assert line in caplog.text
        with served(llm) as http:
            for fields in (
                {"response_format": {"type": "json_object"}},
                {"tools": [LOOK_UP], "tool_choice": "required"},
            ):
                asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
                answer = http.post(CHAT, json={**asked, **fields})
                assert answer.status_code == 400
                assert "tokenizer cannot be read for grammars" in answer.json()["error"]["message"]
                assert http.post(CHAT, json=asked).status_code == 200
