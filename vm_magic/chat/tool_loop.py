"""A chat in which the model may call functions of the notebook: ask, call, return the results, ask again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from engine.outputs import Reply
from vm_magic.chat.generation import FAILED, INTERRUPTED, Generation
from vm_magic.chat.tools import MAX_RESULT_LENGTH, NotebookTool
from vm_magic.show.errors import Interrupted
from vm_magic.show.reply_text import ReplyText
from vm_magic.show.reply_view import ReplyView
from vm_magic.show.tool_cards import ToolOutcome
from vm_magic.state.conversation import Conversation, Message
from vm_magic.state.session import Session

Ask = Callable[[list[Message], tuple[ReplyText, ...]], Generation]
"""(messages, the turns shown so far) -> the model's next turn, under way."""


class ToolLoop:
    """Follows a reply and those after it while the model calls functions, at most ``max_rounds`` times.

    A call is answered before anything joins the conversation, so that none is left open there. Nothing is called
    that is not in ``tools``.
    """

    def __init__(
        self,
        first: Generation,
        ask: Ask,
        tools: Sequence[NotebookTool],
        max_rounds: int,
        longest: int = MAX_RESULT_LENGTH,
    ) -> None:
        assert first.conversation is not None, "tools are for chats"
        self._generation = first
        self._ask = ask
        self._tools = {tool.name: tool for tool in tools}
        self._max_rounds = max_rounds
        self._longest = longest
        self.conversation: Conversation = first.conversation
        self.stopped_at_limit = False
        self.earlier_replies: tuple[Reply, ...] = ()
        """The replies before the last one."""

    @property
    def session(self) -> Session:
        """The kernel's session."""
        return self._generation.session

    @property
    def stream(self) -> Any:
        """The request under way, or the last one."""
        return self._generation.stream

    def follow(self, view: ReplyView) -> Reply:
        """Show everything in ``view``; the last turn's Reply. ■ ends a request or a function: Interrupted."""
        for number in range(self._max_rounds + 1):
            reply = self._generation.run(view)
            if reply.finish_reason != "tool_calls":
                break
            self.stopped_at_limit = number == self._max_rounds
            shown = self._answer(reply, view)
            if self.stopped_at_limit:
                view.finish(shown)
                return reply
            try:
                self._generation = self._ask(reply.messages, (*shown.earlier, replace(shown, earlier=())))
            except BaseException:
                view.finish(shown, FAILED)
                raise
            self.earlier_replies += (reply,)
        view.finish(self._generation.shown, INTERRUPTED if reply.finish_reason == "abort" else "")
        return reply

    def _answer(self, reply: Reply, view: ReplyView) -> ReplyText:
        """Make the calls of ``reply``; it and the conversation get the results, all of them whatever happens."""
        shown = self._generation.shown
        outcomes: list[ToolOutcome] = []
        try:
            for call in reply.tool_calls:
                running = ToolOutcome(running=True)
                view.refresh(replace(shown, outcomes=(*outcomes, running)), at_once=True)
                outcomes.append(self._call(call["function"]))
        except KeyboardInterrupt:
            missing = len(reply.tool_calls) - len(outcomes)
            name = reply.tool_calls[-max(missing, 1)]["function"]["name"]
            outcomes += [ToolOutcome("interrupted by the user", failed=True)] * missing
            self._keep(reply, outcomes)
            view.finish(replace(shown, outcomes=tuple(outcomes)), INTERRUPTED)
            raise Interrupted(f"stopped in {name}; the model stays loaded, the conversation is kept", reply) from None
        self._keep(reply, outcomes)
        shown = replace(shown, outcomes=tuple(outcomes))
        view.refresh(shown, at_once=True)
        return shown

    def _call(self, function: Mapping[str, Any]) -> ToolOutcome:
        tool = self._tools.get(function["name"])
        if tool is None:
            names = ", ".join(self._tools)
            return ToolOutcome(f"there is no function {function['name']!r}; there are: {names}", failed=True)
        if self.stopped_at_limit:
            return ToolOutcome(f"not called: the limit of {self._max_rounds} rounds was reached", failed=True)
        return tool.call(function["arguments"], self._longest)

    def _keep(self, reply: Reply, outcomes: Sequence[ToolOutcome]) -> None:
        *earlier, answer = reply.messages
        results: list[Message] = [
            {
                "role": "tool",
                "tool_call_id": call["id"],
                "name": call["function"]["name"],
                "content": f"Error: {outcome.text}" if outcome.failed else outcome.text,
            }
            for call, outcome in zip(reply.tool_calls, outcomes, strict=True)
        ]
        reply.messages = [*earlier, {**answer, "tool_calls": reply.tool_calls}, *results]
        self.conversation.messages = list(reply.messages)
