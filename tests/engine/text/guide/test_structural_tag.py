"""Structural tags: which texts the grammar of a format admits."""

from typing import Any

import pytest

from engine.errors import RequestError
from engine.text.guide.grammar import GrammarCompiler
from engine.text.guide.structural_tag import structural_tag_grammar
from engine.text.tokens.tokenizer import Tokenizer
from tests.engine.text.guide import admitting

INTEGER = {"type": "json_schema", "json_schema": {"type": "integer"}}
ANY = {"type": "any_text"}
A, B = ({"type": "tag", "begin": f"<{name}>", "content": INTEGER, "end": f"</{name}>"} for name in "ab")
TRIGGERED = {"type": "triggered_tags", "triggers": ["<"], "tags": [A, B]}
SEPARATED = {"type": "tags_with_separator", "tags": [A, B], "separator": ", "}


def const(text: str) -> dict[str, Any]:
    return {"type": "const_string", "value": text}


def sequence(*elements: Any) -> dict[str, Any]:
    return {"type": "sequence", "elements": list(elements)}


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)


def admits(compiler: GrammarCompiler, tokenizer: Tokenizer, format: Any, text: str) -> bool:
    """Whether the grammar of a format takes ``text`` as a whole."""
    tag = {"type": "structural_tag", "format": format}
    return admitting.admits(compiler, tokenizer, structural_tag_grammar(tag, compiler.mark, set()), text)


@pytest.mark.parametrize(
    ("format", "good", "bad"),
    [
        (const("yes"), ["yes"], ["no", "yes!"]),
        (INTEGER, ["12"], ["x", '"1"']),
        (ANY, ["", "any\n{text} <a>"], []),
        (A, ["<a>1</a>"], ["<a>x</a>", "1", "<a>1</b>", "<a>1</a>!"]),
        (sequence(const("So: "), A, const("!")), ["So: <a>1</a>!"], ["<a>1</a>", "So: <a>1</a>"]),
        (sequence(ANY, const("END")), ["END", "one\ntwo END"], ["one", "one END two"]),
        (sequence(ANY, A, ANY), ["<a>1</a>", "I say <a>1</a> twice"], ["I say", "I say <a>x</a>"]),
        ({"type": "tag", "begin": "<t>", "content": ANY, "end": "</t>"}, ["<t>a < b</t>"], ["<t>a", "<t>a</t>b"]),
        ({"type": "or", "elements": [const("a"), sequence(const("b"), INTEGER)]}, ["a", "b7"], ["ab", "b"]),
        (TRIGGERED, ["", "no tag", "x <a>1</a> y <b>2</b><a>3</a> z"], ["x <c>1</c>", "<a>x</a>"]),
        ({**TRIGGERED, "at_least_one": True}, ["<a>1</a>", "<b>1</b> x <a>2</a>"], ["no tag", "x <a>1</a>"]),
        ({**TRIGGERED, "stop_after_first": True}, ["no tag", "x <a>1</a>"], ["x <a>1</a> y"]),
        ({**TRIGGERED, "stop_after_first": True, "at_least_one": True}, ["<b>1</b>"], ["", "<b>1</b><a>1</a>"]),
        (sequence(const("> "), TRIGGERED), ["> x", "> x <a>1</a>"], ["x"]),
        (SEPARATED, ["", "<a>1</a>", "<a>1</a>, <b>2</b>, <a>3</a>"], ["<a>1</a><b>2</b>", "<a>1</a>, "]),
        ({**SEPARATED, "at_least_one": True}, ["<a>1</a>", "<a>1</a>, <b>2</b>"], [""]),
        ({**SEPARATED, "stop_after_first": True}, ["", "<a>1</a>"], ["<a>1</a>, <b>2</b>"]),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_format_admits_its_texts_and_no_others(
    compiler: GrammarCompiler, tokenizer: Tokenizer, format: Any, good: list[str], bad: list[str]
) -> None:
    for text in good:
        assert admits(compiler, tokenizer, format, text), text
    for text in bad:
        assert not admits(compiler, tokenizer, format, text), text


def test_a_tag_whose_mark_is_one_token_begins_with_that_token(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    tag = {"type": "tag", "begin": "<|im_start|>", "content": INTEGER, "end": ""}
    triggered = {"type": "triggered_tags", "triggers": ["<|im_start|>"], "tags": [tag], "stop_after_first": True}
    assert admits(compiler, tokenizer, triggered, "x <|im_start|>5")
    assert not admits(compiler, tokenizer, triggered, "x <|im_start|>y")


@pytest.mark.parametrize(
    ("format", "words"),
    [
        (5, "a format must be"),
        ({"type": "qwen_xml_parameter", "json_schema": {}}, "qwen_xml_parameter"),
        ({"type": "regex", "pattern": "a"}, "regex"),
        ({**ANY, "excludes": ["a"]}, "'excludes' of any_text"),
        ({"type": "const_string", "value": 5}, "value must be a string"),
        ({"type": "json_schema", "json_schema": 5}, "must hold a schema"),
        ({**INTEGER, "style": "qwen_xml"}, "style json"),
        ({"type": "sequence", "elements": []}, "at least one"),
        ({"type": "or", "elements": "ab"}, "at least one"),
        ({**A, "begin": None}, "begin must be a string"),
        ({**A, "content": None}, "a format must be"),
        (sequence(ANY, INTEGER), "any_text must be the last"),
        (sequence(TRIGGERED, const("x")), "triggered_tags must be the last"),
        ({**TRIGGERED, "triggers": ["["]}, "one of the triggers"),
        ({**TRIGGERED, "triggers": 5}, "one of the triggers"),
        ({**TRIGGERED, "tags": 5}, "at least one"),
        ({**SEPARATED, "separator": None}, "separator must be a string"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_not_understood_is_refused_by_name(format: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        structural_tag_grammar({"type": "structural_tag", "format": format}, repr, set())
