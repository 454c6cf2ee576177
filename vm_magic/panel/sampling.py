"""The panel's sampling section: every live setting, presets, thinking. Changes reach requests that run already."""

import json
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import ipywidgets as widgets

from engine.errors import VMMagicError
from engine.params.live_sampling import LIVE_NAMES
from engine.params.sampling_defaults import MODEL_SOURCES, SamplingDefaults
from engine.params.sampling_params import COMMON, PARAMETERS
from engine.params.settings import MODEL_PRESET, PRESETS, THINKING_NAMES
from vm_magic.panel.snapshot import PanelSnapshot
from vm_magic.panel.style import bad, faint
from vm_magic.state.live_settings import can_switch_thinking, change_settings
from vm_magic.state.settings_text import SETTABLE, read_settings

_OWN, _ON, _OFF = "model's own", "on", "off"
_SWITCH: Mapping[str, bool | None] = {_OWN: None, _ON: True, _OFF: False}


SLIDERS = {name: slider for name in COMMON if (slider := PARAMETERS[name].slider) is not None}
"""Parameters with a slider."""
FIELDS = tuple(name for name in SETTABLE if name not in (*SLIDERS, "preset", *THINKING_NAMES))
"""Names with a text field, read as ``%vllm_metal set`` reads them."""
_LOCAL_NOTE = (
    "Changes apply to all requests that do not say otherwise, from cells and clients, including those that already run "
    f"(sliders, thinking, {', '.join(name for name in LIVE_NAMES if name in FIELDS)}; "
    "the other fields from the next request on)."
)
_REMOTE_NOTE = (
    "Changes are sent with this notebook's requests that do not say otherwise, from the next one on. "
    "What is not set here is the server's own, which is not known here: vLLM's default is shown in its place."
)
_LOCAL_WORDS = {
    "default": "vLLM's default",
    **{source: f"the model's recommendation ({source})" for source in MODEL_SOURCES},
}
_REMOTE_WORDS = {"default": "the server's own"}


class Parameter:
    """A slider or field for one name: its current value, where that comes from, and a button that forgets it."""

    def __init__(self, name: str, control: widgets.Widget, forget: Callable[[str], None]) -> None:
        self.name = name
        self._range = None if isinstance(control, widgets.Text) else (control.min, control.max)
        self.control = control
        self.source = widgets.HTML(layout=widgets.Layout(width="150px"))
        self.undo = widgets.Button(
            icon="undo",
            tooltip=f"take {name} back: the model's own value applies again",
            layout=widgets.Layout(width="30px", height="24px", padding="0", visibility="hidden"),
        )
        self.undo.on_click(lambda _: forget(name))
        self.widget = widgets.HBox([control, self.undo, self.source], layout=widgets.Layout(align_items="center"))
        self.widget.add_class("vmp-param")

    def show(self, value: Any, source: str, is_set: bool) -> None:
        """Show ``value`` and its source; sliders widen while a value lies beyond them."""
        control = self.control
        if self._range is None:
            control.value = field_text(value) if is_set else ""
            control.placeholder = field_text(value)
        else:
            low, high = min(self._range[0], value), max(self._range[1], value)
            with control.hold_sync():  # one message: a front end clips a value that comes before its range
                control.min, control.max = min(control.min, low), max(control.max, high)
                control.value = value
                control.min, control.max = low, high
        self.source.value = faint(source)
        self.undo.layout.visibility = "visible" if is_set else "hidden"


