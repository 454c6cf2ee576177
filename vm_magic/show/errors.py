"""How errors look in a notebook: one line on iopub's ``error`` channel, no traceback."""

from typing import Any

from IPython.core.error import UsageError

from engine.errors import VMMagicError
from engine.format.text import harmless_line
from engine.outputs import Reply

_RED, _RESET = "\x1b[31m", "\x1b[39m"
TRACEBACK_HINT = "%config VLLMMetal.short_errors = False shows the traceback"


class MagicUsageError(UsageError):  # type: ignore[misc]
    """A mistake in a magic's line, shown as one line.

    IPython prints a bare ``UsageError`` to stderr and lets "Run all" go on as far as nbval can see;
    a subclass with ``_render_traceback_`` becomes a real ``error`` message.
    """

    def _render_traceback_(self) -> list[str]:
        name = "UsageError" if type(self) is MagicUsageError else type(self).__name__
        return [f"{_RED}{name}{_RESET}: {harmless_line(str(self))}"]


class InternalError(MagicUsageError):
    """An unexpected exception: a bug in this package."""


class Interrupted(KeyboardInterrupt):
    """■ was pressed: the cell's own work was stopped, and "Run all" stops with it. ``reply`` is what there was."""

    def __init__(self, text: str, reply: Reply | None = None) -> None:
        super().__init__(text)
        self.reply = reply

    def _render_traceback_(self) -> list[str]:
        return [f"{_RED}Interrupted{_RESET}: {harmless_line(str(self))}"]


class HelpShown(Exception):  # noqa: N818 - not an error: ends parsing when --help was asked for
    """``--help`` was given; ``text`` is what to print."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


def _short_class(kind: type[VMMagicError]) -> type[MagicUsageError]:
    return type(kind.__name__, (MagicUsageError, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def short_error(error: Exception) -> MagicUsageError:
    """The one-line form of ``error``.

    An engine error keeps its class (``except MemoryPlanError`` still catches it) and attributes, and
    leaves its traceback behind, so that no frame of it stays alive in ``sys.last_value``.
    """
    if isinstance(error, VMMagicError):
        kind = _short_class(type(error))
        short: Any = kind.__new__(kind, *error.args)
        short.__dict__.update(error.__dict__)
    elif isinstance(error, UsageError):
        short = MagicUsageError(*error.args)
    else:
        short = InternalError(f"{type(error).__name__}: {error} ({TRACEBACK_HINT})")
    short.args = (" ".join(str(short.args[0] if short.args else short).split()),)
    result: MagicUsageError = short
    return result
