"""Histories through the port, before templates that want or refuse something: the prompt that the model gets."""

import json
from typing import Any

import httpx
import pytest

from engine.text.template.chat_template import ChatTemplate
from tests.engine.openai import strict
from tests.engine.openai.conftest import Serve, http_client
from tests.engine.openai.fakes import FakeLLM
from tests.engine.text.template.template_packages import TRL, template_source

TURN = "<|start|>{{ m.role }}:{{ m.content }}"
STRICT = (  # as Qwen 3.5's and 3.6's
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}" + TURN + "{% endfor %}"
)
SILENT = "{% for m in messages %}{% if m.role != 'system' or loop.first %}" + TURN + "{% endif %}{% endfor %}"
NO_SYSTEM = STRICT.replace(" and not loop.first", "").replace("must be at the beginning", "is not supported")
OPEN = "{% for m in messages %}" + TURN + "{% endfor %}"
PRINTS_TEXT = (  # as DeepSeek V3's: the arguments are concatenated
    "{% for m in messages %}{% if m.tool_calls %}<|start|>assistant:{{ m.content }}"
    "{% for c in m.tool_calls %}[{{ c.function.name + ' ' + c.function.arguments }}]{% endfor %}"
    "{% else %}" + TURN + "{% endif %}{% endfor %}"
)
WANTS_NONE = (  # as DeepSeek R1's distills: calls are seen only where content is none
    "{% for m in messages %}{% if m.role == 'assistant' and m.content is none %}<|start|>assistant:"
    "{% for c in m.tool_calls %}[{{ c.function.name + ' ' + c.function.arguments }}]{% endfor %}"
    "{% else %}" + TURN + "{% endif %}{% endfor %}"
)
LOOPS = (  # as Qwen 3.5's: one line for each argument
    "{% for m in messages %}" + TURN + "{% for c in m.tool_calls or [] %}[{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %} {{ k }}={{ v | tojson }}{% endfor %}]{% endfor %}{% endfor %}"
)
THINKS = (  # as gpt-oss's: a thought beside a text and a call is refused
    "{% for m in messages %}{% if m.tool_calls and m.content and m.thinking %}{{ raise_exception('both') }}{% endif %}"
    "{{ '(' + m.thinking + ')' if m.thinking }}" + TURN + "{{ m.tool_calls and m.tool_calls[0].function.arguments }}"
    "{% endfor %}"
)
ARGUMENTS = {"city": "Oslo", "days": [1, 2]}
AS_JSON = '[weather {"city": "Oslo", "days": [1, 2]}]'


def prompt_of(llm: FakeLLM) -> str:
    return llm.submitted[-1].prompt or ""


def post(http: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    response = http.post(path, json={"max_tokens": 8, **body} if path != "/v1/responses" else body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def ask_about_weather(http: httpx.Client, route: str, thought: str | None = None, text: str | None = None) -> None:
    """The second round of a conversation with a call, as a client of ``route`` sends it."""
    written = json.dumps(ARGUMENTS)
    if route == "/v1/messages":
        blocks: list[dict[str, Any]] = [{"type": "thinking", "thinking": thought, "signature": ""}] if thought else []
        blocks += [{"type": "text", "text": text}] if text else []
        blocks += [{"type": "tool_use", "id": "call_1", "name": "weather", "input": ARGUMENTS}]
        result = {"type": "tool_result", "tool_use_id": "call_1", "content": "rain"}
        answer, back = {"role": "assistant", "content": blocks}, {"role": "user", "content": [result]}
        post(http, route, messages=[{"role": "user", "content": "Hi"}, answer, back])
    elif route == "/v1/responses":
        items: list[dict[str, Any]] = []
        if thought:
            items.append({"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": thought}]})
        if text:
            items.append({"role": "assistant", "content": text})
        items.append({"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": written})
        items.append({"type": "function_call_output", "call_id": "call_1", "output": "rain"})
        post(http, route, input=[{"role": "user", "content": "Hi"}, *items])
    else:
        call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": written}}
        message = {"role": "assistant", "content": text, "tool_calls": [call]}
        message |= {"reasoning": thought} if thought else {}
        back = {"role": "tool", "tool_call_id": "call_1", "content": "rain"}
        post(http, route, messages=[{"role": "user", "content": "Hi"}, message, back])


ROUTES = ["/v1/chat/completions", "/v1/messages", "/v1/responses"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("template", "shown"),
    [(PRINTS_TEXT, AS_JSON), (WANTS_NONE, AS_JSON), (LOOPS, '[weather city="Oslo" days=[1, 2]]')],
    ids=["text", "none", "object"],
)
def test_a_call_in_the_history_is_shown_by_every_kind_of_template(
    http: httpx.Client, llm: FakeLLM, route: str, template: str, shown: str
) -> None:
    llm.chat_template = ChatTemplate(template)
    ask_about_weather(http, route)
    assert prompt_of(llm) == f"<|start|>user:Hi<|start|>assistant:{shown}<|start|>tool:rain"


