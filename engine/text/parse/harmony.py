"""gpt-oss's harmony format: messages on channels, tool calls as messages to a function.

``<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>commentary to=functions.f
<|constrain|>json<|message|>{…}<|call|>``, ``<|channel|>final<|message|>…<|return|>``.
"""

import re
from dataclasses import dataclass

from engine.text.parse.scan.lenient_json import LenientJson
from engine.text.parse.scan.output_sink import OutputSink, ThinkingState
from engine.text.parse.scan.scanner import Markers, MarkupError, Scanner, Steps
from engine.text.parse.tool_parsers.base import ToolParser, ToolSchemas

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>")
_BETWEEN = Markers([_START, _CHANNEL, _MESSAGE, *_ENDS])
_IN_HEADER = Markers([_START, _MESSAGE, "{", *_ENDS])
_IN_BODY = Markers([_START, *_ENDS])
_RECIPIENT = re.compile(r"to=(?:functions\.)?+([^\s<]+)")
_KNOWN_IN_HEADER = re.compile(
    r"<\|start\|>(?:assistant)?|<\|channel\|>\s*(?:analysis|commentary|final)?|to=[^\s<]+|<\|constrain\|>\s*\w*|\bjson\b"
)


@dataclass(frozen=True)
class HarmonyReader:
    """Reads harmony messages. Without ``with_calls`` a message to a function is content.

    ``forced`` reads calls that a grammar demanded: they are JSON in the final message.
    """

    scanner: Scanner
    sink: OutputSink
    schemas: ToolSchemas
    with_calls: bool
    forced: ToolParser | None = None

    def read(self, prompt_suffix: str) -> Steps[None]:
        """The whole output. The prompt may end in a message's header or inside a message."""
        begun = prompt_suffix.rpartition(_START)[2] if _START in prompt_suffix else None
        mark: str | None = _START
        if begun is None or any(end in begun for end in _ENDS):
            mark = yield from self.scanner.until(_BETWEEN, self.sink.content)
        elif _MESSAGE in begun:
            mark = yield from self._body(begun.partition(_MESSAGE)[0])
        elif _CHANNEL not in begun and not (yield from self._header_follows()):
            self._decide(ThinkingState.BEFORE)
            mark = yield from self.scanner.until(_BETWEEN, self.sink.content)
        else:
            mark = yield from self._header(_START + begun)
        while mark is not None:
            if mark in (_START, _CHANNEL):
                mark = yield from self._header(mark)
            elif mark == _MESSAGE:
                mark = yield from self._body("")
            else:
                mark = yield from self.scanner.until(_BETWEEN, self.sink.content)

    def _header_follows(self) -> Steps[bool]:
        """Whether the header continues here: a model may also answer with plain text."""
        self._decide(ThinkingState.THOUGHT, undecided=True)
        return (yield from self.scanner.after_space([_CHANNEL, _MESSAGE, "to="])) is not None

    def _header(self, begun: str) -> Steps[str | None]:
        """A message after its header; returns the mark that ended it. A call's object may follow without a mark."""
        header = begun
        self._decide(ThinkingState.THOUGHT, undecided=True)
        while True:
            parts: list[str] = []
            mark = yield from self.scanner.until(_IN_HEADER, parts.append)
            header += "".join(parts)
            if mark != "{" or _RECIPIENT.search(header):
                break
            header += mark
        if mark is None and self.scanner.cut:
            return None
        words = _stray_words(header).removeprefix(_stray_words(begun)).strip()
        if words:
            self._show_stray(words, header)
        if mark == "{":
            self.scanner.put_back(mark)
        return (yield from self._body(header)) if mark in ("{", _MESSAGE) else mark

    def _show_stray(self, words: str, header: str) -> None:
        if f"{_CHANNEL}analysis" in header:
            self.sink.begin_thought()
            self.sink.reasoning(words)
            self.sink.boundary()
            self._decide(ThinkingState.THOUGHT, undecided=True)
        else:
            self.sink.content(words)

    def _body(self, header: str) -> Steps[str | None]:
        recipient = _RECIPIENT.search(header)
        calls = recipient and self.with_calls and not self.forced
        self._decide(ThinkingState.CALL if calls else ThinkingState.ANSWER)
        if recipient and self.with_calls and (yield from self.scanner.after_space(["{"])) == "{":
            yield from self._arguments(recipient.group(1))
        elif f"{_CHANNEL}analysis" in header:
            self.sink.begin_thought()
            mark = yield from self.scanner.until(_IN_BODY, self.sink.reasoning)
            self.sink.boundary()
            self._decide(ThinkingState.THOUGHT, undecided=True)
            return mark
        elif self.forced and (yield from self.scanner.after_space(tuple(self.forced.bare))):
            yield from self._forced_calls(self.forced)
        return (yield from self.scanner.until(_IN_BODY, self.sink.content))

    def _decide(self, state: ThinkingState, *, undecided: bool = False) -> None:
        """What follows; ``undecided``: as long as no header says otherwise."""
        self.sink.thinking_state, self.sink.undecided = state, undecided

    def _forced_calls(self, forced: ToolParser) -> Steps[None]:
        yield from self.scanner.skip_space()
        self.scanner.at_end = False
        try:
            yield from self.scanner.attempt(forced.read(self.scanner, self.sink, self.schemas, ""))
        except MarkupError:
            self._drop_what_was_cut(demanded=True)  # what is not a call is content

    def _arguments(self, name: str) -> Steps[None]:
        emit = self.sink.call(name)
        self.scanner.at_end = False
        try:
            yield from LenientJson(self.scanner, _ENDS).value(emit)
        except MarkupError:
            self._drop_what_was_cut()  # closed; what is left of the message becomes content
        finally:
            self.sink.boundary()

    def _drop_what_was_cut(self, *, demanded: bool = False) -> None:
        """Half a call that a limit cut off is dropped; where the model itself ended there, its text is kept."""
        if (demanded or self.scanner.cut) and self.scanner.at_end and not self.scanner.holds(_ENDS):
            self.scanner.take_rest()


def _stray_words(header: str) -> str:
    """Words that no header has: the model's own, so they are shown."""
    return _KNOWN_IN_HEADER.sub("", header)
