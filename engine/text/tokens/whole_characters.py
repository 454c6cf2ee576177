"""Texts of tokens that share a character: byte-level tokens often hold a part of one, and show U+FFFD alone."""

from collections.abc import Callable, Iterable, Sequence

REPLACEMENT = "\ufffd"
_LONGEST = 8
"""Tokens that may wait for one another: a character has at most four bytes; what goes on longer is no text."""


class WholeCharacters:
    """Tokens in their order to texts that make up the whole text.

    A character that several tokens make up is the last one's; the others' texts end before it, often empty.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._open: list[int] = []
        self._shown = ""

    def step(self, token_id: int) -> str:
        """The text that became whole with this token."""
        self._open.append(token_id)
        text = self._decode(self._open)
        if text.endswith(REPLACEMENT) and len(self._open) < _LONGEST:
            whole = text.rstrip(REPLACEMENT)
            shown, self._shown = self._shown, whole
            return whole.removeprefix(shown)
        return self.rest()

    def rest(self) -> str:
        """What waits for more, as U+FFFD where it is no character: the last token's, when none follows."""
        text = self._decode(self._open).removeprefix(self._shown) if self._open else ""
        self._open, self._shown = [], ""
        return text


def whole_characters(token_ids: Iterable[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The texts of all tokens of a sequence."""
    reader = WholeCharacters(decode)
    texts = [reader.step(token_id) for token_id in token_ids]
    rest = reader.rest()
    return [*texts[:-1], texts[-1] + rest] if texts else []
