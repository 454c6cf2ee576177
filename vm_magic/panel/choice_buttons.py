"""Buttons below an output that keep one of several: a reply of a comparison, the settings of a grid.

A saved notebook has no kernel to draw them: the line below them says the same in code, and its style sheet hides what
JupyterLab writes in the place of widgets that are gone.
"""

import html
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as widgets

from engine.errors import VMMagicError
from vm_magic.panel.panel import answer_on_any_subshell, widgets_below
from vm_magic.panel.style import hiding_gone_widgets
from vm_magic.show.display_handle import Bundle, DisplayHandle
from vm_magic.show.terminal import publish

_open: list["ChoiceButtons"] = []
MAX_OPEN = 20
"""Rows of buttons that work at a time; the oldest are closed, and their lines say how to do it in code."""


class ChoiceButtons:
    """A row of buttons under ``labels``, and a line below it. ``choose(place)`` does it and gives the line to show."""

    def __init__(self, shell: Any, labels: Sequence[str], hint: str, choose: Callable[[int], str]) -> None:
        self._choose = choose
        self._name = f"vm-choice-{uuid.uuid4().hex[:12]}"
        self.buttons = [
            widgets.Button(description=label, tooltip=label, layout=widgets.Layout(width="auto", max_width="100%"))
            for label in labels
        ]
        self.widget = widgets.HBox(self.buttons, layout=widgets.Layout(flex_flow="row wrap", margin="4px 0 0 0"))
        for place, button in enumerate(self.buttons):
            button.on_click(lambda _, place=place: self._clicked(place))
        for widget in widgets_below(self.widget):
            answer_on_any_subshell(widget)
        publish(shell, {**self.widget._repr_mimebundle_(), "text/plain": ""})
        self._note = DisplayHandle(shell)
        self._note(self._bundle(hint))
        _open.append(self)
        while len(_open) > MAX_OPEN:
            _open[0].close()

    def mark(self, place: int, line: str) -> None:
        """Show which one is chosen, and ``line`` below."""
        for i, button in enumerate(self.buttons):
            button.icon = "check" if i == place else ""
        self._note(self._bundle(line))

    def close(self) -> None:
        """Take the buttons away. Safe to repeat."""
        if self in _open:
            _open.remove(self)
            for widget in widgets_below(self.widget):
                widget.close()

    def _clicked(self, place: int) -> None:
        try:
            self.mark(place, self._choose(place))
        except VMMagicError as error:
            self._note(self._bundle(f"⚠ {error}"))

    def _bundle(self, line: str) -> Bundle:
        shown = f'<div class="{self._name}" style="opacity:0.7;font-size:12px">{html.escape(line)}</div>'
        return {"text/plain": line, "text/html": hiding_gone_widgets(self._name) + shown}


def close_choices() -> None:
    """Take all buttons away."""
    for one in list(_open):
        one.close()
