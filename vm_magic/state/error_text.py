"""An exception as text for a language model: what was raised, and the code around it. No values of variables."""

import linecache
import re
import site
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from vm_magic.show.errors import Interrupted, MagicUsageError
from vm_magic.summaries.text import bounded

LONGEST = 6000
"""Most characters of an error's text."""
_LONGEST_MESSAGE = 1500
_AROUND = 5
"""Lines before and after the failing one."""
_MOST_FRAMES = 8
"""Places in the user's code that are told of one exception: the first and the last of them."""
_MOST_IN_GROUP = _MOST_IN_CHAIN = 5
_LEAST_OF_ONE = 300
"""Characters that a further error of a chain must still have."""
_OUR_CALL = re.compile(r"get_ipython\(\)\.run_(?:line|cell)_magic\(['\"](vllm_metal|chat)['\"].*")
_LIBRARIES = tuple(
    {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    | set(site.getsitepackages() if hasattr(site, "getsitepackages") else ())
    | {site.getusersitepackages()}
)


def is_ours(error: BaseException) -> bool:
    """Whether a magic's own one-line error: it says itself what to do."""
    return isinstance(error, MagicUsageError | Interrupted)


def error_line(error: BaseException) -> str:
    """``ZeroDivisionError: division by zero``."""
    return bounded("".join(traceback.format_exception_only(error)).strip().split("\n")[-1], _LONGEST_MESSAGE)


def error_text(error: BaseException, shell: Any) -> str:
    """Type, message and places of ``error``, after those of what it came from. Keeps no frame alive."""
    parts: list[str] = []
    chain, left = _chain(error), LONGEST
    for shown, (one, how) in enumerate(
        reversed(chain)
    ):  # where not all fit, those that came last: they are what the user saw
        if shown == _MOST_IN_CHAIN or (shown and left < _LEAST_OF_ONE):
            parts.append(f"({len(chain) - shown} errors before these are left out.)")
            break
        parts += [*([how] if how else []), bounded(_one(one, shell), left)]
        left -= len(parts[-1])
    return "\n\n".join(reversed(parts))


def _chain(error: BaseException) -> list[tuple[BaseException, str]]:
    """``error`` and what came before it, the first first, each with how it led to the next."""
    found: list[tuple[BaseException, str]] = [(error, "")]
    seen = {id(error)}
    one = error
    while True:
        cause = one.__cause__
        before = cause if cause is not None else None if one.__suppress_context__ else one.__context__
        if before is None or id(before) in seen:
            return found[::-1]
        how = "which was the direct cause of:" if cause is not None else "and while that was handled:"
        seen.add(id(before))
        found.append((before, how))
        one = before


def _one(error: BaseException, shell: Any) -> str:
    said = bounded("".join(traceback.format_exception_only(error)).strip(), _LONGEST_MESSAGE)
    if isinstance(error, SyntaxError):
        return _syntax_error(error, said, shell)
    lines = [said]
    if isinstance(error, BaseExceptionGroup):
        lines += [f"  with {error_line(one)}" for one in error.exceptions[:_MOST_IN_GROUP]]
    return "\n".join([*lines, *_places(error, shell)])


def _syntax_error(error: SyntaxError, said: str, shell: Any) -> str:
    """The message, and the code around it where it is a cell's or the user's: Python's own text has one line."""
    if error.lineno is None or error.filename is None:
        return said
    cell = _cell_name(error.filename, shell)
    lines = _code_around(error.filename, error.lineno) if cell or not _is_library(error.filename) else []
    if not lines:
        return said
    return "\n".join(
        [f"{type(error).__name__}: {error.msg}", f"{cell or error.filename}, line {error.lineno}:", *lines]
    )


def _places(error: BaseException, shell: Any) -> list[str]:
    """Where the error passed: the user's code with the lines around, libraries in one line each."""
    frames = list(traceback.extract_tb(error.__traceback__))
    names = [_cell_name(frame.filename, shell) for frame in frames]
    first = next((i for i, name in enumerate(names) if name), None)
    if first is None:  # of no cell: then all that is not IPython's
        first = next((i for i, frame in enumerate(frames) if "IPython" not in Path(frame.filename).parts), 0)
    places: list[tuple[str, ...]] = []
    for is_library, group in groupby(frames[first:], key=lambda frame: _is_library(frame.filename)):
        found = list(group)
        if is_library:
            places.append((_library_line(found),))
        else:
            places += _own_places(found, shell)
    if len(places) > _MOST_FRAMES:
        half = _MOST_FRAMES // 2
        places = [*places[:half], (f"… {len(places) - 2 * half} more places …",), *places[-half:]]
    return [line for place in places for line in place]


def _own_places(frames: Sequence[traceback.FrameSummary], shell: Any) -> Iterator[tuple[str, ...]]:
    """Each place with its code; a recursion's only once."""
    for (filename, number, function), group in groupby(frames, key=lambda one: (one.filename, one.lineno, one.name)):
        times = len(list(group))
        where = _cell_name(filename, shell) or filename
        named = "" if function == "<module>" else f", in {function}"
        again = f" ({times} times in a row)" if times > 1 else ""
        yield (f"{where}, line {number}{named}{again}:", *_code_around(filename, number or 1))


def _library_line(frames: Sequence[traceback.FrameSummary]) -> str:
    last = frames[-1]
    more = f" (through {len(frames) - 1} more)" if len(frames) > 1 else ""
    code = f": {last.line.strip()}" if last.line else ""
    return f"in {_short_path(last.filename)}, line {last.lineno}, in {last.name}{more}{code}"


def _code_around(filename: str, number: int) -> list[str]:
    """Numbered lines, the failing one marked."""
    lines = linecache.getlines(filename)
    first, last = max(number - _AROUND, 1), min(number + _AROUND, len(lines))
    width = len(str(last))
    shown = [
        f"{'>' if i == number else ' '} {i:>{width}} | {without_magic(lines[i - 1].rstrip()[:300])}".rstrip()
        for i in range(first, last + 1)
    ]
    return shown if shown else ["(the code is not kept)"]


def without_magic(line: str) -> str:
    """A line of code; a call of our own magics, which may hold a key, only by its name."""
    found = _OUR_CALL.search(line)
    return line if found is None else f"{line[: found.start()]}%{found[1]} …"


def _cell_name(filename: str, shell: Any) -> str | None:
    """``In [3]`` for code of a cell; None for files."""
    named = shell.compile.format_code_name(filename)
    if named is None:
        return None
    return f"In [{named[1].removeprefix('In[').removesuffix(']')}]" if named[1].startswith("In[") else str(named[1])


def _is_library(filename: str) -> bool:
    """Installed code, and compiled code, whose lines are not here."""
    return filename.startswith(_LIBRARIES) or not linecache.getlines(filename)


def _short_path(filename: str) -> str:
    """A library's file without the folders that it is installed in."""
    root = next((root for root in sorted(_LIBRARIES, key=len, reverse=True) if filename.startswith(root)), "")
    return filename.removeprefix(root).lstrip("/\\")