class SamplingSection:
    """Two-way with ``%vllm_metal set`` and ``%config VLLMMetal.…``: all change the session's live settings."""

    title = "Sampling"
    wants_blocks = False

    def __init__(self, lock: AbstractContextManager[Any], wake: Callable[[], None], *, remote: bool = False) -> None:
        self._lock = lock
        self._wake = wake
        self._words = _REMOTE_WORDS if remote else _LOCAL_WORDS
        self._remote = remote
        self._snapshot: PanelSnapshot | None = None
        self._shown: Any = None
        self._syncing = False
        self.message = widgets.HTML()
        self.preset = widgets.Dropdown(
            options=[MODEL_PRESET, *PRESETS], description="preset", layout=widgets.Layout(width="260px")
        )
        self.forget_all = widgets.Button(
            description="Reset to defaults",
            tooltip="takes back all that was set here, by set or by %config; the model's own values apply again",
            layout=widgets.Layout(width="140px"),
        )
        self.switch = widgets.Dropdown(
            options=list(_SWITCH), description="thinking", layout=widgets.Layout(width="260px")
        )
        self.budget = widgets.Text(
            description="budget",
            placeholder="no limit",
            continuous_update=False,
            tooltip="most tokens of thought",
            layout=widgets.Layout(width="190px"),
        )
        if not remote:  # no server can do it
            self.finish = widgets.Button(
                description="Finish thinking now",
                icon="forward",
                layout=widgets.Layout(width="170px"),
                tooltip="ends the thoughts of all requests that think; their answers follow",
            )
        for widget in (self.preset, self.switch, self.budget):
            widget.style.description_width = "60px"
        self.parameters = {name: Parameter(name, control, self._forget) for name, control in _controls().items()}
        self.widget = self._layout()
        self._listen()

    def refresh(self, snapshot: PanelSnapshot) -> None:
        """Follow what was set elsewhere; a slider that the user is moving is left alone."""
        self._snapshot = snapshot
        state = self._state(snapshot)
        if state != self._shown:
            self._shown = state
            self._show(snapshot)
        if self._remote:
            return
        thinks = snapshot.activity is not None and any(request.thinking for request in snapshot.activity.requests)
        self.finish.disabled = not thinks

    def _layout(self) -> widgets.Widget:
        sliders = widgets.VBox([self.parameters[name].widget for name in SLIDERS])
        fields = widgets.VBox([self.parameters[name].widget for name in FIELDS])
        more = widgets.Accordion(children=[fields], selected_index=None)
        more.set_title(0, "more: limits, stops, seed, tokens")
        note = faint(_REMOTE_NOTE if self._remote else _LOCAL_NOTE)
        thinking = [self.switch, self.budget] if self._remote else [self.switch, self.budget, self.finish]
        wrap = widgets.Layout(flex_flow="row wrap", align_items="center")
        return widgets.VBox(
            [
                widgets.HBox([self.preset, self.forget_all, self.message], layout=wrap),
                widgets.HBox(thinking, layout=wrap),
                sliders,
                more,
                widgets.HTML(f"<div>{note}</div>"),
            ]
        )

    def _listen(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.control.observe(self._changer(name), "value")
        self.preset.observe(lambda change: self._change({"preset": change["new"]}), "value")
        self.switch.observe(lambda change: self._change({"enable_thinking": _SWITCH[change["new"]]}), "value")
        self.budget.observe(lambda change: self._change_text("thinking_token_budget", change["new"]), "value")
        self.forget_all.on_click(self._forget_all)
        if not self._remote:
            self.finish.on_click(self._finish_thinking)

    def _changer(self, name: str) -> Callable[[Any], None]:
        if isinstance(self.parameters[name].control, widgets.Text):
            return lambda change: self._change_text(name, change["new"])
        return lambda change: self._change_number(name, change["old"], change["new"])

    def _change_number(self, name: str, before: float, now: float) -> None:
        if not math.isclose(before, now, abs_tol=1e-9):  # not a front end's rounding, 0.9500000000000002
            self._change({name: round(now, 9)})

    def _change_text(self, name: str, text: str) -> None:
        with self._lock:
            if self._syncing:
                return
            try:
                values = read_settings(f"{name}={text.strip()}")
            except VMMagicError as error:
                self.message.value = bad(str(error))
                return
            self._change(values)

    def _change(self, values: Mapping[str, Any]) -> None:
        with self._lock:
            if self._syncing or self._snapshot is None:
                return
            try:
                change_settings(self._snapshot.session, values)
            except VMMagicError as error:
                self.message.value = bad(str(error))
                return
            self.message.value = ""
            self._shown = self._state(self._snapshot)
            # What the user moved is left alone, so that its slider does not jump.
            self._show(self._snapshot, but=frozenset(values))

    def _forget(self, name: str) -> None:
        self._change({name: None})
        self._wake_after_forgetting()

    def _forget_all(self, _: Any) -> None:
        with self._lock:
            if self._snapshot is not None:
                self._snapshot.session.settings.reset()
                self.message.value = ""
                self._wake_after_forgetting()

    def _wake_after_forgetting(self) -> None:
        with self._lock:
            self._shown = None
        self._wake()

    def _finish_thinking(self, _: Any) -> None:
        with self._lock:
            llm = None if self._snapshot is None else self._snapshot.llm
        if llm is not None:
            llm.finish_thinking()
            self._wake()

    def _state(self, snapshot: PanelSnapshot) -> Any:
        return snapshot.source, dict(snapshot.session.settings.everything())

    def _show(self, snapshot: PanelSnapshot, but: frozenset[str] = frozenset()) -> None:
        settings = snapshot.session.settings
        defaults = SamplingDefaults({}, {}, settings) if snapshot.source is None else snapshot.source.defaults
        everything = settings.everything()
        resolved = defaults.resolve({})
        self._syncing = True
        try:
            for name, parameter in self.parameters.items():
                source = self._words.get(resolved.sources[name], resolved.sources[name])
                if name in but:
                    parameter.source.value = faint(source)
                    parameter.undo.layout.visibility = "visible" if everything.get(name) is not None else "hidden"
                else:
                    is_set = resolved.sources[name] == "set"
                    parameter.show(everything[name] if is_set else getattr(resolved, name), source, is_set)
            self._show_thinking(snapshot, everything)
            self.preset.value = settings.preset or MODEL_PRESET
            self.forget_all.disabled = not everything
        finally:
            self._syncing = False

    def _show_thinking(self, snapshot: PanelSnapshot, everything: Mapping[str, Any]) -> None:
        switch, budget = (everything.get(name) for name in THINKING_NAMES)
        self.switch.value = next(name for name, value in _SWITCH.items() if value is switch)
        self.budget.value = "" if budget is None else str(budget)
        self.switch.disabled = snapshot.llm is not None and not can_switch_thinking(snapshot.llm)
        self.budget.disabled = snapshot.llm is not None and not snapshot.llm.reasoning_parser


def _controls() -> dict[str, widgets.Widget]:
    wide, style = widgets.Layout(width="440px", max_width="100%"), {"description_width": "150px"}
    controls: dict[str, widgets.Widget] = {}
    for name, slider in SLIDERS.items():
        whole = PARAMETERS[name].kind.type is int
        kind = widgets.IntSlider if whole else widgets.FloatSlider
        controls[name] = kind(
            min=slider.low,
            max=slider.high,
            step=slider.step,
            description=name,
            # While it updates continuously a front end also sends back what it was told, moved to a whole step.
            continuous_update=False,
            readout_format="d" if whole else ".9",
            style=style,
            layout=wide,
        )
    for name in FIELDS:
        controls[name] = widgets.Text(
            description=name,
            style={"description_width": "220px"},
            continuous_update=False,
            layout=widgets.Layout(width="440px", max_width="100%"),
        )
    return controls


def field_text(value: Any) -> str:
    """A value as ``set`` would read it again."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)
