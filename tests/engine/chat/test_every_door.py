"""The same conversation through every door is one request: one prompt, one set of values, one account of them.

Doors: ``LLM.chat``, ``LLM.map``, ``%%chat``, chat completions, Responses and Messages, each driven as its users do, up
to ``LLM.submit``, which is caught here.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import httpx
import pandas
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import LLM
from engine.chat.reply import read_whole
from engine.chat.request import ChatPreparer, PreparedRequest
from engine.errors import RequestError
from engine.openai.app import create_app
from engine.openai.http.options import ServerOptions
from engine.outputs import CompletionDelta
from engine.params.structured_outputs import Constraints
from engine.runtime.stream import RequestStream
from engine.text.parse.parser_choice import ParserChoice
from engine.text.template.chat_template import ChatTemplate
from tests.conftest import TinyModelDir
from tests.engine.text.template.template_packages import TemplatePackage, template_source
from tests.engine.text.template.test_template_round_trips import TEMPLATES, Template
from vm_magic.chat.generation import ChatOptions, ask
from vm_magic.state.conversation import Conversation
from vm_magic.state.session import Session

TEXTS = st.sampled_from(
    ["Hi", "What is 2+2?", "größer\n\n```py\nx\n```", "<think>no</think>", "a {b} $c ' \"", "1 < 2"]
)
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"parameters": PARAMETERS, "name": "weather", "description": "Tells it."}},
    {"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}},
]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
SAMPLE = "<think>\nHm.\n</think>\n\nWell."


@dataclass(frozen=True)
class Asked:
    """What a user wants, whatever the door."""

    turns: list[tuple[str, str]]
    text: str
    system: str | None
    system_role: str
    tools: list[dict[str, Any]]
    tool_choice: Any
    schema: Mapping[str, Any] | None
    budget: int | None
    think: bool | None
    effort: str | None
    values: dict[str, Any]

    @property
    def history(self) -> list[dict[str, Any]]:
        """All but the system message."""
        pairs = [({"role": "user", "content": q}, {"role": "assistant", "content": a}) for q, a in self.turns]
        return [*(message for pair in pairs for message in pair), {"role": "user", "content": self.text}]

    def messages(self, role: str = "system") -> list[dict[str, Any]]:
        """OpenAI's form."""
        return [*([{"role": role, "content": self.system}] if self.system else []), *self.history]


@st.composite
def requests(draw: st.DrawFn) -> Asked:
    """Conversations, and what may be asked of them together; half of them are what ``LLM.map`` can say too."""
    single = draw(st.booleans())
    tools = [] if single else draw(st.sampled_from([[], [], TOOLS[:1], TOOLS]))
    named = {"type": "function", "function": {"name": "weather"}}
    choice = draw(st.sampled_from([None, "auto", "none", "required", named])) if tools else None
    demanded = choice not in (None, "auto", "none")
    values = {
        "temperature": st.sampled_from([0.0, 0.7]),
        "top_p": st.sampled_from([0.9]),
        "top_k": st.sampled_from([5]),
        "seed": st.integers(0, 9),
    }
    return Asked(
        [] if single else draw(st.lists(st.tuples(TEXTS, TEXTS), max_size=2)),
        draw(TEXTS),
        draw(st.none() | TEXTS),
        draw(st.sampled_from(["system", "developer"])),
        tools,
        choice,
        None if demanded else draw(st.sampled_from([None, None, SCHEMA])),
        None if single else draw(st.sampled_from([None, None, 0, 7])),
        draw(st.sampled_from([None, True, False])),
        None if single else draw(st.sampled_from([None, None, "low", "none"])),
        {"max_tokens": 9, **draw(st.fixed_dictionaries({}, optional=values))},
    )


@pytest.fixture(scope="module")
def model(tiny_model_dir: TinyModelDir) -> Iterator[LLM]:
    with LLM(str(tiny_model_dir("llama")), max_model_len=256, gpu_memory_utilization=0.2) as llm:
        yield llm


