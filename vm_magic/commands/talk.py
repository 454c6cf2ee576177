"""``talk``: cells of plain text become messages until ``talk off``. Which cells those are: vm_magic.shell.prose."""

import html
from collections.abc import Iterable
from typing import Any

from IPython.core.error import UsageError

from vm_magic.commands.base import Context
from vm_magic.commands.chat import Chat
from vm_magic.commands.parser import CommandParser, split_words
from vm_magic.show.display_handle import can_update
from vm_magic.show.terminal import publish, say
from vm_magic.state.session import Session
from vm_magic.state.talk import TalkMode

MESSAGE_CALL = "get_ipython().run_cell_magic('vllm_metal', 'talk', "
"""How a message's cell begins once it is a call."""
EXAMPLES = """\
%vllm_metal talk                  cells of plain text are messages from now on
%vllm_metal talk -t 0.2 -c trip   again, with other flags for every message
%vllm_metal talk off              they are Python again

Only cells that are not Python are sent, and nothing that is sent is run. Python (broken code too), magics, !commands
and name? stay what they are; what begins like Python is left to it. %%chat sends any cell."""


class Talk(Chat):
    """Turns talk on or off. Its cell form, which no one types, is a message."""

    help = "cells of plain text become messages, until: talk off"
    has_cell = False
    percent = "%"

    def add_arguments(self, parser: CommandParser) -> None:
        """Those of ``chat``, and ``off``."""
        super().add_arguments(parser)
        parser.epilog = EXAMPLES
        text = next(action for action in parser._actions if action.dest == "text")
        text.metavar, text.choices, text.help = "off", ("on", "off"), "ends it (on is what no word says too)"

    def run(self, context: Context, line: str, cell: str | None) -> Any:
        """Turn it on with the line's flags, or off; or send a cell."""
        session = context.session
        if cell is not None:
            return self._send(context, cell)
        words = split_words(line, self.parser)
        parsed = self.parser.read(words)
        if parsed.fork:
            raise UsageError(
                "--fork belongs to one message: send it with %%chat -c NAME --fork OTHER, then %vllm_metal talk -c NAME"
            )
        if parsed.text == "off":
            say("talk is off" if session.talk is not None else "talk was off already")
            session.talk = None
            return None
        if parsed.text == "on":
            words = [word for word in words if word != "on"]
        session.talk = TalkMode(tuple(words))
        say(f"talk is {session.talk}")
        return None

    def from_cell(self, body: str) -> str:
        """The cell as it is, without the line end that IPython adds."""
        return body.removesuffix("\n")

    def arguments(self) -> Iterable[str]:
        """Off."""
        return ["off"]

    def _send(self, context: Context, cell: str) -> Any:
        session, shell = context.session, context.shell
        _keep_source(shell)
        if session.talk is None:
            raise UsageError("talk is off; send a cell's text with %%chat, or turn it on: %vllm_metal talk")
        parsed = self.parser.read(session.talk.words)
        if not parsed.out:
            _show_mark(session, shell)
        return self.execute(context, parsed, cell, cell=True)


def _show_mark(session: Session, shell: Any) -> None:
    """Say that this cell is a message, and whose answer follows."""
    remote = session.remote
    name = session.require().args.names[0] if remote is None else f"{remote.model} (remote)"
    text = f"» to {name}"
    if not can_update(shell):
        say(text)
        return
    small = "opacity:0.6;font-size:85%"
    shown = f'<div style="{small}" title="%vllm_metal talk off ends this">{html.escape(text)}</div>'
    publish(shell, {"text/plain": text, "text/html": shown})


def _keep_source(shell: Any) -> None:
    """Let ``In[n]`` be what was typed, not the call that sends it."""
    parsed, raw = shell.history_manager.input_hist_parsed, shell.history_manager.input_hist_raw
    if len(parsed) == len(raw) and parsed and parsed[-1].startswith(MESSAGE_CALL):
        parsed[-1] = raw[-1]
