"""The way of all text to a terminal: what a model, a file or a server says is made harmless here, and only here.

What users get as objects (``reply.text``, cells of a DataFrame) is untouched. The tests see to it that nothing in
``vm_magic`` prints or publishes by another way.
"""

import sys
from typing import Any

from engine.format.text import harmless

_FAINT, _RESET = "\x1b[2m", "\x1b[22m"


def say(text: object, *, error: bool = False, faint: bool = False) -> None:
    """Print ``text`` and end the line; to stderr with ``error``, ``faint`` where a terminal can."""
    plain = harmless(str(text))
    print(f"{_FAINT}{plain}{_RESET}" if faint and sys.stdout.isatty() else plain, file=sys.stderr if error else None)


def write(text: str) -> None:
    """Print ``text`` as it is, a piece of a line maybe."""
    sys.stdout.write(harmless(text))


def shown(bundle: dict[str, Any]) -> dict[str, Any]:
    """``bundle`` with its plain text made harmless; the browser takes care of the other forms."""
    plain = bundle.get("text/plain")
    return {**bundle, "text/plain": harmless(plain)} if isinstance(plain, str) else bundle


def publish(shell: Any, bundle: dict[str, Any]) -> None:
    """Display ``bundle`` in the cell that runs."""
    shell.display_pub.publish(shown(bundle), {})


class HarmlessPrinter:
    """IPython's pretty printer, but what is printed is made harmless."""

    def __init__(self, printer: Any) -> None:
        self._printer = printer

    def text(self, text: str) -> None:
        """Print ``text``."""
        self._printer.text(harmless(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._printer, name)


def show_plainly(value: Any, printer: Any, cycle: bool) -> None:
    """The plain form of one of our objects, as IPython would print it."""
    pretty = getattr(type(value), "_repr_pretty_", None)
    if pretty is None:
        printer.text(harmless(repr(value)))
    else:
        pretty(value, HarmlessPrinter(printer), cycle)
