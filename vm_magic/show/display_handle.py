"""A place in a cell's output that can be written again."""

import contextvars
import uuid
from typing import Any

from IPython.core.displaypub import CapturingDisplayPublisher, DisplayPublisher

Bundle = dict[str, Any]
"""MIME types with their data."""


def can_update(shell: Any) -> bool:
    """Whether ``shell`` can replace what it displayed (a notebook); a terminal prints a new copy."""
    return type(shell.display_pub) is not DisplayPublisher


def can_fold(shell: Any) -> bool:
    """Whether what ``shell`` displays may be looked at as HTML; who captures a cell's output looks for text."""
    return can_update(shell) and not isinstance(shell.display_pub, CapturingDisplayPublisher)


class DisplayHandle:
    """One place in a cell's output: the first call displays a bundle there, later ones replace it.

    Safe from any thread: ipykernel keeps the header of the cell in a context variable; what is shown
    runs in a copy of the opening cell's context, so it lands there whatever runs by then. An interrupt
    while the first one is sent leaves a handle that replaces it all the same.
    """

    def __init__(self, shell: Any) -> None:
        self._shell = shell
        self._transient = {"display_id": uuid.uuid4().hex}
        self._context = contextvars.copy_context()
        self._opened = False

    def __call__(self, bundle: Bundle) -> None:
        """Show ``bundle``."""
        opened, self._opened = self._opened, True
        publish = self._shell.display_pub.publish
        self._context.copy().run(publish, bundle, {}, transient=self._transient, update=opened)


def open_handle(shell: Any, bundle: Bundle) -> DisplayHandle:
    """Display ``bundle`` and return what replaces it."""
    handle = DisplayHandle(shell)
    handle(bundle)
    return handle