class Caught:
    """``llm`` with a template, its requests kept instead of run."""

    def __init__(self, llm: LLM, source: str) -> None:
        self.llm = llm
        self.requests: list[PreparedRequest] = []
        template = ChatTemplate(source, default_kwargs={"b": 1})
        parsers = ParserChoice.of_model(llm.args, template, llm.tokenizer)
        llm.preparer = ChatPreparer(llm.tokenizer, template, parsers, llm.settings)
        llm.submit = self._submit  # type: ignore[method-assign, assignment]

    def _submit(self, request: PreparedRequest, **_: Any) -> RequestStream:
        self.requests.append(request)
        stream = RequestStream("caught", request.prompt, request.token_ids, request.params, lambda: None)
        stream.put(CompletionDelta(0, "", [], finish_reason="stop"))
        stream.end()
        return stream

    def through(self, door: "Door", asked: Asked) -> PreparedRequest | str:
        """What reaches the engine, or the error's text."""
        self.requests.clear()
        try:
            door(self.llm, asked)
        except RequestError as error:
            return str(error)
        (request,) = self.requests
        return request


Door = Callable[[LLM, Asked], None]


def kwargs_of(llm: LLM, asked: Asked) -> dict[str, Any]:
    """The template's variables as ``%%chat`` names them, for the doors that take names."""
    switches = {"enable_thinking", "thinking"} & llm.template_variables
    return {} if asked.think is None else dict.fromkeys(sorted(switches), asked.think)


def python(llm: LLM, asked: Asked) -> None:
    """``LLM.chat``."""
    values = {**asked.values, "thinking_token_budget": asked.budget}
    if asked.schema:
        values["structured_outputs"] = {"json": asked.schema}
    params = llm.sampling_params(**asked.values).replace(
        **{name: value for name, value in values.items() if name not in asked.values and value is not None}
    )
    llm.chat(
        asked.messages(asked.system_role),
        params,
        tools=asked.tools or None,
        tool_choice=asked.tool_choice,
        chat_template_kwargs=kwargs_of(llm, asked),
        reasoning_effort=asked.effort,
    )


def table(llm: LLM, asked: Asked) -> None:
    """``LLM.map``: one row."""
    rows = pandas.DataFrame({"text": [asked.text]})
    system = {} if asked.system is None else {"system": asked.system}
    frame = llm.map(
        rows,
        "{{ text }}",
        schema=asked.schema,
        chat_template_kwargs=kwargs_of(llm, asked),
        use_tqdm=False,
        **asked.values,
        **system,
    )
    if frame["error"][0]:
        raise RequestError(frame["error"][0])


def cell(llm: LLM, asked: Asked) -> None:
    """``%%chat``, behind its flags."""
    session = Session()
    session.llm = llm
    options = ChatOptions(
        sampling=asked.values,
        think=asked.think if kwargs_of(llm, asked) else None,
        thinking_token_budget=asked.budget,
        schema=asked.schema,
        tools=tuple(SimpleNamespace(schema=tool) for tool in asked.tools),  # type: ignore[arg-type]
        tool_choice=asked.tool_choice,
    )
    ask(session, asked.messages(), Conversation("test"), options)


def post(llm: LLM, path: str, body: dict[str, Any]) -> None:
    """One request to the port, without a socket."""

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(llm, ServerOptions(allowed_hosts=("test",))))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(path, json=body)

    response = asyncio.run(send())
    if response.status_code != 200:
        raise RequestError(str(response.json()["error"]["message"]))


def common(llm: LLM, asked: Asked) -> dict[str, Any]:
    """Fields that have one name in the port's three formats."""
    shared: dict[str, Any] = {name: value for name, value in asked.values.items() if name != "max_tokens"}
    optional = {"thinking_token_budget": asked.budget, "chat_template_kwargs": kwargs_of(llm, asked) or None}
    return shared | {name: value for name, value in optional.items() if value is not None}


def completions(llm: LLM, asked: Asked) -> None:
    """``/v1/chat/completions``."""
    body = {**common(llm, asked), "messages": asked.messages(asked.system_role), "max_tokens": 9}
    if asked.tools:
        body |= {"tools": asked.tools, "tool_choice": asked.tool_choice}
    if asked.schema:
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": asked.schema}}
    if asked.effort:
        body["reasoning_effort"] = asked.effort
    post(llm, "/v1/chat/completions", body)


