"""The examples of Markdown pages and docstrings as cells, and whether what they show is what comes out.

In a page an example is a fenced block whose info string begins with ``python``, or whose first line is a magic
(``%…``; no info string, ``text`` or ``ipython``). A block right behind it with the info string ``text output`` is what
it shows; ``…`` there stands for anything, and after ``text output, numbers differ`` every number for any other.
``console`` and ``bash`` blocks are for a terminal and are not run. The examples of a page are run in order, in one
shell.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

_FENCE = re.compile(r"^(?P<fence>`{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=fence)[ \t]*$", re.DOTALL | re.MULTILINE)
_NUMBER = re.compile(r"\d[\d,.]*\b")
OUTPUT = "text output"
"""The info string of a block that shows what the block before it gives."""
NUMBERS_DIFFER = f"{OUTPUT}, numbers differ"
"""The same where numbers are those of one machine and one time."""


@dataclass(frozen=True)
class Example:
    """One block to run. ``line`` counts from 1; ``output`` None: nothing is shown."""

    line: int
    code: str
    output: str | None
    numbers_differ: bool = False

    def gave(self, found: str) -> bool:
        """Whether ``found`` is what the page shows for it; True where it shows nothing."""
        if self.output is None:
            return True
        if not self.numbers_differ:
            return agrees(self.output, found)
        return agrees(_NUMBER.sub("0", self.output), _NUMBER.sub("0", found))


def examples(page: str) -> Iterator[Example]:
    """The examples of a Markdown page, in order."""
    blocks = list(_FENCE.finditer(page))
    for place, block in enumerate(blocks):
        if not _is_code(block["info"].strip(), block["body"]):
            continue
        after = blocks[place + 1] if place + 1 < len(blocks) else None
        shown = None
        if after is not None and _is_output(after) and not page[block.end() : after.start()].strip():
            shown = after["body"]
        differ = after is not None and after["info"].strip() == NUMBERS_DIFFER
        yield Example(page.count("\n", 0, block.start()) + 1, block["body"], shown, differ)


def outputs_without_code(page: str) -> list[int]:
    """Lines of blocks that show an output and stand behind no example: nothing would check them."""
    checked = sum(example.output is not None for example in examples(page))
    found = [page.count("\n", 0, one.start()) + 1 for one in _FENCE.finditer(page) if _is_output(one)]
    return found if len(found) != checked else []


def _is_output(block: re.Match[str]) -> bool:
    return block["info"].strip() in (OUTPUT, NUMBERS_DIFFER)


def _is_code(info: str, body: str) -> bool:
    language = info.partition(" ")[0]
    return language == "python" or (info in ("", "text", "ipython") and body.lstrip().startswith("%"))


def agrees(shown: str, found: str) -> bool:
    """Whether ``found`` is what the page shows. Spaces at the ends of lines do not count."""
    pattern = "".join(".*?" if part == "…" else re.escape(part) for part in re.split("(…)", _plain(shown)))
    return re.fullmatch(pattern, _plain(found), re.DOTALL) is not None


def _plain(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())
