"""A line below an error of IPython's own: a magic's name that nobody has, a text that was taken for Python.

No name is taken for it: magics of other extensions, also those loaded later, stay what they are.
"""

import ast
import re
from typing import Any

from IPython.core.error import UsageError

from vm_magic.shell.prose import may_be_text
from vm_magic.shell.talk_cells import talk_is_on
from vm_magic.show.terminal import say

_NOT_FOUND = re.compile(r"(?:Line|Cell) magic (?:function )?`(%%?)([^`]+)` not found")
_FOR_CHAT = ("ask", "chat", "gpt", "generate", "llm", "message", "prompt", "question", "say", "send", "tell")
_FOR_ALL = ("metal", "vllm", "vllm_metal", "vllm_magic", "vllmmetal", "vm_magic", "vmmagic")
_ONLY_NAMES = (ast.Module, ast.Expr, ast.Name, ast.Load, ast.Tuple, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.cmpop,
               ast.boolop, ast.unaryop)  # fmt: skip


class Hints:
    """What IPython calls after each cell of ``shell``. ``owned`` are the names of ours beside ``%vllm_metal``."""

    def __init__(self, shell: Any, owned: frozenset[str]) -> None:
        self._shell = shell
        self._owned = owned

    def after_cell(self, result: Any) -> None:
        """Print a line where one helps."""
        error = getattr(result, "error_in_exec", None) or getattr(result, "error_before_exec", None)
        if error is None:
            return
        if isinstance(error, UsageError):
            found = _NOT_FOUND.search(str(error))
            hint = self.for_magic(found[1], found[2]) if found else None
        else:
            hint = _for_text(error, str(result.info.raw_cell)) if talk_is_on() else None
        if hint:
            say(hint, error=True)

    def for_magic(self, percent: str, name: str) -> str | None:
        """What may have been meant by a magic that does not exist; None where nothing of ours resembles it."""
        from engine.format.names import closest
        from vm_magic.commands.table import COMMANDS, cell_commands

        plain = name.lower().replace("-", "_")
        chat = f"{percent}chat" if f"{percent}chat" in self._owned else f"{percent}vllm_metal chat"
        text = "" if percent == "%%" else " TEXT"
        if plain in _FOR_CHAT or closest(plain, ["chat"], 0.75):
            return f"did you mean {chat}{text}? It sends a message to the model of vm_magic"
        if plain in _FOR_ALL or closest(plain, ["vllm_metal"], 0.75):
            return f"did you mean {percent}vllm_metal? %vllm_metal --help lists its commands"
        if plain in COMMANDS and (percent == "%" or plain in cell_commands()):
            return f"did you mean {percent}vllm_metal {plain}?"
        return None


def _for_text(error: BaseException, cell: str) -> str | None:
    """The hint for a cell that talk left to Python."""
    meant = (isinstance(error, SyntaxError) and may_be_text(cell)) or (
        isinstance(error, NameError) and _only_names(cell)
    )
    return "talk is on, but this starts like Python; %%chat sends it as a message" if meant else None


def _only_names(cell: str) -> bool:
    """Whether a cell is nothing but words to Python: ``Hello``, ``what is this``."""
    try:
        nodes = list(ast.walk(ast.parse(cell)))
    except (SyntaxError, ValueError):
        return False
    names = [node.id for node in nodes if isinstance(node, ast.Name)]
    return bool(names) and all(isinstance(node, _ONLY_NAMES) for node in nodes) and max(map(len, names)) > 1
