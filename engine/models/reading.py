"""Where files that may hold anything meet code that counts on what they should hold: one error for all that fails.

Entries that the engine itself computes from are checked by name (:mod:`engine.models.entries`). What is left is what
libraries find wrong, each with an exception of its own, down to the panic of a library in Rust.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import ModelLoadError, VMMagicError, error_line, is_panic
from engine.format.text import shortened

_LONGEST = 640
"""Characters of a line: the longest lists the architectures of GGUF files."""
DAMAGED = "its files are damaged or not of one model; fetch them again"


@contextmanager
def reading(name: str, advice: str = DAMAGED) -> Iterator[None]:
    """Whatever fails inside for what the files of ``name`` hold becomes a :class:`ModelLoadError` in one line.

    Errors meant for users, interrupts, and the end of the process stay. ``__cause__`` holds what it was.
    """
    try:
        yield
    except BaseException as error:
        keep_short(error)
        if is_fault(error):
            raise unreadable(name, error, advice) from error
        raise


def unreadable(name: str, error: BaseException, advice: str = DAMAGED) -> ModelLoadError:
    """The one line about ``error``, which came of the files of ``name``."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        advice = f"that takes more memory than this process may have; free some, or {advice}"
    return ModelLoadError(f"{name}: cannot be read ({error_line(error)}): {advice}")


def keep_short(error: BaseException) -> None:
    """Have a ModelLoadError, which may quote whatever a file holds, say in one line what people can read."""
    if isinstance(error, ModelLoadError):
        error.args = (shortened(" ".join(str(error).split()), _LONGEST), *error.args[1:])


def is_fault(error: BaseException) -> bool:
    """Whether ``error`` is one that reading a damaged file can come to, and not yet one meant for users.

    A library in Rust panics, and a file of mlx-lm ends the process where its package is missing.
    """
    if isinstance(error, VMMagicError):
        return False
    return isinstance(error, Exception | SystemExit) or is_panic(error)
