"""What may follow the cursor in a line of our magics: commands, flags, their values, names of the notebook."""

import inspect
from collections.abc import Iterable
from typing import Any

from IPython.core.getipython import get_ipython

from engine.presets import MODEL_PRESET, PRESETS
from vm_magic import session as sessions
from vm_magic.arguments import CELL_COMMANDS, COMMANDS, command_parser
from vm_magic.chat_flags import TOOL_CHOICES
from vm_magic.settings_text import MEMORY_NAMES, SETTABLE


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
    if last in ("-c", "--conversation", "--fork"):
        return _conversation_names()
    if last == "--tools":
        return _function_names(fragment)
    if last == "--tool-choice":
        return [*TOOL_CHOICES, *_named_tools(before)]
    if last in ("-f", "--format"):
        return flags["--format"]
    if last != command and parser.takes_value(last):
        return flags.get(last, ())
    if fragment.startswith("-"):
        return flags
    if command == "set":
        return [f"preset={name}" for name in (*PRESETS, MODEL_PRESET)] + [
            f"{name}=" for name in (*SETTABLE, *MEMORY_NAMES)
        ]
    if command in ("load", "serve", "plan"):
        return [model.name for model in sessions.cached_models()]
    return _conversation_names() if command in ("reset", "history") else ()


def _conversation_names() -> list[str]:
    session: Any = sessions.peek_session()
    return [] if session is None else list(session.conversations)


def _function_names(fragment: str) -> list[str]:
    """The notebook's own functions behind the names that ``fragment`` has already."""
    namespace: dict[str, Any] = getattr(get_ipython(), "user_ns", {})
    done = fragment[: fragment.rfind(",") + 1]
    names = [name for name, value in namespace.items() if inspect.isroutine(value) and not name.startswith("_")]
    return [done + name for name in names if getattr(namespace[name], "__module__", "") == "__main__"]


def _named_tools(before: list[str]) -> list[str]:
    places = [i for i, word in enumerate(before[:-1]) if word == "--tools"]
    return [name for i in places for name in before[i + 1].split(",")]
