"""How near decoding comes to what the memory's speed allows, in one line under the picture of tokens per second."""

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from engine.explain.gauge import NOT_MEASURED
from engine.explain.speed import Speed
from engine.outputs import StepTotals
from engine.runtime.activity import Activity
from vm_magic.panel.style import faint
from vm_magic.show.speed_view import NOTHING, reasons_html

if TYPE_CHECKING:
    from engine.llm import LLM

WINDOW_SECONDS = 10
"""Of steps that the share is told of."""
ASK = "How much of this device's speed is that?"
MEASURING = "measuring …"
SERVER_DOES_NOT_TELL = "How much of its device's speed this is, the server does not tell."


class SpeedLine:
    """The share of the device's best, and a button for the reasons; before, a button that measures the device."""

    def __init__(self, lock: AbstractContextManager[Any], wake: Callable[[], None]) -> None:
        self._lock = lock
        self._wake = wake
        self._llm: LLM | None = None
        self._marks: deque[tuple[int, StepTotals]] = deque()
        self._latest: Speed | None = None
        self.text = widgets.HTML()
        self.measure = widgets.Button(
            description="Measure",
            tooltip="reads memory and computes a product, for about half a second; not while requests run",
            layout=widgets.Layout(width="90px", height="26px"),
        )
        self.why = widgets.ToggleButton(description="Why?", layout=widgets.Layout(width="70px", height="26px"))
        self.reasons = widgets.HTML()
        row = widgets.HBox(
            [self.text, self.measure, self.why], layout=widgets.Layout(align_items="center", flex_flow="row wrap")
        )
        self.widget = widgets.VBox([row, self.reasons])
        self.measure.on_click(self._measure)
        self.why.observe(lambda _: wake(), "value")
        self.show_nothing()

    def refresh(self, llm: "LLM", activity: Activity) -> None:
        """Follow the steps of ``llm``; nothing is waited for."""
        if llm is not self._llm:
            self._llm, self._latest = llm, None
            self._marks.clear()
        between = self._recent(activity)
        is_known = llm.gauge.device is not None
        if is_known and between.decodes:
            self._latest = llm.gauge.running(between, llm.plan)
        self.measure.layout.display = "none" if is_known else ""
        if not is_known and self.measure.disabled is False:
            self.text.value = faint(ASK if llm.gauge.missing == NOT_MEASURED else llm.gauge.missing)
        elif is_known:
            self._show(self._latest)

    def show_nothing(self) -> None:
        """There is no model."""
        self.text.value = self.reasons.value = ""
        self.measure.layout.display = self.why.layout.display = "none"

    def _recent(self, activity: Activity) -> StepTotals:
        marks = self._marks
        if not marks or marks[-1][0] != activity.second:
            marks.append((activity.second, activity.steps))
        while len(marks) > 2 and marks[1][0] <= activity.second - WINDOW_SECONDS:
            marks.popleft()
        return activity.steps.since(marks[0][1])

    def _show(self, speed: Speed | None) -> None:
        decode = None if speed is None else speed.decode
        self.why.layout.display = "none" if decode is None else ""
        if speed is None or decode is None:
            self.text.value = faint("How much of this device's speed that is, shows while tokens are generated.")
            self.reasons.value = ""
            return
        self.text.value = f"<span>{decode.share:.0%} of what the memory's speed allows</span>"
        shown = [f"<div>{faint(line)}</div>" for line in speed.lines]
        reasons = reasons_html(speed.reasons) if speed.reasons else f"<div>{faint(NOTHING)}</div>"
        self.reasons.value = "".join([*shown, reasons]) if self.why.value else ""

    def _measure(self, _: Any) -> None:
        with self._lock:
            llm = self._llm
            self.measure.disabled = True
            self.text.value = faint(MEASURING)
        found = None if llm is None else llm.gauge.measure()  # without the lock: it waits for the engine's step
        with self._lock:
            if found is None and llm is not None:
                self.text.value = faint(llm.gauge.missing)
            self.measure.disabled = False
        if found is not None:
            self._wake()
