"""Incremental detokenization: the text of a sequence of tokens while it grows."""

from collections.abc import Sequence
from typing import Protocol

import tokenizers
from tokenizers.decoders import DecodeStream

from engine.format.text import REPLACEMENT
from engine.text.tokens.library_errors import decoding, not_decoded, of_library

_PRIME_TOKENS = range(4, 25)
"""How many prompt tokens the stream starts from: the fewest that decode to whole characters."""


class DecodingTokenizer(Protocol):
    """What incremental decoding needs of a tokenizer."""

    @property
    def hf(self) -> tokenizers.Tokenizer:
        """The underlying ``tokenizers.Tokenizer``."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens."""

    def token_text(self, token_id: int) -> str:
        """One token's own text, for ``decoded_token``."""


class TextStream:
    """Decodes a growing sequence token by token; an incomplete character waits for its last byte or :meth:`flush`.

    ``prompt_token_ids`` stand before the sequence. ``join_special_tokens`` removes the space that a tokenizer without
    a decoder puts between two special tokens.
    """

    def __init__(
        self,
        tokenizer: DecodingTokenizer,
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool,
        join_special_tokens: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._hf = tokenizer.hf
        self._skip_special = skip_special_tokens
        self._join_special = join_special_tokens
        self._last_special = False
        self._pending: list[int] = []
        self._stream: DecodeStream
        self._restart(self._prime(prompt_token_ids))

    def step(self, token_id: int) -> str:
        """Text that became whole with this token. Raises GenerationError where the tokenizer fails."""
        self._pending.append(token_id)
        try:
            text = self._stream.step(self._hf, token_id)
        except BaseException as error:
            if not of_library(error):
                raise
            # tokenizers has no narrower class. Bytes that were a character become invalid when more
            # bytes join their run; what was shown stays, the new tokens are decoded by themselves.
            if "Invalid prefix" not in str(error):
                raise not_decoded(error) from None
            text = self._decode(self._pending)
            self._restart(self._pending)
        if text is None:
            return ""
        self._context, self._pending = self._pending, []
        return self._joined(token_id, text) if self._join_special else text

    def flush(self) -> str:
        """The bytes held back, as U+FFFD where they are not a character."""
        if not self._pending:
            return ""
        known = self._decode(self._context)
        whole = self._decode([*self._context, *self._pending])
        text = whole.removeprefix(known) if whole.startswith(known) else self._decode(self._pending)
        self._pending = []
        return text

    def _decode(self, token_ids: Sequence[int]) -> str:
        with decoding():
            return self._hf.decode(token_ids, skip_special_tokens=self._skip_special)

    def _restart(self, context: Sequence[int]) -> None:
        self._context = list(context)
        with decoding():
            self._stream = DecodeStream(self._context, self._skip_special)

    def _prime(self, prompt_token_ids: Sequence[int]) -> Sequence[int]:
        # Decoders strip a leading space from the first token of a text: start inside the prompt.
        for size in _PRIME_TOKENS:
            suffix = prompt_token_ids[-size:]
            if REPLACEMENT not in self._decode(suffix):
                return suffix
            if size >= len(prompt_token_ids):
                break
        return ()

    def _joined(self, token_id: int, text: str) -> str:
        special = token_id in self._tokenizer.special_ids
        if special and self._last_special:
            content = self._hf.id_to_token(token_id) or ""
            if text.endswith(" " + content):
                text = text.removesuffix(" " + content) + content
        self._last_special = special
        return text
