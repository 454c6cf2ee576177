"""A place in a cell's output that can be written again."""

import contextvars
import uuid
from typing import Any

from IPython.core.displaypub import CapturingDisplayPublisher

from vm_magic.show.front_end import front_end
from vm_magic.show.terminal import shown

Bundle = dict[str, Any]
"""MIME types with their data."""


def can_update(shell: Any) -> bool:
    """Whether what was displayed can be replaced: in a notebook. A terminal prints a new copy, a console nothing."""
    return front_end(shell) in ("notebook", "capture")


def can_fold(shell: Any) -> bool:
    """Whether what ``shell`` displays may be looked at as HTML; who captures a cell's output looks for text."""
    return can_update(shell) and not isinstance(shell.display_pub, CapturingDisplayPublisher)


class DisplayHandle:
    """One place in a cell's output: the first call displays a bundle there, later ones replace it.

    Safe from any thread: ipykernel keeps the header of the cell in a context variable; what is shown
    runs in a copy of the opening cell's context, so it lands there whatever runs by then. An interrupt
    while the first one is sent leaves a handle that replaces it all the same. Captured output (``%%capture``) holds
    the latest bundle alone.
    """

    def __init__(self, shell: Any) -> None:
        self._shell = shell
        self._captured: list[dict[str, Any]] | None = None
        if front_end(shell) == "capture":
            self._captured = shell.display_pub.outputs
        self._transient = {"display_id": uuid.uuid4().hex}
        self._context = contextvars.copy_context()
        self._opened = False
        self._shown: Bundle = {}
        self._metadata: dict[str, Any] = {}

    def __call__(self, bundle: Bundle) -> None:
        """Show ``bundle``."""
        opened, self._opened = self._opened, True
        self._shown = bundle = shown(bundle)
        if self._captured is not None:
            self._keep(self._captured, bundle)
            return
        publish = self._shell.display_pub.publish
        self._context.copy().run(publish, bundle, self._metadata, transient=self._transient, update=opened)

    def annotate(self, metadata: dict[str, Any]) -> None:
        """Give what is shown ``metadata``, which a saved notebook keeps."""
        self._metadata = metadata
        self(self._shown)

    def _keep(self, outputs: list[dict[str, Any]], bundle: Bundle) -> None:
        """Put ``bundle`` where captured output has this handle's earlier one, or at the end."""
        for output in outputs:
            if output["transient"] is self._transient:
                output["data"], output["metadata"] = bundle, self._metadata
                return
        outputs.append({"data": bundle, "metadata": self._metadata, "transient": self._transient, "update": False})


def open_handle(shell: Any, bundle: Bundle) -> DisplayHandle:
    """Display ``bundle`` and return what replaces it."""
    handle = DisplayHandle(shell)
    handle(bundle)
    return handle
