"""JSON schemas as grammars: which texts they admit, what their references mean, what is relaxed."""

import json
from typing import Any

import pytest

from engine.errors import RequestError
from engine.text.guide.grammar import GrammarCompiler, json_grammar
from engine.text.tokens.tokenizer import Tokenizer
from tests.engine.text.guide.admitting import admits

INTEGER, TEXT = {"type": "integer"}, {"type": "string"}
A, B, C = ({"type": "object", "properties": {name: INTEGER}, "required": [name]} for name in "abc")
ONE, BOTH = {"a": 1}, {"a": 1, "b": 2}
MORE = {"a": 1, "b": 2, "c": 3}
DEFINED = {"$defs": {"A": A}}
TUPLE = {"type": "array", "prefixItems": [INTEGER]}
CASES: dict[str, tuple[dict[str, Any], list[Any], list[Any]]] = {
    "closed": (A, [ONE], [BOTH, {}]),
    "open": ({**A, "additionalProperties": True}, [ONE, BOTH], [{}]),
    "of one type": ({**A, "additionalProperties": INTEGER}, [BOTH], [{"a": 1, "b": "x"}]),
    "any object": ({"type": "object"}, [{}, MORE], [1]),
    "anything": ({}, [1, MORE, "x"], []),
    "no properties": ({"type": "object", "properties": {}}, [{}], [ONE]),
    "patterns": ({"type": "object", "patternProperties": {"^x": INTEGER}}, [{"xa": 1}], [{"ya": 1}]),
    "nested": ({"type": "object", "properties": {"n": A}}, [{"n": ONE}], [{"n": BOTH}]),
    "in a list": ({"type": "array", "items": A}, [[ONE]], [[BOTH]]),
    "in values": ({"type": "object", "additionalProperties": A}, [{"q": ONE}], [{"q": BOTH}]),
    "allOf": ({"allOf": [A, B]}, [BOTH], [ONE, MORE]),
    "allOf, one open": ({"allOf": [A, {**B, "additionalProperties": True}]}, [MORE], [ONE]),
    "allOf of one": ({"allOf": [{"$ref": "#/$defs/A"}], "description": "d", **DEFINED}, [ONE], [BOTH]),
    "allOf beside": ({"allOf": [{"$ref": "#/$defs/A"}], "properties": B["properties"], **DEFINED}, [BOTH], [MORE]),
    "$ref": ({"$ref": "#/$defs/A", **DEFINED}, [ONE], [BOTH]),
    "$ref beside": ({"$ref": "#/$defs/A", "properties": B["properties"], **DEFINED}, [ONE, BOTH], [MORE]),
    "anyOf": ({"anyOf": [A, B]}, [ONE, {"b": 2}], [BOTH]),
    "anyOf beside": ({**A, "anyOf": [B, C]}, [BOTH, {"a": 1, "c": 3}], [MORE, ONE]),
    "anyOf of names": (
        {"properties": BOTH | {"a": INTEGER, "b": INTEGER}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        [ONE, {"b": 2}],
        [{}, {"c": 3}],
    ),
    "two choices": ({"anyOf": [A, B], "allOf": [{"anyOf": [A, C]}]}, [ONE], [{"a": 1, "q": 1}]),
    "oneOf": ({"oneOf": [A, B]}, [ONE], [{"c": 1}]),
    "null or closed": ({"type": ["object", "null"], "properties": A["properties"]}, [None, ONE], [{"b": 1}]),
    "unevaluated": ({"allOf": [A, B], "unevaluatedProperties": False}, [BOTH], [MORE]),
    "unevaluated open": ({**A, "unevaluatedProperties": INTEGER}, [BOTH], [{"a": 1, "b": "x"}]),
    "required alone": ({**A, "required": ["a", "b"]}, [{"a": 1, "b": "x"}], [ONE, {"a": 1, "b": 2, "c": 3}]),
    "nulls say nothing": ({**A, "$defs": None, "additionalProperties": None, "allOf": None}, [ONE], [BOTH]),
    "recursive": (
        {"properties": {"n": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["n"]},
        [{"n": {"n": None}}],
        [{"n": {"n": None, "x": 1}}, {"n": {}}],
    ),
    "names that are keywords": (
        {"properties": {"properties": TEXT, "const": INTEGER, "$ref": TEXT}, "required": ["properties"]},
        [{"properties": "x", "const": 1, "$ref": "y"}],
        [{"properties": 1}, {"properties": "x", "more": 1}],
    ),
    "values that look like schemas": (
        {"enum": [{"properties": {"a": 1}}, {"$ref": "#/nowhere"}]},
        [{"properties": {"a": 1}}, {"$ref": "#/nowhere"}],
        [{"properties": {"a": 1}, "additionalProperties": False}],
    ),
    "to a property": ({"properties": {"a": {"$ref": "#/properties/b"}, "b": INTEGER}}, [BOTH], [{"a": "x"}]),
    "$id and $anchor": (
        {
            "$id": "http://localhost/x",
            "properties": {"a": {"$ref": "#/$defs/q"}, "b": {"$ref": "/w#t"}},
            "$defs": {"q": INTEGER, "w": {"$id": "/w", "$defs": {"t": {"$anchor": "t", **TEXT}}}},
        },
        [{"a": 1, "b": "x"}],
        [{"a": "x"}, {"b": 1}],
    ),
    "escaped pointer": ({"$ref": "#/$defs/a~1b%20c", "$defs": {"a/b c": INTEGER}}, [1], ["x"]),
    "an unknown $schema": ({"$schema": "http://localhost/own#", **A}, [ONE], [BOTH]),
    "tuple": (TUPLE, [[1]], [[1, 2]]),
    "tuple of draft 7": ({"type": "array", "items": [INTEGER], "additionalItems": TEXT}, [[1, "x"]], [[1, 2]]),
    "nullable": ({**TEXT, "nullable": True}, [None, "x"], [1]),
    "annotation": ({**TEXT, "format": "path"}, ["/x y"], [1]),
    "format": ({**TEXT, "format": "date"}, ["2024-02-29"], ["x", "0000-01-01"]),
    "UUID": ({**TEXT, "format": "uuid4"}, ["6ed7b1e0-6d1b-4c53-8a2b-0123456789ab"], ["x"]),
    "names from a list": (
        {"type": "object", "propertyNames": {"enum": ["a", "b"]}, "additionalProperties": INTEGER},
        [{}, ONE, BOTH],
        [MORE, {"a": "x"}],
    ),
    "names from a list beside no properties": (
        {
            "type": "object",
            "propertyNames": {"enum": ["a", "b"]},
            "additionalProperties": INTEGER,
            "properties": {},
        },
        [ONE],
        [{"c": 1}],
    ),
    "names by a pattern": ({"type": "object", "propertyNames": {"pattern": "^[ab]$"}}, [ONE], [{"c": 1}]),
}


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)


@pytest.mark.parametrize("name", CASES)
def test_a_schema_admits_what_it_declares_and_no_more(
    compiler: GrammarCompiler, tokenizer: Tokenizer, name: str
) -> None:
    schema, good, bad = CASES[name]
    before = json.dumps(schema)
    grammar = json_grammar(schema, set())
    assert json.dumps(schema) == before
    for value in good:
        assert admits(compiler, tokenizer, grammar, json.dumps(value)), value
    for value in bad:
        assert not admits(compiler, tokenizer, grammar, json.dumps(value)), value


def test_a_schema_that_is_not_to_be_closed_is_as_open_as_it_says(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    for schema, is_open in ((A, True), ({"allOf": [A]}, True), ({**A, "unevaluatedProperties": False}, False)):
        assert admits(compiler, tokenizer, json_grammar(schema, set(), closes=False), json.dumps(BOTH)) == is_open


RELAXED: list[tuple[dict[str, Any], str]] = [
    ({"type": "array", "uniqueItems": True, "items": INTEGER}, "uniqueItems"),
    ({"type": "object", "propertyNames": {"format": "uuid"}}, "propertyNames"),
    ({"type": "object", "propertyNames": {"minLength": 2}, "properties": {"ab": INTEGER}}, "propertyNames"),
    ({"oneOf": [A, B]}, "oneOf"),
    ({"oneOf": [INTEGER, {"type": "number"}]}, "oneOf"),
    ({"type": "object", "properties": {"a": INTEGER}, "minProperties": 1}, "minProperties"),
    ({"type": "string", "pattern": r"^a(?=b)b$"}, "(?=…) in a pattern"),
]


@pytest.mark.parametrize(("schema", "keyword"), RELAXED, ids=[str(case[1]) for case in RELAXED])
def test_what_the_grammar_cannot_enforce_is_left_out_and_told(
    compiler: GrammarCompiler, schema: dict[str, Any], keyword: str
) -> None:
    relaxed: set[str] = set()
    compiler.compile(json_grammar(schema, relaxed))
    assert relaxed == {keyword}


def test_nothing_is_told_of_what_is_enforced() -> None:
    told_apart = [
        {"properties": {"k": {"const": kind}, kind: INTEGER}, "required": ["k", kind], "type": "object"}
        for kind in ("x", "y")
    ]
    enforced: list[dict[str, Any]] = [
        {"oneOf": [INTEGER, TEXT]},
        {"oneOf": told_apart},
        {"oneOf": [{"$ref": "#/$defs/x"}, {"$ref": "#/$defs/y"}], "$defs": dict(zip("xy", told_apart, strict=True))},
        {"type": "array", "uniqueItems": False},
        {"type": "object", "propertyNames": {"type": "string"}},
        {"type": "object", "minProperties": 1},
        {**A, "minProperties": 1},
        {**TEXT, "pattern": r"^(?=.*\d)\w+\b$"},
    ]
    for schema in enforced:
        relaxed: set[str] = set()
        json_grammar(schema, relaxed)
        assert relaxed == set(), schema


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"$ref": "http://localhost/x"}, "leads nowhere"),
        ({"$ref": "#/$defs/x"}, "leads nowhere"),
        ({"$ref": 5}, "leads nowhere"),
        ({"properties": {"a": 5}}, "must be an object, true or false, got '5'"),
        ({"not": TEXT}, 'cannot enforce "not"'),
        ({"$ref": "#"}, "bad grammar"),
        ({"allOf": [{"$ref": "#"}], "properties": {"a": INTEGER}}, "bad grammar"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_schema_without_a_meaning_is_refused(compiler: GrammarCompiler, schema: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        compiler.compile(json_grammar(schema, set()))


def test_a_schema_whose_parts_are_found_on_very_many_ways_is_read_soon() -> None:
    twice: dict[str, Any] = {
        f"a{n}": {"properties": {f"p{n}": INTEGER}, "anyOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(60)
    }
    assert json_grammar({"$ref": "#/$defs/a0", "$defs": twice | {"a60": A}}, set())
