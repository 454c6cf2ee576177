"""Which kind of program shows a cell's output: what it can do decides what is sent.

A display that is updated later is a notebook's way. Jupyter's consoles (``jupyter console``, ``jupyter qtconsole``,
``jupyter run``, Spyder's) leave ``update_display_data`` out and would show the first state for ever; they get what a
terminal gets. No message says which program asks, but a client written in Python puts its process id into the ids of
its messages, and a kernel that a console started has the console's process id in the name of its connection file.
"""

import contextlib
import os
import re
import sys
from functools import lru_cache
from pathlib import PurePath
from typing import Any, Literal

from IPython.core.displayhook import CapturingDisplayHook
from IPython.core.displaypub import CapturingDisplayPublisher, DisplayPublisher

FrontEnd = Literal["terminal", "console", "notebook", "capture"]
_CONSOLES = frozenset(("jupyter-console", "jupyter_console", "jupyter-qtconsole", "qtconsole", "jupyter-run", "spyder"))
_PYTHON_CLIENT = re.compile(r"[0-9a-f]{8}-[0-9a-f]{24}_(?P<pid>\d+)_\d+")
"""A message's id as jupyter_client makes it: session, process, number."""
_CONSOLES_FILE = re.compile(r"kernel-\d+\.json")
_LOOKED_AT = 4
"""Words of a command line among which a program's name is: an interpreter and flags of its own may stand before it."""


def front_end(shell: Any) -> FrontEnd:
    """What shows the output of the cell that runs now. ``capture``: ``%%capture`` or ``capture_output()`` keeps it."""
    publisher = shell.display_pub
    if type(publisher) is DisplayPublisher:
        return "terminal"
    if isinstance(publisher, CapturingDisplayPublisher) and isinstance(sys.displayhook, CapturingDisplayHook):
        return "capture"
    return "console" if _asked_by_console(shell) else "notebook"


def _asked_by_console(shell: Any) -> bool:
    request = getattr(shell, "parent_header", None) or {}
    found = _PYTHON_CLIENT.fullmatch(str(request.get("header", {}).get("msg_id", "")))
    if found is None or not request.get("content", {}).get("allow_stdin"):  # a browser's, or one that runs notebooks
        return False
    words = _command_line(int(found["pid"]))
    if words is None:  # on another machine, or of somebody else
        return _started_by_console()
    return any(PurePath(word.replace("\\", "/")).stem in _CONSOLES for word in words[:_LOOKED_AT])


@lru_cache(maxsize=64)
def _command_line(pid: int) -> tuple[str, ...] | None:
    """The command line of a process; None if it cannot be read. ipykernel brings psutil."""
    with contextlib.suppress(Exception):
        import psutil

        return tuple(psutil.Process(pid).cmdline())
    return None


def _started_by_console() -> bool:
    with contextlib.suppress(Exception):
        from ipykernel.connect import get_connection_file

        return _CONSOLES_FILE.fullmatch(os.path.basename(get_connection_file())) is not None
    return False
