"""A place in a cell's output that can be written again."""

import contextvars
import uuid
from typing import Any

from IPython.core.displaypub import DisplayPublisher

Bundle = dict[str, Any]
"""MIME types with their data."""


def can_update(shell: Any) -> bool:
    """Whether ``shell`` can replace what it displayed (a notebook); a terminal prints a new copy."""
    return type(shell.display_pub) is not DisplayPublisher


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
        self._shown: Bundle = {}
        self._metadata: dict[str, Any] = {}

    def __call__(self, bundle: Bundle) -> None:
        """Show ``bundle``."""
        opened, self._opened = self._opened, True
        self._shown = bundle
        publish = self._shell.display_pub.publish
        self._context.copy().run(publish, bundle, self._metadata, transient=self._transient, update=opened)

    def annotate(self, metadata: dict[str, Any]) -> None:
        """Give what is shown ``metadata``, which a saved notebook keeps."""
        self._metadata = metadata
        self(self._shown)


def open_handle(shell: Any, bundle: Bundle) -> DisplayHandle:
    """Display ``bundle`` and return what replaces it."""
    handle = DisplayHandle(shell)
    handle(bundle)
    return handle
