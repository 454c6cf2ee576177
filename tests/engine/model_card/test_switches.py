"""Which way a template goes where a switch is not set, as read in its text and as rendering shows."""

import pytest

from engine.model_card.switches import default_of, own_variables
from engine.text.template.chat_template import ChatTemplate, parse_template

ON = {
    "only false differs": "{% if enable_thinking is defined and enable_thinking is false %}x{% endif %}",
    "defined and not true differs": "{% if enable_thinking is defined and not enable_thinking %}x{% endif %}",
    "set where it is missing": "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
    "{% if enable_thinking %}x{% endif %}",
    "set to itself or true": "{% set enable_thinking = enable_thinking if enable_thinking is defined else true %}"
    "{{ 'x' if enable_thinking else 'y' }}",
    "a default": "{% set think = enable_thinking | default(true) %}{% if think %}x{% endif %}",
    "beside another condition": "{% if messages and not (enable_thinking is defined "
    "and enable_thinking == false) %}x{% endif %}",
}
OFF = {
    "plain truth": "{% if enable_thinking %}x{% endif %}",
    "plain falsehood": "{% if not enable_thinking %}x{% endif %}",
    "defined and true": "{% if enable_thinking is defined and enable_thinking %}x{% else %}y{% endif %}",
    "a default": "{% if enable_thinking | default(false) %}x{% endif %}",
    "in one line": "{{ 'x' if enable_thinking else 'y' }}",
    "beside another condition": "{% if messages and enable_thinking %}x{% endif %}",
}
UNKNOWN = {
    "it depends on another variable": "{% if enable_thinking is defined %}"
    "{% if enable_thinking %}{% set o = 'on' %}{% else %}"
    "{% set o = 'off' %}{% endif %}{% elif o is not defined %}{% set o = 'on' %}{% endif %}{{ o }}",
    "three ways": "{% if enable_thinking is defined %}{% if enable_thinking %}x{% else %}y{% endif %}{% endif %}",
    "it is not asked for": "{{ messages }}",
}


@pytest.mark.parametrize("name", ON)
def test_on_unless_set(name: str) -> None:
    assert default_of(parse_template(ON[name]), "enable_thinking") is True
    assert rendered(ON[name]) == rendered(ON[name], enable_thinking=True) != rendered(ON[name], enable_thinking=False)


@pytest.mark.parametrize("name", OFF)
def test_off_unless_set(name: str) -> None:
    assert default_of(parse_template(OFF[name]), "enable_thinking") is False
    assert (
        rendered(OFF[name]) == rendered(OFF[name], enable_thinking=False) != rendered(OFF[name], enable_thinking=True)
    )


@pytest.mark.parametrize("name", UNKNOWN)
def test_nothing_is_said_where_the_text_does_not_tell(name: str) -> None:
    assert default_of(parse_template(UNKNOWN[name]), "enable_thinking") is None


def test_a_word_that_is_set_where_none_is_given_is_the_default() -> None:
    text = (
        '{% if reasoning_effort is not defined %}{% set reasoning_effort = "medium" %}{% endif %}{{ reasoning_effort }}'
    )
    assert default_of(parse_template(text), "reasoning_effort") == "medium"


def test_a_switch_under_another_one_that_is_not_set_either_takes_the_way_of_both() -> None:
    text = (
        "{% if not thinking is defined %}{% if enable_thinking is defined %}{% set thinking = enable_thinking %}"
        "{% else %}{% set thinking = false %}{% endif %}{% endif %}{% if thinking %}x{% endif %}"
    )
    assert default_of(parse_template(text), "thinking") is False
    assert default_of(parse_template(text), "enable_thinking") is None


def test_variables_that_a_template_sets_for_itself_are_told_from_those_that_it_has_a_default_for() -> None:
    text = (
        "{% for m in messages %}{% if m.content is string %}{% set content = m.content %}{% endif %}{{ content }}"
        "{% endfor %}{% if date is not defined %}{% set date = 'today' %}{% endif %}{{ date }}"
    )
    assert own_variables(parse_template(text)) == {"m", "content"}


def rendered(text: str, **given: object) -> str:
    return ChatTemplate(text).render([{"role": "user", "content": "A question"}], **given)
