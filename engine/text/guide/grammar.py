"""Grammars for structured output, compiled and matched by llguidance.

Chosen over xgrammar: no dependencies (xgrammar brings torch), one wheel for all Pythons, masks
computed on the fly. A grammar is checked when a request comes in; the library and the vocabulary's
trie (about a third of a second for 49k tokens) are loaded with the first one.
"""

import re
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import tokenizers
from numpy.typing import NDArray

from engine.errors import RequestError
from engine.params.structured_outputs import StructuredOutput, parse_json_text
from engine.text.guide.json_schema import written_schema
from engine.text.guide.lark_text import ascii_lark, lark_regex, lark_string, says_gbnf
from engine.text.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
"""Between the parts of JSON: bounded, since small models otherwise never stop writing white space."""
_UNREADABLE = "this model's tokenizer cannot be read for grammars"


class _Tokens:
    """A model's tokens in llguidance, which does not treat added tokens such as ``<tool_call>`` as text.

    There may be more of them than logits: ``vocab_size`` are the model's, and only they may be written.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: list[int]) -> None:
        from llguidance import LLTokenizer

        most = max(tokenizer.hf.get_vocab(with_added_tokens=True).values(), default=0) + 1
        size = max(vocab_size, most)
        try:
            self.all = LLTokenizer(tokenizer.hf.to_str(), n_vocab=size, eos_token=eos_token_ids)
        except ValueError as error:
            raise RequestError(
                f"{_UNREADABLE}, so structured output and demanded calls are not possible with it: "
                f"{_one_line(str(error))}",
                param="structured_outputs",
            ) from None
        self.num_words = -(-size // 32)
        self.vocab_size = vocab_size
        self._tokenizer = tokenizer
        added = (token.content for token in tokenizer.hf.get_added_tokens_decoder().values())
        self._marks = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or "(?!)")

    def mark(self, text: str) -> str:
        """``text`` in a Lark grammar: by its id where it is a token that llguidance does not treat as text."""
        token_id = self._tokenizer.hf.token_to_id(text)
        if token_id is not None and token_id < self.vocab_size and self.all.is_special_token(token_id):
            return f"<[{token_id}]>"
        return lark_string(text)

    def marks(self, text: str) -> str:
        """``text`` in a Lark grammar, where it may hold several such tokens."""
        place, parts = 0, []
        for found in self._marks.finditer(text):
            parts += [text[place : found.start()], found.group()]
            place = found.end()
        return " ".join(self.mark(part) for part in [*parts, text[place:]] if part)

    def spelled(self, token_id: int) -> list[int]:
        """The text of such a token, spelled with ordinary tokens; empty for all other tokens."""
        if not self.all.is_special_token(token_id) or token_id in self._tokenizer.special_ids:
            return []
        return list(self.all.greedy_tokenize(self._tokenizer.token_text(token_id)))


class Matcher(Protocol):
    """The state of one completion in what it must be."""

    def another(self) -> "Matcher":
        """A second matcher in the same state."""

    def fill_bitmask(self, words: NDArray[np.int32]) -> None:
        """Set the bits of the tokens that may come next, end tokens included where it may end."""

    def accepts(self, token_id: int) -> bool:
        """Whether this token may come next."""

    def consume(self, token_id: int) -> bool:
        """Take a token; False if it may not come, or what is read became too complex."""

    def reset(self) -> None:
        """Back to the beginning."""

    @property
    def complete(self) -> bool:
        """Whether nothing but the end can follow."""

    @property
    def may_end(self) -> bool:
        """Whether the end can follow."""

    @property
    def error(self) -> str | None:
        """What went wrong, as one line."""


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
        if len(words) == self._tokens.num_words:
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            return
        every = np.zeros(self._tokens.num_words, np.int32)
        self._matcher.unsafe_compute_mask_ptr(every.ctypes.data, every.nbytes)
        words[:] = every[: len(words)]

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
    def may_end(self) -> bool:
        """Whether the end can follow."""
        return bool(self._matcher.is_accepting())

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
        if matcher.is_error():
            raise RequestError(f"bad grammar or schema: {_one_line(matcher.get_error())}", param=param)
        first = self._first_tokens(matcher)
        if not len(first) or matcher.is_error():  # which is known only now
            raise RequestError("bad grammar or schema: no text satisfies it", param=param)
        begun = matcher.deep_copy()
        if not begun.consume_tokens([int(first[0])]) and begun.is_error():  # some limits are met with the first token
            raise RequestError(f"bad grammar or schema: {_one_line(begun.get_error())}", param=param)
        return GrammarMatcher(matcher, tokens)

    def _first_tokens(self, matcher: "LLMatcher") -> NDArray[np.intp]:
        """Those of the model's tokens that can come first; end tokens where nothing must."""
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        return np.flatnonzero(np.unpackbits(mask, count=self._vocab_size, bitorder="little"))

    def mark(self, text: str) -> str:
        """``text`` in a Lark grammar; a mark that is a single token is written by its id."""
        return self._tokens().mark(text)

    def marks(self, text: str) -> str:
        """``text`` in a Lark grammar; marks in it that are single tokens are written by their ids."""
        return self._tokens().marks(text)

    def _tokens(self) -> _Tokens:
        with self._lock:
            if self._loaded is None:
                self._loaded = _Tokens(self._tokenizer, self._vocab_size, self._eos_token_ids)
            return self._loaded


