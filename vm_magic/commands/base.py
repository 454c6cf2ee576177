"""What a command is: its help, its flags, what it does, and what Tab offers in its line."""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from IPython.core.error import UsageError

from engine.errors import UnsupportedOptionError
from engine.format.text import shortened
from engine.openai.http.ring_log import RingLog
from vm_magic.commands.parser import CommandParser, is_flags, split_text, split_words, with_dashes
from vm_magic.state import session as sessions
from vm_magic.state.session import Session

GO_BACK = "%vllm_metal connect --close goes back to this kernel"


@dataclass(frozen=True)
class Context:
    """Where a command runs: the shell, and what ``%vllm_metal logs`` shows."""

    shell: Any
    logs: RingLog
    record: bool = False
    """Whether replies are recorded that do not say otherwise."""

    @property
    def session(self) -> Session:
        """The kernel's session."""
        return sessions.current_session()


def file_value(value: Any, shell: Any, out: str | None) -> None:
    """Put ``value`` where the user finds it: into the variable of ``--out``, else into ``_`` and ``Out``."""
    if out:
        shell.user_ns[out] = value
        return
    shell.displayhook.update_user_ns(value)
    shell.displayhook.fill_exec_result(value)


class Command(ABC):
    """One command of ``%vllm_metal``, under the ``name`` that the table gives it.

    A new one is a subclass in a module of this package, and a line in :data:`vm_magic.commands.table.COMMANDS`.
    Most are a :class:`LineCommand` or a :class:`TextCommand`.
    """

    help: ClassVar[str]
    """One line for the list of commands and for ``--help``."""
    has_cell: ClassVar[bool] = False
    """Whether there is a cell form, ``%%vllm_metal NAME``."""
    needs_kernel: ClassVar[str] = ""
    """Why the command is refused while the notebook is connected to a server; empty if it is not."""
    percent: ClassVar[str] = "%"
    """How ``--help`` writes the magic: ``%`` or ``%%``."""

    def __init__(self, name: str) -> None:
        self.name = name

    def add_arguments(self, parser: CommandParser) -> None:  # noqa: B027 - many commands have none
        """Give ``parser`` this command's flags and arguments: none."""

    @abstractmethod
    def run(self, context: Context, line: str, cell: str | None) -> Any:
        """Do what ``line`` (without the command's name) and ``cell`` ask for. What it returns is the cell's value."""

    def arguments(self) -> Iterable[str]:
        """What Tab offers where a word is expected that is not a flag."""
        return ()

    def flag_values(self, flag: str, words: Sequence[str], fragment: str) -> Iterable[str]:  # noqa: ARG002
        """What Tab offers after ``flag``, the last of ``words``; ``fragment`` is what is typed of the value."""
        return self.parser.choices(flag)

    @cached_property
    def parser(self) -> CommandParser:
        """The command's parser, with all flags."""
        parser = self.make_parser()
        self.add_arguments(parser)
        return parser

    def make_parser(self) -> CommandParser:
        """A parser without flags."""
        return CommandParser(self.name, self.help, self.percent)

    def complete(self, words: Sequence[str], fragment: str) -> Iterable[str]:
        """What may follow ``words`` of this command's line; ``fragment`` is what is typed of the next one."""
        last = with_dashes(words[-1]) if words else ""
        if self.parser.takes_value(last):
            return self.flag_values(last, words, fragment)
        if fragment.startswith("-"):
            flags = self.parser.flags()
            return flags if "_" not in fragment else [f"--{flag[2:].replace('-', '_')}" for flag in flags]
        return self.arguments()

    def works_remotely(self, line: str) -> bool:  # noqa: ARG002
        """Whether the command can do what ``line`` asks for while the notebook is connected to a server."""
        return not self.needs_kernel

    def check_connection(self, session: Session, line: str) -> None:
        """Raise UnsupportedOptionError if the notebook is connected to a server and ``line`` needs this kernel."""
        if session.remote is None or self.works_remotely(line) or {"-h", "--help"} & set(line.split()):
            return
        raise UnsupportedOptionError(
            f"%vllm_metal {self.name} {self.needs_kernel}, and the notebook is connected to "
            f"{session.remote.base_url}; {GO_BACK}",
            flag=self.name,
        )

    def refuse_cell(self) -> UsageError:
        """The error for a cell form that does not exist."""
        return UsageError(f"%%vllm_metal {self.name} takes no cell; write %vllm_metal {self.name}")


class LineCommand(Command):
    """A command of one line, without a cell form."""

    def run(self, context: Context, line: str, cell: str | None) -> Any:
        """Read the flags, then :meth:`execute`."""
        parsed = self.parser.read(split_words(line, self.parser))
        if cell is not None:
            raise self.refuse_cell()
        return self.execute(context, parsed)

    @abstractmethod
    def execute(self, context: Context, parsed: argparse.Namespace) -> Any:
        """Do what ``parsed`` says. What it returns is the cell's value."""


class TextCommand(Command):
    """A command that takes a text: after the flags in the line form, as the body in the cell form."""

    has_cell = True
    percent = "%%"
    body: ClassVar[str]
    """What the text is called in messages."""

    def run(self, context: Context, line: str, cell: str | None) -> Any:
        """Read the flags, then :meth:`execute` with the text after them, or with the cell's body."""
        words, text = split_text(self.parser, line)
        parsed = self.parser.read(words)
        if cell is None:
            return self.execute(context, parsed, text, cell=False)
        if text:
            raise UsageError(f"{text!r} is not a flag; the {self.body} goes into the cell's body")
        first = next((row.strip() for row in cell.splitlines() if row.strip()), "")
        if first.startswith("--") and "--" not in line.split() and is_flags(self.parser, first):
            magic = self.parser.prog
            raise UsageError(
                f"{shortened(first, 60)!r} are flags: they go behind {magic}, on its line ({magic} -- sends the body "
                "as typed)"
            )
        return self.execute(context, parsed, cell, cell=True)

    @abstractmethod
    def execute(self, context: Context, parsed: argparse.Namespace, text: str, *, cell: bool) -> Any:
        """Do what ``parsed`` says with ``text``; ``cell`` tells which form it is."""
