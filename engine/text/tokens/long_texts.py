"""Long texts: refused before they are tokenized where they can never fit, and tokenized beside everything else."""

import json
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import tokenizers

from engine.core.request import check_length
from engine.handover import Answer
from engine.memory.heap import return_free_memory
from engine.text.tokens.library_errors import decoding, encoding

_SHORT = 4096
"""Characters, or tokens, up to which the usual call takes a millisecond; of a million it holds Python's lock 0.4 s."""
_SLOW = 1 << 18
"""Characters from which on tokenizing takes so long that an interrupt must not wait for it."""
_HUGE = 1 << 20
"""Characters from which on it takes so much memory, 100 bytes for each, that it is given back at once."""
_COMPOSED = 4
"""Most code points that NFC and NFKC make one of: no character's full decomposition is longer."""
_SPACES = (
    "\t\n\v\f\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028"
)
_MORE_SPACES = "\u2029\u202f\u205f\u3000"
_UTF8_BYTES = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}
"""Bytes that occur in UTF-8."""
_CONTINUATION = frozenset(range(0x80, 0xC0))
"""Bytes of which all characters but ASCII have at least one."""


def encode(hf: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """Token ids of ``text``. Where it is long, other Python threads run meanwhile, and an interrupt is heard at once;
    the library then finishes in the background. Raises RequestError.
    """
    if len(text) <= _SHORT:
        with encoding():
            return list(hf.encode(text, add_special_tokens=add_special_tokens).ids)
    if len(text) < _SLOW or threading.current_thread() is not threading.main_thread():
        return _encode_unlocked(hf, text, add_special_tokens)
    done: Answer[list[int]] = Answer()

    def work() -> None:
        try:
            done.set_result(_encode_unlocked(hf, text, add_special_tokens))
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            done.set_exception(error)

    threading.Thread(target=work, name="tokenize", daemon=True).start()
    return done.result()


def _encode_unlocked(hf: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    with encoding():  # of a batch, for only that gives up Python's lock
        ids: list[int] = hf.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
    if len(text) >= _HUGE:
        return_free_memory()
    return ids


def decode(hf: tokenizers.Tokenizer, token_ids: list[int], skip_special_tokens: bool) -> str:
    """The text of ``token_ids``; of many, other Python threads run meanwhile. Raises GenerationError."""
    with decoding():
        if len(token_ids) <= _SHORT:
            return str(hf.decode(token_ids, skip_special_tokens=skip_special_tokens))
        return str(hf.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)[0])


@dataclass(frozen=True, slots=True)
class LongestToken:
    """``characters``: of a text, the most that one token stands for, besides the ``uncounted`` ones, of which the
    tokenizer may drop any number or add it to a token.
    """

    characters: int
    uncounted: str

    def fewest_tokens(self, text: str) -> int:
        """Fewer than that ``text`` cannot become."""
        num_counted = len(text) - sum(text.count(char) for char in self.uncounted)
        return math.ceil(num_counted / self.characters)


def check_text(longest: LongestToken | None, text: str, max_tokens: int | None, limit: int) -> None:
    """Raise ContextLengthError for a text of which it is certain, untokenized, that ``limit`` tokens cannot hold it."""
    fewest = 0 if longest is None else longest.fewest_tokens(text)
    if fewest >= limit:
        check_length(fewest, max_tokens, limit)


def longest_token(hf: tokenizers.Tokenizer) -> LongestToken | None:
    """How much of a text one token may stand for; None where there is no bound, or none is known.

    Unbounded: a run of unknown characters that becomes one token or none, texts that a normalizer or pre-tokenizer
    shortens by a pattern. Only byte pairs are looked at: other vocabularies have an unknown token for whole words.
    """
    model = hf.model
    if not isinstance(model, tokenizers.models.BPE):
        return None
    try:
        parts = [*_parts(hf.normalizer, "normalizers"), *_parts(hf.pre_tokenizer, "pretokenizers")]
    except Exception:  # noqa: BLE001 - parts written in Python cannot be looked into
        return None
    added, vocab = hf.get_added_tokens_decoder().values(), hf.get_vocab(with_added_tokens=True)
    unknown = _unknown(model, vocab, any(part["type"] == "ByteLevel" for part in parts))
    shrinks = [_shrinks(part) for part in parts]
    if unknown is None or None in shrinks:
        return None
    drops = any(part["type"] in _DROP_SPACES for part in parts) or any(token.lstrip or token.rstrip for token in added)
    normalized = [] if hf.normalizer is None else [hf.normalizer.normalize_str(token.content) for token in added]
    longest = max(map(len, [*vocab, *normalized]))
    uncounted = "".join({*unknown, *(_SPACES + _MORE_SPACES if drops else "")})
    return LongestToken(longest * math.prod(factor or 1 for factor in shrinks), uncounted)


def _parts(component: Any, name: str) -> list[Mapping[str, Any]]:
    """A normalizer or pre-tokenizer as its parts; ``name`` is where a sequence has them."""
    waiting = [] if component is None else [json.loads(component.__getstate__())]
    found = []
    while waiting:
        part = waiting.pop()
        if part["type"] == "Sequence":
            waiting += part[name]
        else:
            found.append(part)
    return found


_KEEP = frozenset(
    ("NFD", "NFKD", "Lowercase", "Prepend", "ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "FixedLength")
)
_DROP_SPACES = frozenset(("Strip", "Whitespace", "WhitespaceSplit", "BertPreTokenizer"))


def _shrinks(part: Mapping[str, Any]) -> int | None:
    """Of how many characters ``part`` may make one; None for any number."""
    kind = part["type"]
    if kind in ("NFC", "NFKC"):
        return _COMPOSED
    if kind == "Replace":
        old, new = part["pattern"].get("String"), part["content"]
        return None if old is None or not new else max(1, math.ceil(len(old) / len(new)))
    if kind in ("Split", "Punctuation"):
        return None if part["behavior"] == "Removed" else 1
    return 1 if kind in _KEEP | _DROP_SPACES else None


def _unknown(model: Any, vocab: Mapping[str, int], byte_level: bool) -> str | None:
    """The characters that may become no token, or any number of them one; None where these are not a few."""
    if model.unk_token is not None and model.unk_token in vocab and not model.fuse_unk:
        return ""
    if model.byte_fallback and all(f"<0x{byte:02X}>" in vocab for byte in _UTF8_BYTES):
        return ""
    missing = {byte for char, byte in byte_alphabet().items() if byte in _UTF8_BYTES and char not in vocab}
    if not byte_level or missing & _CONTINUATION:
        return None
    return "".join(chr(byte) for byte in missing if byte < 0x80)  # of others the vocabulary has at least the last byte


@cache
def byte_alphabet() -> dict[str, int]:
    """Characters that stand for bytes in byte-level vocabularies: those that can be seen for themselves."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    own = {char: ord(char) for char in alphabet if ord(char) < 256}
    others = sorted(set(range(256)) - set(own.values()))
    return own | dict(zip(alphabet[len(own) :], others, strict=True))
