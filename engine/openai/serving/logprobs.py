"""Log-probabilities in the shapes of the two APIs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.outputs import Logprob, LogprobsAtPosition
from engine.text.tokens.text_stream import TextStream
from engine.text.tokens.tokenizer import Tokenizer

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON lacks (vLLM's number)."""


@dataclass(frozen=True)
class TokenNames:
    """How tokens are written: as text, or as ``token_id:N`` where a client asks for it."""

    tokenizer: Tokenizer
    as_token_ids: bool = False

    def of(self, token_id: int, text: str | None = None) -> str:
        """The token's name; ``text`` is what it shows at its place, where that is known."""
        if self.as_token_ids:
            return f"token_id:{token_id}"
        return self.tokenizer.token_text(token_id) if text is None else text


@dataclass(frozen=True, slots=True)
class PlacedToken:
    """A token at its place: ``offset`` counts the characters of the text before it.

    A character that several tokens make up is the last one's, the names of the others are empty, as in vLLM; but each
    has its own ``utf8``.
    """

    id: int
    name: str
    utf8: bytes
    offset: int


class CompletionTokens:
    """Places a completion's tokens as they come: their texts make up its text, which begins at ``offset``."""

    def __init__(self, names: TokenNames, stream: TextStream, offset: int = 0) -> None:
        self._names = names
        self._stream = stream
        self._offset = offset

    def place(self, token_ids: Sequence[int], *, last: bool) -> list[PlacedToken]:
        """The next tokens; after the ``last`` ones, what waits for the rest of a character shows as U+FFFD."""
        placed: list[PlacedToken] = []
        for token_id in token_ids:
            text = self._stream.step(token_id)
            if last and len(placed) == len(token_ids) - 1:
                text += self._stream.flush()
            placed.append(_placed(self._names, token_id, text, self._offset))
            self._offset += len(text)
        return placed


def prompt_tokens(names: TokenNames, token_ids: Sequence[int], text: str) -> list[PlacedToken]:
    """The tokens of a prompt in its ``text``, which may lack special tokens that encoding added."""
    placed: list[PlacedToken] = []
    offset = 0
    stream = TextStream(names.tokenizer, skip_special_tokens=False)
    for position, token_id in enumerate(token_ids):
        part = stream.step(token_id) + (stream.flush() if position == len(token_ids) - 1 else "")
        here = next((one for one in (part, part.lstrip(" ")) if text.startswith(one, offset)), None)
        if here is None:
            here = "" if token_id in names.tokenizer.special_ids else part
        placed.append(_placed(names, token_id, here, min(offset, len(text))))
        offset += len(here)
    return placed


def _placed(names: TokenNames, token_id: int, text: str, offset: int) -> PlacedToken:
    if token_id in names.tokenizer.special_ids:
        own = names.tokenizer.token_text(token_id)
        return PlacedToken(token_id, names.of(token_id), own.encode(), offset)
    utf8 = names.tokenizer.token_bytes(token_id)
    if utf8.lstrip() == text.encode():  # the first of a text lost its space
        utf8 = text.encode()
    return PlacedToken(token_id, names.of(token_id, text), utf8, offset)


def chat_logprobs(
    tokens: Sequence[PlacedToken], positions: Sequence[LogprobsAtPosition], num_top: int, names: TokenNames
) -> dict[str, Any]:
    """The chat API's ``logprobs``: one entry per token with its ``num_top`` most likely ones (-1: all)."""
    return {
        "content": [
            {
                **_chat_entry(token.id, at[token.id], token, names),
                "top_logprobs": [_chat_entry(other, logprob, token, names) for other, logprob in _top(at, num_top)],
            }
            for token, at in zip(tokens, positions, strict=True)
        ],
        "refusal": None,
    }


def completion_logprobs(
    tokens: Sequence[PlacedToken],
    positions: Sequence[LogprobsAtPosition | None],
    num_top: int,
    names: TokenNames,
) -> dict[str, Any]:
    """The completion API's ``logprobs``: parallel lists. A position without values (a prompt's first) is null."""
    return {
        "text_offset": [token.offset for token in tokens],
        "token_logprobs": [
            _finite(at[token.id].logprob) if at else None for token, at in zip(tokens, positions, strict=True)
        ],
        "tokens": [token.name for token in tokens],
        "top_logprobs": [
            _by_name(token, at, num_top, names) if at else None for token, at in zip(tokens, positions, strict=True)
        ],
    }


def prompt_logprobs(positions: Sequence[LogprobsAtPosition | None] | None) -> list[dict[str, Any] | None] | None:
    """vLLM's ``prompt_logprobs``: token id -> logprob, rank and text, at each position."""
    if positions is None:
        return None
    return [
        {
            str(token_id): {
                "logprob": _finite(logprob.logprob),
                "rank": logprob.rank,
                "decoded_token": logprob.decoded_token,
            }
            for token_id, logprob in at.items()
        }
        if at
        else None
        for at in positions
    ]


def _chat_entry(token_id: int, logprob: Logprob, taken: PlacedToken, names: TokenNames) -> dict[str, Any]:
    here = token_id == taken.id
    name, utf8 = (taken.name, taken.utf8) if here else (names.of(token_id), names.tokenizer.token_bytes(token_id))
    return {"token": name, "logprob": _finite(logprob.logprob), "bytes": list(utf8)}


def _by_name(taken: PlacedToken, at: LogprobsAtPosition, num_top: int, names: TokenNames) -> dict[str, float]:
    """Values by name. Where tokens share one, it is the likelier's: so the largest value is the likeliest token's."""
    found: dict[str, float] = {}
    chosen: Iterable[tuple[int, Logprob]] = [*_top(at, num_top), (taken.id, at[taken.id])]
    for token_id, logprob in chosen:
        name = taken.name if token_id == taken.id else names.of(token_id)
        found[name] = max(_finite(logprob.logprob), found.get(name, LOWEST_LOGPROB))
    return found


def _top(at: LogprobsAtPosition, num_top: int) -> list[tuple[int, Logprob]]:
    ordered = sorted(at.items(), key=lambda item: -item[1].logprob)
    return ordered if num_top < 0 else ordered[:num_top]


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
