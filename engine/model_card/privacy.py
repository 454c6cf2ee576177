"""Text for others to read: no home folders, user names, keys or control characters, and no more than a few lines."""

import getpass
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from engine.format.text import shortened

LONGEST = 600
"""Characters of one fact or finding."""
_HOMES = re.compile(r"(?<![\w~])/(?:home|Users)/[^/\s'\"]+")
_KEYS = re.compile(r"\b(?:hf_|gh[oprsu]_|github_pat_|sk-)[A-Za-z0-9][A-Za-z0-9_-]{18,}")


def names_of(folder: Path) -> tuple[str, ...]:
    """The ways in which paths in ``folder`` begin."""
    return tuple({f"{path}{os.sep}" for path in (folder, folder.absolute(), folder.resolve())})


def shareable(text: str, beginnings: Sequence[str] = ()) -> str:
    """``text`` in one line, without what tells who sends it and from where.

    Paths lose their ``beginnings`` (see :func:`names_of`), and a home folder becomes ``~``.
    """
    for begin in beginnings:
        text = text.replace(begin, "")
    for home in _home_folders():
        text = re.sub(rf"{re.escape(home)}(?=[/\\\s:,;)'\"]|$)", "~", text)
    text = _HOMES.sub("~", text)
    if name := user_name():
        text = re.sub(rf"(?<=/){re.escape(name)}(?=/|$)", "USER", text)
    text = _KEYS.sub("(a key)", text)
    line = " ".join(text.split())
    return shortened("".join(char if char.isprintable() else _escaped(char) for char in line), LONGEST)


def _escaped(char: str) -> str:
    return ascii(char)[1:-1]


@cache
def _home_folders() -> tuple[str, ...]:
    try:
        home = Path.home()
    except RuntimeError:  # a user without an entry and without $HOME
        return ()
    return tuple({str(path) for path in (home, home.resolve())} - {os.sep})


@cache
def user_name() -> str:
    """Whose process this is; empty where nobody says."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        return ""
    return name
