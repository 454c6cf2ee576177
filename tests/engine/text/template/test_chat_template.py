"""Chat templates: what a template sees, what it gives, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest

from engine.errors import ConfigError, RequestError
from engine.params.engine_args import EngineArgs
from engine.text.template.chat_template import ChatTemplate, load_template

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = (
    "{% set loop_messages = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% for m in loop_messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}[{{ part.type }}:{{ part.text }}]{% endfor %}{% endif %}{% endfor %}"
)
PARTS_ONLY = "{% for m in messages %}{% for part in m['content'] %}[{{ part['text'] }}]{% endfor %}{% endfor %}"
USER = [{"role": "user", "content": "Hi"}]


def render(source: str | None, messages: list[dict[str, Any]] = USER, **given: Any) -> str:
    return ChatTemplate(source, special_tokens={"bos_token": "<s>", "eos_token": "</s>"}).render(messages, **given)


def test_a_chat_is_rendered_with_the_generation_prompt() -> None:
    expected = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert render(CHATML) == expected + "<|im_start|>assistant\n"
    assert render(CHATML, add_generation_prompt=False) == expected


def test_blocks_are_trimmed_as_transformers_does() -> None:
    assert (
        render("{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}") == "Hi\n"
    )


def test_tokens_defaults_and_request_variables_reach_the_template() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{{ a }}{{ b }}{{ eos_token }}",
        special_tokens={"bos_token": "<s>"},
        default_kwargs={"a": 1, "b": 2},
    )
    assert template.render(USER) == "<s>12"
    assert template.render(USER, b=3) == "<s>13"


def test_a_request_cannot_replace_the_template_through_its_variables() -> None:
    with pytest.raises(RequestError, match="cannot set 'chat_template'"):
        render(CHATML, chat_template="x")


def test_text_parts_are_joined_for_templates_that_expect_strings() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "input_text", "text": "two"}]
    assert ChatTemplate(CHATML).content_format == "string"
    assert "user\none\ntwo<|im_end|>" in render(CHATML, [{"role": "user", "content": parts}])


def test_parts_stay_parts_for_templates_that_loop_over_them() -> None:
    parts = [{"type": "text", "text": "one"}, "two"]
    assert ChatTemplate(PARTS).content_format == "openai"
    assert render(PARTS, [{"role": "user", "content": parts}]) == "[text:one][text:two]"
    assert render(PARTS) == "Hi"
    assert render(PARTS_ONLY) == "[Hi]"


def test_content_set_to_a_variable_first_is_still_seen_as_parts() -> None:
    source = (
        "{% for m in messages %}{% set c = m.content %}"
        "{% for part in c | list %}{{ part.text }};{% endfor %}{% endfor %}"
    )
    assert ChatTemplate(source).content_format == "openai"


def test_the_contents_format_may_be_said_instead_of_told_from_the_template() -> None:
    wanted: list[tuple[Any, str]] = [("openai", "[text:Hi]"), ("string", "Hi"), (None, "Hi")]
    for format, text in wanted:
        assert ChatTemplate(PARTS, wanted_format=format).render(USER) == text
    assert EngineArgs.from_options("m", {"chat_template_content_format": "openai"}, {}) != EngineArgs("m")
    with pytest.raises(ConfigError, match="--chat-template-content-format parts: must be one of auto, string, openai"):
        EngineArgs("m", chat_template_content_format="parts")


def test_no_content_is_an_empty_string_not_the_word_none() -> None:
    assert render("{{ messages[0].content }}|", [{"role": "assistant", "content": None}]) == "|"


@pytest.mark.parametrize("kind", ["image_url", "input_image", "input_audio", "video_url", "file"])
def test_media_parts_are_refused_by_name(kind: str) -> None:
    with pytest.raises(RequestError, match=rf"messages\[0\].*'{kind}'.*text only"):
        render(CHATML, [{"role": "user", "content": [{"type": kind, kind: {}}]}])


@pytest.mark.parametrize(
    "message", [{}, {"role": 3}, {"role": "user", "content": 5}, {"role": "user", "content": [{}]}]
)
def test_a_malformed_message_is_refused(message: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        render(CHATML, [message])
    assert caught.value.param == "messages"


def test_no_messages_at_all_are_refused() -> None:
    with pytest.raises(RequestError, match="at least one message"):
        render(CHATML, [])


def test_what_the_template_raises_is_the_errors_message() -> None:
    with pytest.raises(RequestError, match=r"^roles must alternate$"):
        render("{{ raise_exception('roles must alternate') }}")


def test_a_failing_template_is_a_request_error_with_the_reason() -> None:
    with pytest.raises(RequestError, match=r"failed on these messages: \w*TypeError"):
        render("{{ messages[0].content + 1 }}")


def test_the_sandbox_keeps_templates_away_from_python() -> None:
    with pytest.raises(RequestError, match="failed"):
        render("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(RequestError, match="failed"):
        render("{{ messages.append(1) }}")


def test_a_template_that_is_no_jinja_names_its_line() -> None:
    with pytest.raises(RequestError, match="line 2"):
        render("ok\n{% if %}")


def test_no_template_says_how_to_give_one() -> None:
    with pytest.raises(RequestError, match="--chat-template"):
        render(None)


def test_continuing_the_final_message_leaves_the_prompt_open() -> None:
    chat = [*USER, {"role": "assistant", "content": "Well, "}]
    given: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    assert render(CHATML, chat, **given).endswith("<|im_start|>assistant\nWell, ")
    trimming = "{% for m in messages %}{{ m.content | trim }}</s>{% endfor %}"
    assert render(trimming, chat, **given) == "Hi</s>Well,"
    assert render(PARTS_ONLY, chat, **given) == "[Hi][Well, "


def test_continuing_and_opening_a_new_message_exclude_each_other() -> None:
    with pytest.raises(RequestError, match="Cannot set both"):
        render(CHATML, continue_final_message=True)


def test_a_final_message_that_the_template_hides_cannot_be_continued() -> None:
    with pytest.raises(RequestError, match="cannot continue"):
        render("fixed", add_generation_prompt=False, continue_final_message=True)


def test_tools_and_json_come_as_transformers_writes_them() -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "<größe> & 'x'"}}]
    assert render("{{ tools | tojson }}", tools=tools) == (
        '[{"type": "function", "function": {"name": "f", "description": "<größe> & \'x\'"}}]'
    )
    assert render("{{ tools is none }}") == "True"


def test_tool_call_arguments_are_objects_for_the_template() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1]}'}}
    source = "{% for k, v in messages[0].tool_calls[0].function.arguments.items() %}{{ k }}={{ v }}{% endfor %}"
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert render(source, [message]) == "x=[1]"


BROKEN = ['{"command": "l', '"ls"', "[1]", "ls -l", "12", '{"a": 1} or so', "{'a': 1}", "[" * 5000]
FUNCTION = "messages[0].tool_calls[0].function"
ONE = '{"name": "f", "arguments": %s}'


@pytest.mark.parametrize("written", BROKEN)
@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("{{ F.arguments | tojson }}", "%s"),
        ("{{ F.arguments }}", "%s"),
        ("{{ F | tojson }}", ONE),
        ("{{ [F, F] | tojson }}", f"[{ONE}, {ONE}]"),
        ("{% for k, v in F.arguments.items() %}{{ k }}={{ v }}{% endfor %}", "arguments=%s"),
        ("{% for k, v in F.arguments | items %}{{ k }}={{ v }}{% endfor %}", "arguments=%s"),
        ("{% for k, v in F.arguments | dictsort %}{{ k }}={{ v }}{% endfor %}", "arguments=%s"),
        ("{% for k in F.arguments %}{{ k }}={{ F.arguments[k] }}{% endfor %}", "arguments=%s"),
        ("{{ F.arguments is mapping }}{{ F.arguments is string }}", "TrueFalse"),
    ],
)
def test_arguments_that_are_not_an_object_are_shown_as_they_were_written(source: str, shown: str, written: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": written}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert render(source.replace("F", FUNCTION), [message]) == shown.replace("%s", written)


@pytest.mark.parametrize("missing", ["", " \n", None, {}])
def test_a_call_without_arguments_has_none(missing: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": missing}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert render(f"{{{{ {FUNCTION}.arguments | tojson }}}}", [message]) == "{}"


def test_reasoning_is_seen_under_both_names() -> None:
    source = "{{ messages[0].reasoning }}/{{ messages[0].reasoning_content }}"
    assert render(source, [{"role": "assistant", "content": "x", "reasoning_content": "why"}]) == "why/why"


def test_generation_marks_and_loop_controls_are_understood() -> None:
    source = (
        "{% for m in messages %}{% generation %}{% set x = m.content %}{{ x }}{% endgeneration %}"
        "{% break %}{% endfor %}"
    )
    assert render(source, USER * 2) == "Hi"


def test_strftime_now_gives_the_date() -> None:
    assert render("{{ strftime_now('%Y') }}").startswith("2")


def test_the_flag_takes_a_file_or_the_text_itself(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages }}")
    assert load_template(str(file)) == "{{ messages }}"
    assert load_template("{{ bos_token }}") == "{{ bos_token }}"


def test_a_template_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.jinja: no such file"):
        load_template("nowhere.jinja")
    with pytest.raises(ConfigError, match="line 1"):
        load_template("{% if %}")
