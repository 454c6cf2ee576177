"""While ``%vllm_metal talk`` is on: makes calls of cells that are messages, before IPython reads them."""

import ast
import builtins
import logging
import re
import sys
import warnings
from typing import Any

from vm_magic.shell.prose import is_prose, is_sentence, is_unknown_word

_log = logging.getLogger(__name__)
_ESCAPES = ("%", "!", "?", ";", ",", "/", "@", ">>>", "In [")
"""How a cell of IPython's own begins."""
_ASKS = re.compile(r"^[ \t]*\S+[ \t]+\S.*\?\??[ \t]*$", re.MULTILINE)
"""A line of several words that ends in a question mark: IPython would show help on the last of them."""
_SHELL_WORDS = (
    *("apt", "brew", "cd", "chmod", "conda", "curl", "docker", "echo", "export", "git", "grep", "kubectl", "ls"),
    *("make", "mamba", "mkdir", "npm", "pip", "pip3", "python", "python3", "ssh", "sudo", "uv", "wget"),
)


def talk_is_on() -> bool:
    """Whether plain text is to be sent. The session is made by the first command, and imported then."""
    sessions = sys.modules.get("vm_magic.state.session")
    session = None if sessions is None else sessions.peek_session()
    return session is not None and session.talk is not None


class TalkCells:
    """An input transformer of ``shell``, before all others, so that it sees a cell as it was typed.

    It has no side effects: IPython also asks it whether an input is complete, and a message is.
    """

    def __init__(self, shell: Any) -> None:
        self._shell = shell

    def __call__(self, lines: list[str]) -> list[str]:
        """``lines``, or the call that sends them."""
        if not talk_is_on():
            return lines
        source = "".join(lines)
        try:
            message = self.is_message(source)
        except Exception:  # noqa: BLE001 - a fault of ours must never keep Python from running
            _log.exception("a cell could not be looked at; it was left to Python")
            return lines
        if not message:
            return lines
        from vm_magic.commands.talk import MESSAGE_CALL

        return [f"{MESSAGE_CALL}{source!r})\n"]

    def is_message(self, source: str) -> bool:
        """Whether ``source`` is text for the model: not Python, nothing of IPython's, and written like a text."""
        text = source.strip()
        if not text or text.startswith(_ESCAPES) or self._is_command(text):
            return False
        if is_unknown_word(text, self.defined):
            return True
        if self.parses(source):
            asks = _ASKS.search(source) is not None and not re.search(r"^\s*[%!]", source, re.MULTILINE)
            if not asks or _parses(source):
                return False
        return is_prose(source, self.defined)

    def defined(self, name: str) -> bool:
        """Whether ``name`` means something in the notebook."""
        return name in self._shell.user_ns or hasattr(builtins, name)

    def _is_command(self, text: str) -> bool:
        """Whether a line is a magic without its %, a command of the shell without its !, or a call without brackets."""
        if "\n" in text:
            return False
        first = text.split()[0]
        magic = self._shell.automagic and not self.defined(first) and self._shell.find_line_magic(first) is not None
        called = self._shell.autocall > 0 and callable(self._shell.user_ns.get(first))
        return called or ((magic or first in _SHELL_WORDS) and not is_sentence(text))

    def parses(self, source: str) -> bool:
        """Whether ``source`` is Python once IPython's own transformers have been through."""
        manager = self._shell.input_transformer_manager
        lines = source.splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines[-1] += "\n"
        try:
            for transform in manager.cleanup_transforms + manager.line_transforms:
                if transform is not self and not getattr(transform, "has_side_effects", False):
                    lines = transform(lines)
            lines = manager.do_token_transforms(lines)
        except SyntaxError:
            return False
        return _parses("".join(lines))


def _parses(source: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True
