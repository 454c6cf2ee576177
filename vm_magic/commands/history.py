"""``history`` and ``reset``: conversations, one with all its messages or the list of them."""

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from IPython.core.error import UsageError

from engine.format.names import closest, did_you_mean
from vm_magic.commands.base import Context, LineCommand
from vm_magic.commands.parser import CommandParser
from vm_magic.show.safe_markdown import safe_markdown
from vm_magic.show.tables import Table
from vm_magic.show.terminal import say
from vm_magic.show.token_html import escaped
from vm_magic.show.tool_cards import ToolOutcome, call_card, call_line
from vm_magic.state import session as sessions
from vm_magic.state.chat_flags import add_conversation_name
from vm_magic.state.conversation import DEFAULT_CONVERSATION, Conversation, Message

_LONGEST = 60


def conversation_names(*more: str) -> list[str]:
    """The conversations that there are, after the names in ``more``."""
    session = sessions.peek_session()
    return list(dict.fromkeys([*more, *(() if session is None else session.conversations)]))


class Reset(LineCommand):
    """Forgets messages."""

    help = "forget a conversation"

    def add_arguments(self, parser: CommandParser) -> None:
        """Which conversation, or all."""
        add_conversation_name(parser, "--all", "every conversation")

    def execute(self, context: Context, parsed: argparse.Namespace) -> None:
        """Clear the conversation, and say how much was forgotten."""
        known = context.session.conversations
        slip = closest(parsed.name, known) if parsed.name and parsed.name not in known else None
        if slip is not None and not parsed.all:
            raise UsageError(f"no conversation {parsed.name!r} yet; did you mean {slip}?")
        named = [context.session.conversation(parsed.name)]
        for conversation in context.session.conversations.values() if parsed.all else named:
            count = len(conversation.messages)
            conversation.clear()
            say(f"conversation {conversation.name!r}: {count} messages forgotten")

    def arguments(self) -> Iterable[str]:
        """The conversations."""
        return conversation_names(DEFAULT_CONVERSATION)


class History(LineCommand):
    """Shows conversations."""

    help = "show a conversation, or list them all"

    def add_arguments(self, parser: CommandParser) -> None:
        """Which conversation, or the list."""
        add_conversation_name(parser, "--list", "all conversations in a table")

    def execute(self, context: Context, parsed: argparse.Namespace) -> "HistoryView | Table":
        """The conversation's view, or the table."""
        conversations = context.session.conversations
        if parsed.list:
            return conversations_table(conversations)
        return history_view(context.session.conversation(parsed.name), conversations)

    def arguments(self) -> Iterable[str]:
        """The conversations."""
        return conversation_names(DEFAULT_CONVERSATION)


@dataclass(frozen=True)
class HistoryView:
    """A conversation's messages, as text and as Markdown. ``others`` are the names of the other conversations."""

    name: str
    messages: tuple[Message, ...]
    others: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return "\n\n".join([*(f"{m['role']}: {_text(m)}" for m in self._spoken())] or [self._empty()])

    def _repr_markdown_(self) -> str:
        names = escaped(", ".join(self.others))
        others = f"\n\n*other conversations: {names}*" if self.others and self.messages else ""
        return "\n\n".join([*map(self._markdown, self._spoken())] or [escaped(self._empty())]) + others

    def _spoken(self) -> list[Message]:
        """The messages without tools' results, which are shown at their calls."""
        return [message for message in self.messages if message["role"] != "tool"]

    def _results(self) -> dict[str, ToolOutcome]:
        results = [message for message in self.messages if message["role"] == "tool"]
        return {m["tool_call_id"]: ToolOutcome(m["content"], m["content"].startswith("Error: ")) for m in results}

    def _markdown(self, message: Message) -> str:
        results = self._results()
        cards = [call_card(call, results.get(call["id"])) for call in message.get("tool_calls", ())]
        parts = [
            f"**{escaped(message['role'])}**",
            *([safe_markdown(message["content"])] if message["content"] else []),
            *cards,
        ]
        return "\n\n".join(parts)

    def _empty(self) -> str:
        others = did_you_mean(self.name, self.others, f"there are: {', '.join(self.others)}") if self.others else ""
        return f"no messages in conversation {self.name!r} yet{'; ' if others else ''}{others}"


def history_view(conversation: Conversation, all_of_them: Mapping[str, Conversation]) -> HistoryView:
    """One conversation, and the names of the others that have messages."""
    others = tuple(name for name, one in all_of_them.items() if one.messages and one is not conversation)
    return HistoryView(conversation.name, tuple(conversation.messages), others)


def conversations_table(conversations: Mapping[str, Conversation]) -> Table:
    """All conversations that have messages."""
    rows = tuple(
        (one.name, str(len(one.messages)), one.forked_from or "", _last_words(one.messages[-1]))
        for one in conversations.values()
        if one.messages
    )
    return Table(("conversation", "messages", "forked from", "ends with"), rows, "" if rows else "no conversations yet")


def _text(message: Message) -> str:
    calls = [call_line(call, None) for call in message.get("tool_calls", ())]
    return "\n".join([*([message["content"]] if message["content"] else []), *calls])


def _last_words(message: Message) -> str:
    words = " ".join((message["content"] or json.dumps(message.get("tool_calls", ""))).split())
    return words if len(words) <= _LONGEST else f"…{words[-_LONGEST:]}"
