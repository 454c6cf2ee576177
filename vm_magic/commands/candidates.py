"""What may follow the cursor in a line of our magics: commands, flags, their values, names of the notebook."""

import inspect
from collections.abc import Iterable
from typing import Any

from IPython.core.getipython import get_ipython

from engine.params.settings import MODEL_PRESET, PRESETS
from vm_magic.commands.arguments import CELL_COMMANDS, COMMANDS, command_parser
from vm_magic.state import session as sessions
from vm_magic.state.chat_flags import TOOL_CHOICES
from vm_magic.state.conversation import DEFAULT_CONVERSATION
from vm_magic.state.settings_text import MEMORY_NAMES, SETTABLE


def candidates(before: list[str], fragment: str, *, cell: bool = False) -> Iterable[str]:
    """What may follow the words ``before`` the cursor; ``fragment`` is what is typed of the next one."""
    if not before:
        return CELL_COMMANDS if cell else COMMANDS
    command = before[0]
    if command not in COMMANDS:
        return ()
    parser = command_parser(command)
    flags = parser.flags()
    last = before[-1]
    if last == "--fork":
        return _conversation_names()
    if last in ("-c", "--conversation"):
        return _conversation_names(DEFAULT_CONVERSATION)
    if last == "--tools":
        return _function_names(fragment)
    if last == "--tool-choice":
        return [*TOOL_CHOICES, *_named_tools(before)]
    if last in ("-f", "--format"):
        return flags["--format"]
    if last != command and parser.takes_value(last):
        return flags.get(last, ())
    if fragment.startswith("-"):
        return flags if "_" not in fragment else [f"--{flag[2:].replace('-', '_')}" for flag in flags]
    if command == "set":
        return [f"preset={name}" for name in (*PRESETS, MODEL_PRESET)] + [
            f"{name}=" for name in (*SETTABLE, *MEMORY_NAMES)
        ]
    if command in ("load", "serve", "plan"):
        return [model.name for model in sessions.cached_models()]
    return _conversation_names(DEFAULT_CONVERSATION) if command in ("reset", "history") else ()


def _conversation_names(*more: str) -> list[str]:
    session: Any = sessions.peek_session()
    return list(dict.fromkeys([*more, *(() if session is None else session.conversations)]))


def _function_names(fragment: str) -> list[str]:
    """The notebook's functions, imported ones too, behind the names that ``fragment`` has already."""
    shell: Any = get_ipython()
    done = fragment[: fragment.rfind(",") + 1]
    taken = done.split(",")
    found = ((name, value) for name, value in shell.user_ns.items() if name not in shell.user_ns_hidden)
    names = [name for name, value in found if inspect.isroutine(value) and not name.startswith("_")]
    return [done + name for name in names if name not in taken]


def _named_tools(before: list[str]) -> list[str]:
    places = [i for i, word in enumerate(before[:-1]) if word == "--tools"]
    return [name for i in places for name in before[i + 1].split(",")]
