"""Where a model's thought begins and ends, found in its tokens as they come.

The output parser alone knows it: a tracker follows one of its own, made as the reply's is, so a budget and the reply
never disagree. The budget of a thought is kept by :mod:`engine.text.guide.completion_guide`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from engine.text.parse.output_parser import OutputParser, ThinkingState
from engine.text.parse.reasoning_parsers import REASONING_PARSERS, ReasoningParser
from engine.text.tokens.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class ThoughtMarkers:
    """The marks that begin and end a thought; ``injected`` are the tokens that end it from outside."""

    reasoning: ReasoningParser
    injected: tuple[int, ...]


def thought_markers(parser: str | None, config: Mapping[str, str], tokenizer: Tokenizer) -> ThoughtMarkers | None:
    """From the reasoning parser and ``--reasoning-config``; None for a model that does not think.

    ``reasoning_end_str`` may begin with a sentence that leads to the answer.
    """
    reasoning = REASONING_PARSERS.get(parser or "")
    injected = config.get("reasoning_end_str", "")
    if reasoning is None:
        start = config.get("reasoning_start_str", "").strip()
        if not start or not injected:
            return None
        reasoning = ReasoningParser(start, _last_mark(injected))
    injected = injected or reasoning.end + reasoning.answers
    return ThoughtMarkers(reasoning, tuple(tokenizer.encode(injected, add_special_tokens=False)))


def _last_mark(text: str) -> str:
    """The mark at the end of a text such as ``That is enough.</think>``; the text itself if there is none."""
    found = re.search(r"[<\[][^<>\[\]\s]+[>\]]\s*$", text)
    return found.group().strip() if found else text.strip()


class ThoughtTracker:
    """Follows one completion. ``parser`` is fresh: it begins where the prompt ends.

    ``num_tokens`` counts the tokens of thoughts, the start mark's not among them.
    """

    def __init__(self, markers: ThoughtMarkers, parser: OutputParser, tokenizer: Tokenizer) -> None:
        self.markers = markers
        self.state = parser.thinking_state
        self.num_tokens = 0
        self._parser = parser
        self._stream = tokenizer.decode_stream(skip_special_tokens=not parser.needs_special_tokens)
        self._follows = True

    @property
    def may_be_ended(self) -> bool:
        """Whether an end mark may be written now: inside a thought, and in nothing that may become a call."""
        return self._parser.in_thought

    def add(self, token_id: int) -> None:
        """Take a token."""
        if not self._follows:
            return
        if self.state is ThinkingState.THOUGHT:
            self.num_tokens += 1
        self._parser.feed(self._stream.step(token_id))
        self.state = self._parser.thinking_state
        self._follows = self.state is not ThinkingState.ANSWER or self._parser.may_think_again