def test_arguments_that_a_template_prints_are_the_text_that_was_sent(http: httpx.Client, llm: FakeLLM) -> None:
    llm.chat_template = ChatTemplate(PRINTS_TEXT)
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Zürich"}'}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    post(http, "/v1/chat/completions", messages=[{"role": "user", "content": "Hi"}, message])
    assert '[weather {"city":"Zürich"}]' in prompt_of(llm)


@pytest.mark.parametrize("written", ['{"city": "Os', '"Oslo"', "[1]"])
def test_broken_arguments_are_printed_as_the_model_wrote_them(http: httpx.Client, llm: FakeLLM, written: str) -> None:
    llm.chat_template = ChatTemplate(PRINTS_TEXT)
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": written}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    post(http, "/v1/chat/completions", messages=[{"role": "user", "content": "Hi"}, message])
    assert f"[weather {written}]" in prompt_of(llm)


@pytest.mark.parametrize("route", ROUTES)
def test_a_thought_goes_to_templates_that_call_it_thinking(http: httpx.Client, llm: FakeLLM, route: str) -> None:
    llm.chat_template = ChatTemplate(THINKS)
    ask_about_weather(http, route, thought="Hm.")
    assert "(Hm.)<|start|>assistant:" in prompt_of(llm)
    ask_about_weather(http, route, thought="Hm.", text="I look.")  # what the template would refuse
    assert "<|start|>assistant:I look." in prompt_of(llm)
    assert "Hm." not in prompt_of(llm)


def test_special_tokens_are_variables_and_absent_ones_are_undefined(http: httpx.Client, llm: FakeLLM) -> None:
    source = "{{ bos_token }}{{ pad_token }}{{ image_token }}{{ 'none' if eos_token is not defined }}"
    llm.chat_template = ChatTemplate(source, special_tokens={"bos_token": "B", "pad_token": "P", "image_token": "I"})
    post(http, "/v1/chat/completions", messages=[{"role": "user", "content": "Hi"}])
    assert prompt_of(llm) == "BPInone"


def as_messages(turns: list[tuple[str, str]]) -> dict[str, Any]:
    (_, system), *rest = turns
    return {"system": system, "messages": [{"role": role, "content": text} for role, text in rest]}


def as_input(turns: list[tuple[str, str]]) -> dict[str, Any]:
    roles = {"system": "developer"}
    return {"input": [{"role": roles.get(role, role), "content": text} for role, text in turns]}


FOLDING = [("/v1/messages", as_messages), ("/v1/responses", as_input)]
EARLY = [("system", "Be kind."), ("user", "Hi"), ("system", "It is May."), ("assistant", "Hello."), ("user", "Go on")]
LATE = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Go on"), ("system", "Be brief.")]
BETWEEN = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello."), ("system", "Be brief."), ("user", "Go on")]
TWO = [("system", "Be kind."), ("system", "It is May."), ("user", "Hi")]
REMINDER = "<system-reminder>\nBe brief.\n</system-reminder>"


@pytest.mark.parametrize(("route", "body_of"), FOLDING)
@pytest.mark.parametrize("template", [STRICT, SILENT], ids=["strict", "silent"])
@pytest.mark.parametrize(
    ("turns", "folded"),
    [
        (EARLY, [("system", "Be kind.\n\nIt is May."), *EARLY[1:2], *EARLY[3:]]),
        (LATE, [*LATE[:3], ("user", f"Go on\n\n{REMINDER}")]),
        (BETWEEN, [*BETWEEN[:3], ("user", f"{REMINDER}\n\nGo on")]),
        (BETWEEN[:4], [*BETWEEN[:3], ("user", REMINDER)]),
        (TWO, [("system", "Be kind.\n\nIt is May."), ("user", "Hi")]),
    ],
)
def test_system_messages_that_a_template_refuses_or_drops_are_folded(
    http: httpx.Client, llm: FakeLLM, route: str, body_of: Any, template: str, turns: Any, folded: Any
) -> None:
    llm.chat_template = ChatTemplate(template)
    post(http, route, **body_of(turns))
    assert prompt_of(llm) == "".join(f"<|start|>{role}:{text}" for role, text in folded)


@pytest.mark.parametrize(("route", "body_of"), FOLDING)
def test_a_template_that_takes_them_anywhere_gets_them_where_they_are(
    http: httpx.Client, llm: FakeLLM, route: str, body_of: Any
) -> None:
    llm.chat_template = ChatTemplate(OPEN)
    for turns in (EARLY, LATE, BETWEEN):
        post(http, route, **body_of(turns))
        assert prompt_of(llm) == "".join(f"<|start|>{role}:{text}" for role, text in turns)


