r"""Regular expressions in ASCII: which texts a grammar admits, of a ``regex`` and of the ``pattern`` of a schema."""

import json
import re

import pytest

from engine.errors import RequestError
from engine.params.structured_outputs import StructuredOutput
from engine.text.guide.ascii_regex import ascii_regex
from engine.text.guide.grammar import GrammarCompiler, grammar_text, json_grammar
from engine.text.tokens.tokenizer import Tokenizer
from tests.engine.text.guide.admitting import admits

CASES: list[tuple[str, list[str], list[str]]] = [
    (r"\d{3}", ["123"], ["١٢٣", "🯸🯸🯸", "12"]),
    (r"\w+", ["a_1"], ["é", "a b"]),
    (r"a\sb", ["a b", "a\tb"], ["a\xa0b", "a\u2003b"]),
    (r"\D\W\S", ["é-é", "a é"], ["1-é", "aaé"]),
    (r"[\d.]+", ["1.2"], ["١"]),
    (r"[^\d]", ["a", "é"], ["1"]),
    (r"[^\W\d]+", ["ab_"], ["a1", "a b", "é"]),
    (r"[\w-]+@\w+", ["a-b@c"], ["é@c"]),
    (r"\bfoo bar\b", ["foo bar"], ["foo"]),
    (r"\b.{3}\b", ["a b", "abc"], [" ab", "ab "]),
    (r"one\b two", ["one two"], ["onetwo"]),
    (r"(\d+)\b%", ["12%"], ["%"]),
    (r"[\b]x", ["\x08x"], ["bx"]),
    (r"[^[\]]+", ["a(b"], ["a[b"]),
    (r"[]a]+", ["]a"], ["b"]),
    (r"[a&&b]+", ["a&b"], ["c"]),
    (r"(?=.*\d)(?=.*[A-Z]).{4,}", ["aB1x"], ["ab1x", "aB1"]),
    (r"(?!foo)\w+", ["bar", "fo"], ["food"]),
    (r"(?![-+.]*$)[+-]?\d*\.?\d*", ["-1.5", ".5"], ["-.", "+"]),
    (r"(?!.*x)[a-z]+", ["abc"], ["axc"]),
    (r"a/b\/c", ["a/b/c"], ["a/b"]),
    (r"a|bc", ["a", "bc"], ["ac"]),
    (r"\<a\>", ["<a>"], ["a"]),
    (r"[[:digit:]]", ["1"], ["a"]),
    ("a\nb", ["a\nb"], ["anb"]),
]


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, tokenizer.vocab_size, tokenizer.eos_token_ids)


@pytest.mark.parametrize(("pattern", "good", "bad"), CASES, ids=[case[0] for case in CASES])
def test_a_pattern_means_the_same_ascii_text_in_a_regex_and_in_a_schema(
    compiler: GrammarCompiler, tokenizer: Tokenizer, pattern: str, good: list[str], bad: list[str]
) -> None:
    relaxed: set[str] = set()
    plain = grammar_text(StructuredOutput(regex=pattern), relaxed)
    anchored = f"^(?:{pattern})$" if "|" in pattern else f"^{pattern}$"
    schema = json_grammar({"type": "string", "pattern": anchored}, relaxed)
    for grammar, write in ((plain, str), (schema, lambda text: json.dumps(text, ensure_ascii=False))):
        if grammar == schema and "(?!foo)" in pattern:
            assert relaxed == {"(?!…) in a pattern"}
            continue
        for text in good:
            assert admits(compiler, tokenizer, grammar, write(text)), (text, grammar)
        for text in bad:
            assert not admits(compiler, tokenizer, grammar, write(text)), (text, grammar)


@pytest.mark.parametrize("pattern", [r"a(?=b)b", r"x\by", r"a(?<!b)", r"\Ba", r".\b."])
def test_what_a_grammar_cannot_say_is_refused_in_a_regex_and_relaxed_in_a_schema(pattern: str) -> None:
    with pytest.raises(RequestError, match=r"regex: .* cannot be used inside"):
        grammar_text(StructuredOutput(regex=pattern), set())
    relaxed: set[str] = set()
    json_grammar({"type": "string", "pattern": pattern}, relaxed)
    assert len(relaxed) == 1


ODD = ["[", "(", "\\", "", "a{", "[^", "(?", "(?=", r"\b", "(?!", "[[:x", "{2}", "a\\", "[\\"]


@pytest.mark.parametrize("pattern", [*ODD, "[" * 300_000, r"\b" * 30_000, "(?=" * 30_000], ids=lambda text: text[:5])
def test_any_text_is_read(pattern: str) -> None:
    for anchored in (False, True):
        assert isinstance(ascii_regex(pattern, anchored=anchored).text, str)


def test_a_pattern_without_classes_stays_as_it_is() -> None:
    for pattern in (r"^a+?(b|c){2,3}[^x-z.]*\.$", r"(?i)ab", r"\x41B\p{L}\n", "(?P<n>a)"):
        assert ascii_regex(pattern, anchored=False).text == pattern
        re.compile(pattern.replace(r"\p{L}", "a"))
