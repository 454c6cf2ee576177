"""Incremental text of one completion: whole characters only, stop strings cut and never shown."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import tokenizers
from tokenizers.decoders import DecodeStream

from engine.params.sampling_params import SamplingParams

REPLACEMENT = "\ufffd"
_PRIME_TOKENS = range(4, 25)
"""How many prompt tokens the stream starts from: the fewest that decode to whole characters."""


class DecodingTokenizer(Protocol):
    """What a :class:`Detokenizer` needs of a tokenizer."""

    @property
    def hf(self) -> tokenizers.Tokenizer:
        """The underlying ``tokenizers.Tokenizer``."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens."""

    def token_text(self, token_id: int) -> str:
        """One token's own text, for ``decoded_token``."""


@dataclass(frozen=True, slots=True)
class DetokenizerStep:
    """What one step showed. ``stop_reason`` is the stop string that was met, else None.

    ``num_tokens_kept`` counts the step's tokens up to the one that completed the stop string; the
    ones behind it are to be dropped.
    """

    text_delta: str
    stop_reason: str | None
    num_tokens_kept: int


class StopStrings:
    """Finds the first stop string in a text that comes in pieces.

    The match that ends first wins, of several that end together the longest: so the result does
    not depend on how the text was cut. Text that may still become a stop string is held back.
    """

    def __init__(self, stop: Sequence[str], *, include_in_output: bool = False) -> None:
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._include = include_in_output
        self._held = ""

    def feed(self, text: str, *, check: bool = True) -> tuple[str, str | None]:
        """The text to show now, and the stop string if one was met.

        Without ``check``, no match may end in this piece, though one may begin in it.
        """
        window = self._held + text
        match = self._first_match(window, len(self._held)) if check else None
        if match is not None:
            begin, end, found = match
            self._held = ""
            return window[: end if self._include else begin], found
        num_shown = len(window) - self._num_held_back(window)
        self._held = window[num_shown:]
        return window[:num_shown], None

    def flush(self) -> str:
        """The text held back, when nothing more comes."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, window: str, num_old: int) -> tuple[int, int, str] | None:
        best: tuple[int, int, str] | None = None
        for stop in self._stop:
            begin = window.find(stop, max(0, num_old - len(stop) + 1))
            if begin < 0:
                continue
            match = (begin, begin + len(stop), stop)
            if best is None or (match[1], match[0]) < (best[1], best[0]):
                best = match
        return best

    def _num_held_back(self, window: str) -> int:
        for size in range(min(self._longest - 1, len(window)), 0, -1):
            if any(len(stop) > size and window.endswith(stop[:size]) for stop in self._stop):
                return size
        return 0


class _PlainStream:
    """Token ids to text, an incomplete character held back until its last byte or :meth:`flush`."""

    def __init__(self, tokenizer: DecodingTokenizer, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._hf = tokenizer.hf
        self._skip_special = params.skip_special_tokens
        self._join_special = not (params.skip_special_tokens or params.spaces_between_special_tokens)
        self._last_special = False
        self._pending: list[int] = []
        self._stream: DecodeStream
        self._restart(self._prime(prompt_token_ids))

    def step(self, token_id: int) -> str:
        """Text that became whole with this token."""
        self._pending.append(token_id)
        try:
            text = self._stream.step(self._hf, token_id)
        except Exception as error:
            # tokenizers has no narrower class. Bytes that were a character become invalid when more
            # bytes join their run; what was shown stays, the new tokens are decoded by themselves.
            if "Invalid prefix" not in str(error):
                raise
            text = self._decode(self._pending)
            self._restart(self._pending)
        if text is None:
            return ""
        self._context, self._pending = self._pending, []
        return self._joined(token_id, text) if self._join_special else text

    def flush(self) -> str:
        """The bytes held back, as U+FFFD where they are no character."""
        if not self._pending:
            return ""
        known = self._decode(self._context)
        whole = self._decode([*self._context, *self._pending])
        text = whole.removeprefix(known) if whole.startswith(known) else self._decode(self._pending)
        self._pending = []
        return text

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._hf.decode(token_ids, skip_special_tokens=self._skip_special)

    def _restart(self, context: Sequence[int]) -> None:
        self._context = list(context)
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


class Detokenizer:
    """Text of one completion, built in the engine thread as its tokens come.

    The concatenated deltas are the same text however the tokens were cut into steps. Stop strings
    count only if they end after the first ``min_tokens`` tokens. With ``detokenize=False`` all
    text is empty.
    """

    def __init__(self, tokenizer: DecodingTokenizer, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._params = params
        self._num_tokens = 0
        self._stops = StopStrings(params.stop, include_in_output=params.include_stop_str_in_output)
        self._stream = _PlainStream(tokenizer, prompt_token_ids, params) if params.detokenize else None
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """Everything shown so far."""
        return "".join(self._parts)

    def step(
        self, token_ids: Sequence[int], *, finished: bool = False, ends_on_stop_token: bool = False
    ) -> DetokenizerStep:
        """Take the completion's next tokens and give the text that can be shown.

        ``finished`` says that no token follows: what was held back is released.
        ``ends_on_stop_token`` says that the last token is an EOS or stop token: its text is shown
        only with ``include_stop_str_in_output`` (and is never searched for stop strings). After a
        ``stop_reason`` the completion is over and nothing may be fed.
        """
        if self._stream is None:
            self._num_tokens += len(token_ids)
            return DetokenizerStep("", None, len(token_ids))
        step = self._decode(self._stream, token_ids, ends_on_stop_token)
        if step.stop_reason is None and finished:
            step = self._finish(self._stream, step)
        if step.text_delta:
            self._parts.append(step.text_delta)
        return step

    def token_text(self, token_id: int) -> str:
        """One token's text by itself, for ``decoded_token`` of logprobs."""
        return self._tokenizer.token_text(token_id)

    def _decode(self, stream: _PlainStream, token_ids: Sequence[int], ends_on_stop_token: bool) -> DetokenizerStep:
        shown: list[str] = []
        num_searched = len(token_ids) - 1 if ends_on_stop_token else len(token_ids)
        for position, token_id in enumerate(token_ids):
            self._num_tokens += 1
            if position < num_searched or self._params.include_stop_str_in_output:
                check = position < num_searched and self._num_tokens > self._params.min_tokens
                text, met = self._stops.feed(stream.step(token_id), check=check)
                shown.append(text)
                if met is not None:
                    return DetokenizerStep("".join(shown), met, position + 1)
        return DetokenizerStep("".join(shown), None, len(token_ids))

    def _finish(self, stream: _PlainStream, step: DetokenizerStep) -> DetokenizerStep:
        check = self._num_tokens > self._params.min_tokens
        text, met = self._stops.feed(stream.flush(), check=check)
        if met is None:
            text += self._stops.flush()
        return DetokenizerStep(step.text_delta + text, met, step.num_tokens_kept)


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
