"""System messages where a template refuses them: joined to what it takes."""

from collections.abc import Mapping, Sequence
from typing import Any

from engine.text.template.probes import SystemPlace

Message = Mapping[str, Any]


def fold_system_messages(messages: Sequence[Message], place: SystemPlace) -> tuple[list[Message], bool]:
    """``messages`` with system messages only at ``place``, and whether one had to move.

    Leading ones become one. Those before the first answer join it, as in vLLM's Messages route. Later ones stay where
    they are, as text of the turn beside them: at the front each would change the prompt from its beginning on, and the
    prefix cache would hold nothing of a long conversation any more.
    """
    count = next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))
    lead, rest = list(messages[:count]), list(messages[count:])
    moved = place != "anywhere" and any(message["role"] == "system" for message in rest)
    if moved:
        answer = next((i for i, message in enumerate(rest) if message["role"] == "assistant"), len(rest))
        lead += [message for message in rest[:answer] if message["role"] == "system"]
        rest = [message for message in rest[:answer] if message["role"] != "system"] + _beside(rest[answer:])
    texts = [message["content"] for message in lead if message.get("content")]
    if not texts:
        return rest, moved
    if place == "nowhere":
        return _with_text(_joined(*texts), rest), True
    return [{**lead[0], "content": _joined(*texts)}, *rest], moved


def _beside(messages: Sequence[Message]) -> list[Message]:
    """Each system message behind the user's or tool's message before it, else before that after it."""
    found: list[Message] = []
    waiting: list[Any] = []
    for message in messages:
        if message["role"] == "system" and not message.get("content"):
            continue
        if message["role"] != "system":
            found += _with_text(_joined(*waiting), [message]) if waiting else [message]
            waiting = []
        elif found and found[-1]["role"] in ("user", "tool"):
            found[-1] = {**found[-1], "content": _joined(found[-1].get("content"), _marked(message))}
        else:
            waiting.append(_marked(message))
    return found + _with_text(_joined(*waiting), []) if waiting else found


def _with_text(text: Any, messages: Sequence[Message]) -> list[Message]:
    """``messages`` with ``text`` before the user's words."""
    if messages and messages[0]["role"] in ("user", "tool"):
        return [{**messages[0], "content": _joined(text, messages[0].get("content"))}, *messages[1:]]
    return [{"role": "user", "content": text}, *messages]


def _marked(message: Message) -> Any:
    """The content in the marks in which agents put what does not come from their user."""
    return _joined("<system-reminder>", message.get("content"), "</system-reminder>", between="\n")


def _joined(*contents: Any, between: str = "\n\n") -> Any:
    """Contents, strings or lists of parts, as one."""
    given = [content for content in contents if content]
    if all(isinstance(content, str) for content in given):
        return between.join(given)
    return [part for content in given for part in (content if isinstance(content, list) else [content])]
