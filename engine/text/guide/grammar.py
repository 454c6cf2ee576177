"""Grammars for structured output, compiled and matched by llguidance.

Chosen over xgrammar: no dependencies (xgrammar brings torch), one wheel for all Pythons, masks
computed on the fly. A grammar is checked when a request comes in; the library and the vocabulary's
trie (about a third of a second for 49k tokens) are loaded with the first one.
"""

import json
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import RequestError
from engine.params.structured_outputs import StructuredOutput, parse_json_text
from engine.text.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
"""Between the parts of JSON: bounded, since small models otherwise never stop writing white space."""


class _Tokens:
    """A model's tokens in llguidance, which does not treat added tokens such as ``<tool_call>`` as text."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: list[int]) -> None:
        from llguidance import LLTokenizer

        self.all = LLTokenizer(tokenizer.hf.to_str(), n_vocab=vocab_size, eos_token=eos_token_ids)
        self._tokenizer = tokenizer

    def mark(self, text: str) -> str:
        """``text`` in a Lark grammar: by its id where it is a token that llguidance does not treat as text."""
        token_id = self._tokenizer.hf.token_to_id(text)
        if token_id is not None and self.all.is_special_token(token_id):
            return f"<[{token_id}]>"
        return json.dumps(text, ensure_ascii=False)

    def spelled(self, token_id: int) -> list[int]:
        """The text of such a token, spelled with ordinary tokens; empty for all other tokens."""
        if not self.all.is_special_token(token_id) or token_id in self._tokenizer.special_ids:
            return []
        return list(self.all.greedy_tokenize(self._tokenizer.token_text(token_id)))


class GrammarMatcher:
    """The state of one completion in its grammar."""

    def __init__(self, matcher: "LLMatcher", tokens: _Tokens) -> None:
        self._matcher = matcher
        self._tokens = tokens

    def another(self) -> "GrammarMatcher":
        """A second matcher in the same state."""
        return GrammarMatcher(self._matcher.deep_copy(), self._tokens)

    def fill_bitmask(self, words: NDArray[np.int32]) -> None:
        """Set the bits of the tokens that the grammar allows next, including end tokens where it may end."""
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)

    def accepts(self, token_id: int) -> bool:
        """Whether the grammar allows this token next."""
        return self._as_matched(token_id) is not None

    def consume(self, token_id: int) -> bool:
        """Take a token; False if the grammar does not allow it or became too complex."""
        return bool(self._matcher.consume_tokens(self._as_matched(token_id) or [token_id]))

    def _as_matched(self, token_id: int) -> list[int] | None:
        """The token, or its text spelled out, whichever the grammar allows."""
        for token_ids in ([token_id], self._tokens.spelled(token_id)):
            if token_ids and self._matcher.validate_tokens(token_ids) == len(token_ids):
                return token_ids
        return None

    def reset(self) -> None:
        """Back to the grammar's beginning."""
        self._matcher.reset()

    @property
    def complete(self) -> bool:
        """Whether nothing but the end can follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    @property
    def error(self) -> str | None:
        """What went wrong, as one line."""
        return _one_line(self._matcher.get_error()) if self._matcher.is_error() else None


class GrammarCompiler:
    """Grammars over one model's tokens. Any thread may compile."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(token for token in eos_token_ids if token < vocab_size)
        self._loaded: _Tokens | None = None
        self._lock = threading.Lock()

    def compile(self, grammar: str, param: str = "structured_outputs") -> GrammarMatcher:
        """A matcher at the grammar's beginning. Raises RequestError with what is wrong in it."""
        from llguidance import LLMatcher

        tokens = self._tokens()
        matcher = LLMatcher(tokens.all, grammar, log_level=0)
        begins = not matcher.is_error() and any(matcher.compute_bitmask())
        if matcher.is_error() or not begins:
            why = _one_line(matcher.get_error()) or "no text satisfies it"
            raise RequestError(f"bad grammar or schema: {why}", param=param)
        return GrammarMatcher(matcher, tokens)

    def mark(self, text: str) -> str:
        """``text`` in a Lark grammar; a mark that is a single token is written by its id."""
        return self._tokens().mark(text)

    def _tokens(self) -> _Tokens:
        with self._lock:
            if self._loaded is None:
                self._loaded = _Tokens(self._tokenizer, self._vocab_size, self._eos_token_ids)
            return self._loaded


def grammar_text(structured: StructuredOutput) -> str:
    """llguidance's grammar for every kind except tool calls and structural tags. Raises RequestError."""
    from llguidance import LLMatcher, grammar_from

    if structured.json_object:
        return json_grammar({"type": "object"}, structured)
    if structured.json is not None:
        schema = structured.json
        return json_grammar(parse_json_text(schema, "json") if isinstance(schema, str) else schema, structured)
    if structured.regex is not None:
        return str(LLMatcher.grammar_from_regex(structured.regex))
    if structured.choice is not None:
        return "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in structured.choice)
    assert structured.grammar is not None, "tool calls and structural tags have their own grammars"
    try:
        return str(grammar_from("grammar", structured.grammar))
    except ValueError as error:
        raise RequestError(f"bad grammar: {_one_line(str(error))}", param="structured_outputs") from None


def json_grammar(schema: Any, structured: StructuredOutput | None = None) -> str:
    """The grammar of a JSON schema (an object or a truth value)."""
    from llguidance import LLMatcher

    if not isinstance(schema, Mapping | bool):
        raise RequestError("json must be a schema: an object, or true.", param="structured_outputs")
    schema = dict(schema) if isinstance(schema, Mapping) else {} if schema else {"not": {}}
    if structured is not None and structured.disable_additional_properties:
        schema = _closed(schema)
    try:
        return str(LLMatcher.grammar_from_json_schema(schema, defaults=whitespace_options(structured)))
    except ValueError as error:
        raise RequestError(f"bad grammar or schema: {_one_line(str(error))}", param="structured_outputs") from None


def whitespace_options(structured: StructuredOutput | None = None) -> Any:
    """llguidance's options for white space between the parts of JSON."""
    if structured is not None and structured.disable_any_whitespace:
        return {"whitespace_flexible": False}
    pattern = structured.whitespace_pattern if structured is not None else None
    return {"whitespace_pattern": pattern or _WHITESPACE}


def _closed(schema: Any) -> Any:
    """A schema whose objects allow only the declared properties."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, Mapping):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if "properties" in closed and "additionalProperties" not in closed:
        closed["additionalProperties"] = False
    return closed


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]
