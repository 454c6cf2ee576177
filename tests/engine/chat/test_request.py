"""What a request becomes before it is submitted: prompt, values, constraints, and what is told of them."""

from typing import Any

import pytest

from engine.chat.request import (
    ChatPreparer,
    ChatRequest,
    PreparedRequest,
    PromptRequest,
    TemplateOptions,
    Truncation,
)
from engine.errors import RequestError
from engine.params.sampling_params import SamplingParams
from engine.params.settings import Settings
from engine.params.structured_outputs import StructuredOutput, ThinkingBudget
from engine.text.parse.parser_choice import ParserChoice
from engine.text.template.chat_template import ChatTemplate
from tests.engine.openai.fakes import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{{ enable_thinking }}{{ reasoning_effort }}{{ extra }}{{ tools | tojson if tools }}"
)
HELLO = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
PARAMS = SamplingParams(max_tokens=8)


def preparer(special: frozenset[str] = frozenset(), settings: Settings | None = None) -> ChatPreparer:
    template = ChatTemplate(TEMPLATE, default_kwargs={"extra": "!"})
    return ChatPreparer(
        byte_tokenizer(), template, ParserChoice("qwen3", "hermes", None, special), settings or Settings()
    )


def prepare(max_model_len: int = 512, made: ChatPreparer | None = None, **asked: Any) -> PreparedRequest:
    request = ChatRequest(**{"messages": HELLO, "sampling": PARAMS, **asked})
    return (made or preparer()).prepare(request, max_model_len)


def test_a_developers_message_is_the_systems() -> None:
    prepared = prepare()
    assert prepared.prompt == "[system]Be brief.[user]Hi!"
    assert prepared.token_ids == byte_tokenizer().encode(str(prepared.prompt), False)


def test_the_templates_variables_come_in_layers_and_are_remembered_with_their_source() -> None:
    settings = Settings()
    settings.update(enable_thinking=False)
    made = preparer(settings=settings)
    options = TemplateOptions(kwargs={"extra": "?"}, reasoning_effort="low")
    prepared = prepare(made=made, template=options, source="flag")
    assert prepared.prompt == "[system]Be brief.[user]HiTruelow?"
    assert prepared.account.template == (
        ("--default-chat-template-kwargs", {"extra": "!"}),
        ("set", {"enable_thinking": False}),
        ("flag", {"extra": "?", "reasoning_effort": "low", "enable_thinking": True}),
    )


def test_an_effort_does_not_overrule_the_switch_that_a_request_gave() -> None:
    options = TemplateOptions(kwargs={"enable_thinking": True}, reasoning_effort="none")
    assert options.variables() == {"enable_thinking": True, "reasoning_effort": "none"}


def test_special_tokens_are_shown_where_the_parser_reads_them_and_the_source_says_why() -> None:
    assert prepare().params is PARAMS
    params = prepare(made=preparer(frozenset(["<think>", "</think>"]))).params
    assert not params.skip_special_tokens
    assert params.sources["skip_special_tokens"] == "the output's parser"


def test_each_completion_gets_a_parser_of_its_own_and_a_raw_prompt_none() -> None:
    prepared = prepare()
    one, other = prepared.new_parser(), prepared.new_parser()
    assert one is not None
    assert other is not None
    assert one is not other
    one.feed("<think>\nHm.</think>\n\nWell.")
    assert other.feed("<think>\nMm.</think>\n\nSo.").content == "So."
    raw = preparer().prepare(PromptRequest(prompt="<think>", sampling=PARAMS), 512)
    assert (raw.prompt, raw.new_parser(), raw.account.template) == ("<think>", None, None)


def test_a_cut_prompt_has_no_text_and_keeps_the_end_that_was_asked_for() -> None:
    whole = prepare().token_ids
    left, right = (prepare(truncation=Truncation(5, side)) for side in ("left", "right"))
    assert (left.prompt, left.token_ids) == (None, whole[-5:])
    assert right.token_ids == whole[:5]
    assert prepare(max_model_len=20, truncation=Truncation(-1)).token_ids == whole[-12:]
    with pytest.raises(RequestError, match=r"truncate_prompt_tokens value \(99\) is greater than max_model_len"):
        prepare(max_model_len=20, truncation=Truncation(99))


def test_what_values_and_request_ask_of_the_output_is_taken_together() -> None:
    sampling = PARAMS.replace(thinking_token_budget=3)
    constraints = prepare(sampling=sampling, structured_outputs=StructuredOutput(regex="a")).constraints
    assert constraints is not None
    assert (constraints.thinking, constraints.structured) == (ThinkingBudget(3), StructuredOutput(regex="a"))
    with pytest.raises(RequestError, match="thinking_token_budget was given twice"):
        prepare(sampling=sampling, thinking_token_budget=4)


def test_tools_can_be_kept_out_of_the_prompt_and_stand_in_one_order() -> None:
    tool = {"function": {"parameters": {}, "strict": True, "name": "f"}, "type": "function"}
    shown = str(prepare(tools=[tool]).prompt)
    assert shown.endswith('[{"type": "function", "function": {"name": "f", "parameters": {}, "strict": true}}]')
    hidden = prepare(tools=[tool], template=TemplateOptions(shown_tools=()))
    assert hidden.prompt == "[system]Be brief.[user]Hi!"


def test_token_ids_are_taken_as_they_are() -> None:
    prepared = preparer().prepare(PromptRequest(prompt=[5, 6], sampling=PARAMS), 512)
    assert (prepared.prompt, prepared.token_ids) == (None, [5, 6])
