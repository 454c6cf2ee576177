"""The code of a reply: what stands in its fences, without the words around them."""

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

from vm_magic.show.safe_markdown import open_fence

_FENCE = re.compile(r"^((?:[ \t]*(?:[-*+]|\d{1,9}[.)])(?=[ \t]))*[ \t]*)(?:`{3,}|~{3,})[ \t]*([\w+#.\-]*)")
_PYTHON = ("python", "py", "python3", "ipython", "ipython3", "pycon", "jupyter")
_CELL_MAGICS = {
    **{name: name for name in ("bash", "html", "javascript", "latex", "perl", "ruby", "svg", "sh", "markdown")},
    "js": "javascript",
    "shell": "bash",
    "tex": "latex",
    "md": "markdown",
}
"""Languages whose cells IPython runs by a magic of its own."""
_DOING = (ast.Call, ast.Assign, ast.AnnAssign, ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)


class Code(NamedTuple):
    """Code and its language (empty: not named)."""

    text: str
    language: str

    def cell(self) -> str:
        """The code as a notebook's cell: of another language, below the cell magic that runs it, if there is one."""
        magic = _CELL_MAGICS.get(self.language)
        return f"%%{magic}\n{self.text}" if magic else self.text


def code_of(text: str) -> Code | None:
    """The code in ``text``: the fenced blocks of one language, joined by an empty line. None where there is none.

    That language is Python where a block is Python, else the first block's: ``pip install`` before the program and
    its output behind it are left out. Without a fence, ``text`` is code if all of it is Python that does something.
    A block that is still open counts as far as it goes.
    """
    blocks = [block for block in _blocks(text) if block.text.strip()]
    if not blocks:
        return Code(text.strip("\n"), "python") if _is_python(text) else None
    languages = [block.language for block in blocks]
    wanted = "python" if "python" in languages else languages[0]
    return Code("\n\n".join(block.text.rstrip() for block in blocks if block.language == wanted), wanted)


def has_fence(text: str) -> bool:
    """Whether a line of ``text`` begins a code block."""
    return any(True for _ in _blocks(text))


def _blocks(text: str) -> Iterator[Code]:
    lines = text.split("\n")
    fence: str | None = None
    start = 0
    for number, line in enumerate(lines):
        after = open_fence(line) if fence is None else open_fence(f"{fence}\n{line}")
        if after == fence:
            continue
        if fence is None:
            start = number
        else:
            yield _block(lines[start], lines[start + 1 : number])
        fence = after
    if fence is not None and start + 1 < len(lines):  # the fence's own line may not be whole yet
        yield _block(lines[start], lines[start + 1 :])


def _block(opening: str, lines: list[str]) -> Code:
    found = _FENCE.match(opening)
    language = found[2].lower() if found else ""
    indent = len(found[1]) if found else 0
    body = [line[min(indent, len(line) - len(line.lstrip())) :] for line in lines]
    return Code("\n".join(body), "python" if language in _PYTHON else language)


def _is_python(text: str) -> bool:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return any(isinstance(node, _DOING) for node in ast.walk(tree))
