"""Which token of a sequence shows which part of its text: for log-probabilities, scores and token views.

A :class:`~engine.text.tokens.text_stream.TextStream` gives text as soon as it is certain, whichever token brought it;
here each token has its own text, and invalid bytes wait for a few tokens only.
"""

from collections.abc import Callable, Iterable, Sequence

from engine.format.text import REPLACEMENT

_LONGEST = 8
"""Tokens that may wait for one another: a character has at most four bytes; a longer run of bytes is not text."""


class TokenTexts:
    """Takes tokens in their order; their texts make up the whole text.

    A character that several tokens make up is the last one's; the others' texts end before it, often empty.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._context_text = ""
        self._open: list[int] = []
        self._shown = ""

    def step(self, token_id: int) -> str:
        """The text that became whole with this token."""
        self._open.append(token_id)
        text = self._open_text()
        if text.endswith(REPLACEMENT) and len(self._open) < _LONGEST:
            whole = text.rstrip(REPLACEMENT)
            shown, self._shown = self._shown, whole
            return whole.removeprefix(shown)
        return self._close(text)

    def rest(self) -> str:
        """What waits for more, as U+FFFD where it is not a character: the last token's, when none follows."""
        return self._close(self._open_text()) if self._open else ""

    def _open_text(self) -> str:
        # Decoders strip a leading space from the first token of a text: decode together with the tokens before.
        whole = self._decode([*self._context, *self._open])
        if whole.startswith(self._context_text):
            return whole.removeprefix(self._context_text)
        return self._decode(self._open)

    def _close(self, text: str) -> str:
        shown, self._shown = self._shown, ""
        self._context, self._open = self._open, []
        self._context_text = self._decode(self._context)
        if self._context_text.endswith(REPLACEMENT):  # later bytes could change its text
            self._context, self._context_text = [], ""
        return text.removeprefix(shown)


def token_texts(token_ids: Iterable[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The texts of all tokens of a sequence."""
    reader = TokenTexts(decode)
    texts = [reader.step(token_id) for token_id in token_ids]
    rest = reader.rest()
    return [*texts[:-1], texts[-1] + rest] if texts else []
