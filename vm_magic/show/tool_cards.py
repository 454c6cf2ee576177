"""A tool call and its outcome, as a card and as a line of text. All of it is the model's: escaped."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.format.text import shortened
from vm_magic.show.token_html import escaped

_CARD = (
    "border:1px solid #80808059;border-left:3px solid {colour};border-radius:4px;padding:4px 10px;margin:6px 0;"
    "font-size:13px"
)
_PRE = (
    "white-space:pre-wrap;overflow-wrap:break-word;margin:2px 0 0;padding:0;max-height:12em;overflow:auto;"
    "font-size:12px;background:transparent;word-break:normal"
)
_BLUE, _RED, _GREY = "#1e88e5", "#e53935", "#80808080"
_LONGEST_ARGUMENT = 200
_LONGEST_LINE = 300


@dataclass(frozen=True)
class ToolOutcome:
    """What a call gave: ``text`` goes to the model. ``running`` while the function is at work."""

    text: str = ""
    failed: bool = False
    seconds: float | None = None
    running: bool = False


def call_text(call: Mapping[str, Any]) -> str:
    """``name(argument=value, …)``; arguments that are not a JSON object as they are."""
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"] or "{}")
        given = ", ".join(f"{name}={shortened(repr(value), _LONGEST_ARGUMENT)}" for name, value in arguments.items())
    except (ValueError, AttributeError, RecursionError):  # not JSON, not an object, nested without end
        given = shortened(function["arguments"], _LONGEST_ARGUMENT)
    return f"{function['name']}({given})"


def call_line(call: Mapping[str, Any], outcome: ToolOutcome | None) -> str:
    """The call, and its result behind an arrow, in one line."""
    if outcome is None or outcome.running:
        return call_text(call)
    result = shortened(" ".join(outcome.text.split()), _LONGEST_LINE)
    return f"{call_text(call)} → {'× ' if outcome.failed else ''}{result}"


def call_card(call: Mapping[str, Any], outcome: ToolOutcome | None) -> str:
    """The call as HTML in one line, so that it can stand in Markdown."""
    head = f"<code>{escaped(call_text(call))}</code>"
    if outcome is None:
        return _card(_GREY, head, "")
    if outcome.running:
        return _card(_GREY, f'{head} <span style="opacity:0.6">running …</span>', "")
    if outcome.seconds is not None:
        head += f' <span style="opacity:0.6">{outcome.seconds:.2f} s</span>'
    mark = "× " if outcome.failed else ""
    body = f'<pre style="{_PRE}">{mark}{escaped(outcome.text)}</pre>'
    return _card(_RED if outcome.failed else _BLUE, head, body)


def _card(colour: str, head: str, body: str) -> str:
    return f'<div style="{_CARD.format(colour=colour)}"><div>{head}</div>{body}</div>'