def responses(llm: LLM, asked: Asked) -> None:
    """``/v1/responses``: the system message as ``instructions``."""
    body = {**common(llm, asked), "input": asked.history, "max_output_tokens": 9, "store": False}
    if asked.system:
        body["instructions"] = asked.system
    if asked.tools:
        body["tools"] = [{"type": "function", **tool["function"]} for tool in asked.tools]
        named = isinstance(asked.tool_choice, dict)
        body["tool_choice"] = {"type": "function", "name": "weather"} if named else asked.tool_choice or "auto"
    if asked.schema:
        body["text"] = {"format": {"type": "json_schema", "name": "x", "schema": asked.schema}}
    if asked.effort:
        body["reasoning"] = {"effort": asked.effort}
    post(llm, "/v1/responses", body)


def messages(llm: LLM, asked: Asked) -> None:
    """``/v1/messages``."""
    body = {**common(llm, asked), "messages": asked.history, "max_tokens": 9}
    if asked.system:
        body["system"] = asked.system
    if asked.tools:
        functions = [tool["function"] for tool in asked.tools]
        body["tools"] = [
            {"input_schema" if name == "parameters" else name: value for name, value in function.items()}
            for function in functions
        ]
        kinds = {None: "auto", "auto": "auto", "none": "none", "required": "any"}
        named = isinstance(asked.tool_choice, dict)
        choice = {"type": "tool", "name": "weather"} if named else {"type": kinds[asked.tool_choice]}
        body["tool_choice"] = choice
    output: dict[str, Any] = {}
    if asked.schema:
        output["format"] = {"type": "json_schema", "schema": asked.schema}
    if asked.effort:
        output["effort"] = asked.effort
    if output:
        body["output_config"] = output
    post(llm, "/v1/messages", body)


def doors_for(asked: Asked, llm: LLM) -> dict[str, Door]:
    """The doors that can say ``asked``: in a cell tools are refused where the template does not show them."""
    doors = {"LLM.chat": python, "chat completions": completions, "Responses": responses, "Messages": messages}
    if asked.effort is None and (llm.takes_tools or not asked.tools):  # an effort is a variable of the template there
        doors["%%chat"] = cell
        if not asked.turns and not asked.tools and asked.budget is None:
            doors["LLM.map"] = table
    return doors


def told(request: PreparedRequest) -> dict[str, Any]:
    """What may not depend on the door."""
    params, given = request.params, {}
    for _, values in request.account.template or ():
        given |= values
    parser = request.new_parser()
    reply = read_whole(parser, SAMPLE, "stop")
    constraints = request.constraints or Constraints()
    return {
        "prompt": request.prompt,
        "token_ids": request.token_ids,
        "values": {
            name: getattr(params, name)
            for name in ("temperature", "top_p", "top_k", "seed", "max_tokens", "skip_special_tokens", "n", "stop")
        },
        "grammar": constraints.structured,
        "budget": constraints.thinking,
        "template": given,
        "layers": [name for name, _ in request.account.template or ()][:2],
        "parsed": (reply.text, reply.reasoning, reply.finish_reason),
        "special": parser.needs_special_tokens if parser else None,
    }


@pytest.mark.parametrize("template", TEMPLATES, ids=str)
def test_a_conversation_is_one_request_through_every_door(model: LLM, template: Template) -> None:
    package: TemplatePackage = template.package
    caught = Caught(model, template_source(package, template.name))

    @settings(max_examples=16, deadline=None, suppress_health_check=list(HealthCheck))
    @given(requests())
    def through_every_door(asked: Asked) -> None:
        found = {name: caught.through(door, asked) for name, door in doors_for(asked, model).items()}
        first = found["LLM.chat"]
        for name, request in found.items():
            if isinstance(first, PreparedRequest):
                assert isinstance(request, PreparedRequest), f"{name}: {request}"
                assert told(request) == told(first), name
            else:
                assert isinstance(request, str), f"{name} takes what LLM.chat refuses: {first}"

    through_every_door()
