"""The commands of ``%vllm_metal``, and the one that a line asks for."""

from collections.abc import Iterable, Sequence
from functools import cache
from importlib import import_module
from typing import Any

from IPython.core.error import UsageError

from engine.format.names import closest
from engine.format.text import aligned, shortened
from vm_magic.commands.base import Command, Context
from vm_magic.commands.parser import CommandParser
from vm_magic.show.terminal import say

COMMANDS = {
    "status": "status.Status",
    "load": "load.Load",
    "serve": "serve.Serve",
    "stop": "serve.Stop",
    "unload": "load.Unload",
    "plan": "plan.Plan",
    "inspect": "model_card.Inspect",
    "panel": "panel.Panel",
    "set": "settings.Set",
    "chat": "chat.Chat",
    "complete": "chat.Complete",
    "talk": "talk.Talk",
    "grid": "grid.Grid",
    "connect": "connect.Connect",
    "reset": "history.Reset",
    "history": "history.History",
    "models": "load.Models",
    "score": "score.Score",
    "explain": "explain.Explain",
    "rerun": "rerun.Rerun",
    "export": "export.Export",
    "llm": "llm_tool.Llm",
    "bench": "bench.Bench",
    "logs": "logs.Logs",
    "metrics": "logs.Metrics",
    "doctor": "doctor.Doctor",
}
"""Every command in the order of ``--help``, and the module of this package and the class that it is.

A module is imported when its command is first used.
"""


_MEANT = {
    "chat": "ask message prompt question say send tell",
    "complete": "completion continue generate",
    "serve": "launch open run server start up",
    "stop": "close exit kill quit shutdown",
    "unload": "delete eject free release",
    "load": "download fetch get pull",
    "status": "gpu info memory ps show state version",
    "models": "list ls model",
    "set": "config get_settings sampling setting settings temperature",
    "panel": "dashboard gui ui widget widgets",
    "inspect": "card describe",
    "plan": "estimate fit fits",
    "chat --compare": "compare",
    "chat --error": "error traceback",
    "chat --record": "record",
    "grid": "choices classify label map sweep",
    "connect": "remote url",
    "connect --close": "disconnect",
    "reset": "clear forget new",
    "history": "conversation conversations messages",
    "score": "perplexity probabilities",
    "explain": "debug slow trace why",
    "rerun": "again repeat replay reproduce",
    "bench": "benchmark speed",
    "logs": "log",
    "doctor": "check checkup diagnose diagnostics env environment report selftest test verify",
    "metrics": "prometheus stats usage",
}
_SYNONYMS = {word: name for name, words in _MEANT.items() for word in words.split()}
"""What people type, and the command that does it."""


@cache
def command(name: str) -> Command:
    """The command ``name``, one of :data:`COMMANDS`."""
    module, _, kind = COMMANDS[name].partition(".")
    made: Command = getattr(import_module(f"{__package__}.{module}"), kind)(name)
    return made


def command_parser(name: str) -> CommandParser:
    """The parser of the command ``name``."""
    return command(name).parser


def cell_commands() -> list[str]:
    """The commands that have a cell form."""
    return [name for name in COMMANDS if command(name).has_cell]


def run(context: Context, line: str, cell: str | None) -> Any:
    """Run the command that ``line`` begins with; none at all is ``status``. What it returns is the cell's value."""
    name, _, rest = line.strip().partition(" ")
    if name in ("-h", "--help", "help"):
        say(overview())
        return None
    if not name and cell is not None:
        raise UsageError("%%vllm_metal needs a command; %%chat (or %%vllm_metal chat) sends the cell's body")
    name = name or "status"
    if name not in COMMANDS:
        raise UsageError(f"no command {shortened(name, 60)!r}; {_meant(name, rest)}")
    wanted = command(name)
    wanted.check_connection(context.session, rest)
    return wanted.run(context, rest, cell)


def _meant(name: str, rest: str) -> str:
    """What may have been meant by a command that does not exist."""
    from engine.models.pypi import PACKAGE_MODELS

    plain = name.lower().strip("-")
    if "/" in name or name.endswith(".gguf") or plain in PACKAGE_MODELS:
        return f"did you mean serve {name}?"
    text = len(rest.split()) > 1 and not rest.strip().startswith("-")
    if found := _SYNONYMS.get(plain) or closest(plain, COMMANDS, 0.8 if text else 0.6):
        return f"did you mean {found}?"
    if text:
        return "to send a message, write %vllm_metal chat TEXT; %vllm_metal --help lists the commands"
    return "see %vllm_metal --help"


def candidates(before: Sequence[str], fragment: str, *, cell: bool = False) -> Iterable[str]:
    """What may follow the words ``before`` the cursor; ``fragment`` is what is typed of the next one."""
    if not before:
        return cell_commands() if cell else COMMANDS
    return command(before[0]).complete(before[1:], fragment) if before[0] in COMMANDS else ()


def overview() -> str:
    """The list of commands."""
    lines = aligned([(f"  {name}", command(name).help) for name in COMMANDS])
    return "\n".join(["%vllm_metal COMMAND", "", *lines, "", "%vllm_metal COMMAND --help shows a command's flags."])