def tokenizer_problem(tokenizer: Tokenizer) -> str | None:
    """A line for the user where no grammar can be used with this tokenizer: llguidance reads it by its decoder.

    The vocabulary is left out, whose trie would take a third of a second.
    """
    decoder = tokenizer.hf.decoder
    if isinstance(decoder, tokenizers.decoders.ByteLevel):
        return None
    from llguidance import LLTokenizer

    small = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    if decoder is not None:
        small.decoder = decoder
    try:
        LLTokenizer(small.to_str(), n_vocab=2, eos_token=[1])
    except ValueError as error:
        return f"structured output and demanded calls: none, {_UNREADABLE} ({_one_line(str(error))[:100]})"
    return None


def grammar_text(structured: StructuredOutput, relaxed: set[str]) -> str:
    """llguidance's grammar for every kind except tool calls and structural tags; see :func:`json_grammar`."""
    if structured.json_object:
        return json_grammar({"type": "object"}, relaxed, structured)
    if structured.json is not None:
        schema = structured.json
        schema = parse_json_text(schema, "json") if isinstance(schema, str) else schema
        return json_grammar(schema, relaxed, structured)
    if structured.regex is not None:
        return lark_regex(structured.regex)
    if structured.choice is not None:
        return "start: " + " | ".join(map(lark_string, structured.choice))
    assert structured.grammar is not None, "tool calls and structural tags have their own grammars"
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        lark = any_to_lark(structured.grammar) if says_gbnf(structured.grammar) else ascii_lark(structured.grammar)
        return str(LLMatcher.grammar_from_lark(lark))
    except Exception as error:  # noqa: BLE001 - the converter's error has no class of its own that it gives
        raise RequestError(f"bad grammar: {_one_line(str(error))}", param="structured_outputs") from None


def json_grammar(
    schema: Any, relaxed: set[str], structured: StructuredOutput | None = None, *, closes: bool = True
) -> str:
    """The grammar of a JSON schema (an object or a truth value). Raises RequestError.

    ``relaxed`` gets the keywords that it cannot enforce. ``closes``: objects that do not say otherwise have the
    declared properties only.
    """

    if not isinstance(schema, Mapping | bool):
        raise RequestError("json must be a schema: an object, or true.", param="structured_outputs")
    written, left_out = written_schema(schema, closes=closes)
    relaxed |= left_out
    if isinstance(written, bool):
        written = {} if written else {"not": {}}
    return written_grammar(written, structured)


def written_grammar(schema: dict[str, Any], structured: StructuredOutput | None = None) -> str:
    """llguidance's grammar of a schema that was written for it. Raises RequestError for values that are not JSON's."""
    from llguidance import LLMatcher

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


def _one_line(text: str) -> str:
    """A library's words in one line, keywords that it lacks by their names."""
    line = " ".join(text.partition("<state>")[0].split())  # llguidance's own notes follow
    return re.sub(r"Unimplemented keys: \[(.*?)\]", r"the grammar cannot enforce \1", line)[:200]
