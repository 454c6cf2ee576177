"""Text to copy: shown as code in a notebook, as it is everywhere else."""

from dataclasses import dataclass

from vm_magic.show.reply_bundle import fenced


@dataclass(frozen=True)
class CodeText:
    """``text`` in ``language``; ``str()`` of it is the text. ``note`` stands below and is not part of it."""

    text: str
    language: str = "bash"
    note: str = ""

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"{self.text.rstrip()}\n\n{self.note}" if self.note else self.text.rstrip()

    def _repr_markdown_(self) -> str:
        note = f"\n\n{self.note}" if self.note else ""
        return fenced(self.text.rstrip("\n"), self.language) + note
