"""Incremental text of one completion: whole characters only, stop strings cut and never shown."""

from collections.abc import Sequence
from typing import NamedTuple

from engine.params.sampling_params import SamplingParams
from engine.text.tokens.text_stream import DecodingTokenizer, TextStream


class DetokenizerStep(NamedTuple):
    """What one step showed. ``stop_reason`` is the stop string that was met, else None.

    ``num_tokens_kept`` counts the step's tokens up to the one that completed the stop string; those
    after it are to be dropped.
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
        self._stream = completion_stream(tokenizer, prompt_token_ids, params) if params.detokenize else None
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """Everything shown so far."""
        return "".join(self._parts)

    def step(
        self, token_ids: Sequence[int], *, finished: bool = False, ends_on_stop_token: bool = False
    ) -> DetokenizerStep:
        """Take the completion's next tokens and give the text that can be shown.

        ``finished`` means that no token follows: what was held back is released.
        ``ends_on_stop_token`` means that the last token is an EOS or stop token: its text is shown
        only with ``include_stop_str_in_output`` (and is never searched for stop strings). After a
        ``stop_reason`` the completion is over and nothing may be fed. Raises GenerationError where the tokenizer fails;
        there is no more text then.
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

    def next_text(self, token_id: int) -> str | None:
        """As :meth:`step`, for one token of a completion that goes on; None where stop strings are searched for."""
        if self._params.stop:
            return None
        if self._stream is None:
            return ""
        self._num_tokens += 1
        text = self._stream.step(token_id)
        self._parts.append(text)
        return text

    def token_text(self, token_id: int) -> str:
        """One token's text by itself, for ``decoded_token`` of logprobs."""
        return self._tokenizer.token_text(token_id)

    def _decode(self, stream: TextStream, token_ids: Sequence[int], ends_on_stop_token: bool) -> DetokenizerStep:
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

    def _finish(self, stream: TextStream, step: DetokenizerStep) -> DetokenizerStep:
        check = self._num_tokens > self._params.min_tokens
        text, met = self._stops.feed(stream.flush(), check=check)
        if met is None:
            text += self._stops.flush()
        return DetokenizerStep(step.text_delta + text, met, step.num_tokens_kept)


def completion_stream(
    tokenizer: DecodingTokenizer, prompt_token_ids: Sequence[int], params: SamplingParams
) -> TextStream:
    """The stream that makes a completion's text, before stop strings are cut."""
    skip = params.skip_special_tokens
    joined = not (skip or params.spaces_between_special_tokens)
    return TextStream(tokenizer, prompt_token_ids, skip_special_tokens=skip, join_special_tokens=joined)
