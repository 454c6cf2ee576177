"""Where a model's thought begins and ends, found in its tokens as they come.

The budget of a thought is kept by :mod:`engine.text.guide.completion_guide`.
"""

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass

from engine.text.parse.reasoning_parsers import HARMONY, REASONING_PARSERS
from engine.text.tokens.tokenizer import Tokenizer

_PROMPT_TAIL = 2048
"""Prompt tokens searched for an open thought: a prompt may end in a thought to be continued."""
_FINAL = "<|channel|>final<|message|>"


@dataclass(frozen=True, slots=True)
class ThoughtMarkers:
    """Texts that begin and end a thought; ``injected`` are the tokens that end it from outside.

    ``from_start``: a model that has not begun its answer is thinking (gpt-oss). ``anywhere``: a
    thought may also begin in the middle of an answer.
    """

    start: str
    end: str
    injected: tuple[int, ...]
    parser: str | None = None
    from_start: bool = False
    anywhere: bool = False


def thought_markers(parser: str | None, config: Mapping[str, str], tokenizer: Tokenizer) -> ThoughtMarkers | None:
    """From the reasoning parser and ``--reasoning-config``; None for a model that does not think.

    ``reasoning_end_str`` may begin with a sentence that leads to the answer.
    """
    known = REASONING_PARSERS.get(parser or "")
    start, end = (known.start, known.end) if known is not None else ("", "")
    injected = end
    if known is HARMONY:
        end, injected = _FINAL, f"{known.end}<|start|>assistant{_FINAL}"
    start = config.get("reasoning_start_str", start)
    if "reasoning_end_str" in config:
        injected = config["reasoning_end_str"]
        end = end or _last_mark(injected)
    if not start or not injected:
        return None
    tokens = tuple(tokenizer.encode(injected, add_special_tokens=False))
    return ThoughtMarkers(
        start.strip(),
        end,
        tokens,
        parser if known else None,
        from_start=known is HARMONY,
        anywhere=known is not None and known.anywhere,
    )


def _last_mark(text: str) -> str:
    """The mark at the end of a text such as ``That is enough.</think>``; the text itself if there is none."""
    found = re.search(r"[<\[][^<>\[\]\s]+[>\]]\s*$", text)
    return found.group().strip() if found else text


class ThinkingState(enum.Enum):
    """How far a completion is."""

    BEFORE = enum.auto()
    """Nothing written yet: a thought may begin."""
    THOUGHT = enum.auto()
    ANSWER = enum.auto()


def state_after_prompt(markers: ThoughtMarkers, prompt_token_ids: list[int], tokenizer: Tokenizer) -> ThinkingState:
    """The state in which output begins: templates open a thought, close it, or leave it to the model."""
    tail = tokenizer.decode(prompt_token_ids[-_PROMPT_TAIL:], skip_special_tokens=False)
    if markers.from_start:
        return ThinkingState.ANSWER if tail.rstrip().endswith(markers.end) else ThinkingState.THOUGHT
    if tail.rstrip().endswith(markers.end):
        return ThinkingState.ANSWER
    if markers.parser is not None:
        inside = REASONING_PARSERS[markers.parser].begins_inside(tail)
    else:
        inside = tail.rstrip().endswith(markers.start)
    return ThinkingState.THOUGHT if inside else ThinkingState.BEFORE


class ThoughtTracker:
    """Follows one completion's text from ``state`` on. Counts the thinking tokens after the start marker."""

    def __init__(self, markers: ThoughtMarkers, state: ThinkingState, tokenizer: Tokenizer) -> None:
        self.markers = markers
        self.state = state
        self.num_tokens = 0
        self._text = ""
        self._stream = tokenizer.decode_stream(skip_special_tokens=False)
        self._longest = max(len(markers.start), len(markers.end)) + 64

    def add(self, token_id: int) -> None:
        """Take a token."""
        self._text = (self._text + self._stream.step(token_id))[-self._longest :]
        if self.state is ThinkingState.THOUGHT:
            self.num_tokens += 1
            if self.markers.end in self._text:
                self.end()
        elif self.markers.start in self._text and (self.state is ThinkingState.BEFORE or self.markers.anywhere):
            self.state, self._text = ThinkingState.THOUGHT, ""
        elif self.state is ThinkingState.BEFORE and self._is_answer():
            self.state = ThinkingState.ANSWER

    def end(self) -> None:
        """The thought is over."""
        self.state, self._text = ThinkingState.ANSWER, ""

    def _is_answer(self) -> bool:
        """Whether the text so far can no longer become a start marker."""
        text = self._text.lstrip()
        return bool(text) and not self.markers.start.startswith(text)