@pytest.mark.parametrize(("route", "body_of"), FOLDING)
def test_without_any_place_for_it_the_system_text_comes_before_the_users(
    http: httpx.Client, llm: FakeLLM, route: str, body_of: Any
) -> None:
    llm.chat_template = ChatTemplate(NO_SYSTEM)
    post(http, route, **body_of(EARLY))
    assert prompt_of(llm) == "<|start|>user:Be kind.\n\nIt is May.\n\nHi<|start|>assistant:Hello.<|start|>user:Go on"


@pytest.mark.parametrize(("route", "body_of"), FOLDING)
def test_what_was_folded_stays_the_beginning_of_the_next_prompt(
    http: httpx.Client, llm: FakeLLM, route: str, body_of: Any
) -> None:
    """Else the prefix cache would begin anew with every reminder that an agent adds."""
    llm.chat_template = ChatTemplate(STRICT)
    turns = [*EARLY, ("system", "Note 1"), ("assistant", "Yes."), ("user", "And?"), ("system", "Note 2")]
    prompts = []
    for length in (3, 6, 9):
        post(http, route, **body_of(turns[:length]))
        prompts.append(prompt_of(llm))
    assert prompts[1].startswith(prompts[0])
    assert prompts[2].startswith(prompts[1])


def test_a_reminder_behind_a_result_joins_it(http: httpx.Client, llm: FakeLLM) -> None:
    """A turn of the user's own would end the round: templates drop the thoughts of earlier ones."""
    llm.chat_template = ChatTemplate(STRICT)
    use = {"type": "tool_use", "id": "t", "name": "look", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": "a file"}
    reminder = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    first = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": [use]}]
    post(http, "/v1/messages", messages=[*first, {"role": "user", "content": [result]}, reminder])
    assert prompt_of(llm).endswith(f"<|start|>tool:a file\n\n{REMINDER}")


def test_tokens_are_counted_of_the_folded_prompt_and_explain_says_so(http: httpx.Client, llm: FakeLLM) -> None:
    llm.chat_template = ChatTemplate(STRICT)
    counted = http.post("/v1/messages/count_tokens", json=as_messages(EARLY)).json()
    post(http, "/v1/messages", **as_messages(EARLY))
    assert counted == {"input_tokens": len(llm.prepared[-1].token_ids)}
    assert any("a system message" in note for note in llm.prepared[-1].account.notes)
    post(http, "/v1/messages", **as_messages([EARLY[0], EARLY[1]]))
    assert not llm.prepared[-1].account.notes


def test_qwens_template_takes_what_claude_code_sends(http: httpx.Client, llm: FakeLLM) -> None:
    llm.chat_template = ChatTemplate(template_source(TRL, "qwen3_6"))
    post(http, "/v1/messages", **as_messages(EARLY))
    assert prompt_of(llm).startswith(
        "<|im_start|>system\nBe kind.\n\nIt is May.<|im_end|>\n<|im_start|>user\nHi<|im_end|>"
    )


def test_a_template_for_tools_is_asked_with_tools(http: httpx.Client, llm: FakeLLM) -> None:
    """Without them it would fail whatever the messages are."""
    llm.tool_call_parser = "hermes"
    llm.chat_template = ChatTemplate(OPEN, for_tools="{{ tools | map(attribute='type') | list }}" + STRICT)
    tool = {"name": "look", "input_schema": {"type": "object"}}
    post(http, "/v1/messages", **as_messages(EARLY), tools=[tool])
    assert prompt_of(llm).startswith("['function']<|start|>system:Be kind.\n\nIt is May.<|start|>user:Hi")
    post(http, "/v1/messages", **as_messages(EARLY))
    assert "Hi<|start|>system:It is May." in prompt_of(llm)


def test_a_chat_keeps_the_templates_word(http: httpx.Client, llm: FakeLLM) -> None:
    llm.chat_template = ChatTemplate(STRICT)
    messages = [{"role": role, "content": text} for role, text in EARLY]
    refused = http.post("/v1/chat/completions", json={"messages": messages})
    assert strict.error(refused, 400, "BadRequestError", "messages") == "System message must be at the beginning."


def test_a_name_that_no_template_has_is_refused_with_those_that_there_are(serve: Serve, llm: FakeLLM) -> None:
    llm.chat_template = ChatTemplate(OPEN, named={"default": OPEN, "rag": "{{ documents | length }} documents"})
    body = {"messages": [{"role": "user", "content": "Hi"}], "documents": [{"text": "one"}]}
    with http_client(serve(trust_request_chat_template=True)) as http:
        post(http, "/v1/chat/completions", **body, chat_template="rag")
        assert prompt_of(llm) == "1 documents"
        refused = http.post("/v1/chat/completions", json={**body, "chat_template": "rug"})
        message = strict.error(refused, 400, "BadRequestError", "chat_template")
    assert "'rug' is neither Jinja text nor a template of this model; it has: default, rag." in message
