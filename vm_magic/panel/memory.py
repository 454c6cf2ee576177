"""The panel's memory section: the plan's identity while sliders move, and *Apply*."""

import html
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets

from engine.errors import MemoryPlanError, VMMagicError
from engine.params.flag_values import int_or_auto
from engine.params.sizes import size_text
from vm_magic.panel.snapshot import NO_MODEL, PanelSnapshot
from vm_magic.panel.style import bad, faint, good
from vm_magic.show.plan_view import plan_picture_html

if TYPE_CHECKING:
    from engine.llm import LLM
    from engine.memory.plan import MemoryPlan


_STEP = 0.01
"""Of the fraction's slider."""


class MemorySection:
    """Fraction, length and number of sequences: the plan is shown at once and changed only on *Apply*."""

    title = "Memory"
    wants_blocks = False

    def __init__(self, lock: AbstractContextManager[Any], wake: Callable[[], None]) -> None:
        self._lock = lock
        self._wake = wake
        self._llm: LLM | None = None
        self._plan: MemoryPlan | None = None
        self._syncing = False
        self.fraction = widgets.FloatSlider(
            min=_STEP,
            max=1.0,
            step=_STEP,
            readout_format=".9",
            description="fraction",
            tooltip="share of the device's memory (memory_fraction)",
            layout=widgets.Layout(width="380px"),
        )
        self.max_model_len = widgets.Text(description="max_model_len", layout=widgets.Layout(width="240px"))
        self.max_num_seqs = widgets.Text(description="max_num_seqs", layout=widgets.Layout(width="220px"))
        for field in (self.max_model_len, self.max_num_seqs):
            field.style.description_width = "112px"
            field.placeholder = "auto"
        self.fraction.style.description_width = "60px"
        self.apply = widgets.Button(
            description="Apply", button_style="primary", disabled=True, layout=widgets.Layout(width="90px")
        )
        self.undo = widgets.Button(description="Undo", disabled=True, layout=widgets.Layout(width="80px"))
        self.verdict = widgets.HTML()
        self.identity = widgets.HTML(faint(NO_MODEL))
        self.widget = widgets.VBox(
            [
                widgets.HBox(
                    [self.fraction, self.max_model_len, self.max_num_seqs], layout=widgets.Layout(flex_flow="row wrap")
                ),
                widgets.HBox([self.apply, self.undo, self.verdict], layout=widgets.Layout(align_items="center")),
                self.identity,
            ]
        )
        for field in (self.fraction, self.max_model_len, self.max_num_seqs):
            field.observe(self._moved, "value")
        self.apply.on_click(self._apply)
        self.undo.on_click(self._undo)

    def refresh(self, snapshot: PanelSnapshot) -> None:
        """Follow the current plan: another model, or a plan changed elsewhere."""
        plan = None if snapshot.llm is None else snapshot.llm.plan
        if snapshot.llm is self._llm and plan is self._plan:
            return
        self._llm, self._plan = snapshot.llm, plan
        for widget in (self.fraction, self.max_model_len, self.max_num_seqs):
            widget.disabled = plan is None
        if plan is None:
            self.identity.value, self.verdict.value = faint(NO_MODEL), ""
            self.apply.disabled = self.undo.disabled = True
            return
        self._show_current(plan)

    def wanted(self) -> dict[str, Any]:
        """What the fields change in the current plan, as ``LLM.replan`` takes it. Raises ValueError."""
        plan = self._plan
        assert plan is not None, "there is a plan once the fields can be changed"
        fraction = round(self.fraction.value, 4)
        # A front end rounds a value that it gets to a whole step and sends that back.
        is_moved = abs(fraction - plan.fraction) > _STEP / 2 + 1e-9
        changed: dict[str, Any] = {"fraction": fraction} if is_moved else {}
        for field, current in ((self.max_model_len, plan.max_model_len), (self.max_num_seqs, plan.max_num_seqs)):
            name = field.description
            try:
                value = int_or_auto(field.value.strip() or "auto")
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if value != current:
                changed[name] = value
        return changed

    def _show_current(self, plan: "MemoryPlan") -> None:
        self._syncing = True
        try:
            self.fraction.value = plan.fraction
            self.max_model_len.value = str(plan.max_model_len)
            self.max_num_seqs.value = str(plan.max_num_seqs)
        finally:
            self._syncing = False
        self.identity.value = identity_html(plan, plan)
        self.apply.disabled = self.undo.disabled = True

    def _moved(self, change: Any) -> None:
        if change["owner"] is self.fraction and math.isclose(change["old"], change["new"], abs_tol=1e-9):
            return  # rounding by the front end
        with self._lock:
            if not self._syncing and self._llm is not None:
                self._preview(self._llm)

    def _preview(self, llm: "LLM") -> None:
        assert self._plan is not None, "a loaded model has a plan"
        try:
            changed = self.wanted()
            plan = llm.what_if(**changed)
        except (ValueError, VMMagicError) as error:
            self.verdict.value = bad(refusal(error))
            self.apply.disabled, self.undo.disabled = True, False
            return
        self.identity.value = identity_html(plan, self._plan)
        self.verdict.value = faint("not applied yet") if changed else ""
        self.apply.disabled = self.undo.disabled = not changed

    def _undo(self, _: Any) -> None:
        with self._lock:
            if self._plan is not None:
                self.verdict.value = ""
                self._show_current(self._plan)

    def _apply(self, _: Any) -> None:
        with self._lock:
            llm = self._llm
            if llm is None:
                return
            try:
                changed = self.wanted()
            except ValueError as error:
                self.verdict.value = bad(str(error))
                return
            self.apply.disabled = True
            self.verdict.value = faint("applying …")
        try:
            llm.replan(**changed)  # without the lock: it waits for the engine's step
        except VMMagicError as error:
            with self._lock:
                self.verdict.value = bad(refusal(error))
                self.apply.disabled = False
            return
        with self._lock:
            self.verdict.value = good("applied: " + " ".join(f"{name}={value}" for name, value in changed.items()))
        self._wake()


def refusal(error: Exception) -> str:
    """An error in words, with the largest length that fits where the plan knows it."""
    if not isinstance(error, MemoryPlanError):
        return str(error)
    fits = error.numbers.get("max_model_len_that_fits")
    # The first sentence names the shortage; the fields above are the settings that the rest would name.
    short = str(error).split(". ")[0].rstrip(".")
    return f"{short}. The largest max_model_len that fits is {fits}." if fits else f"{short}."


def identity_html(plan: "MemoryPlan", current: "MemoryPlan") -> str:
    """The identity from the device's limit to the requests that fit, each figure with what it was; and the picture."""
    steps: list[tuple[str, str, str, str]] = [
        ("", "limit", size_text(plan.device_limit), size_text(current.device_limit)),
        ("→", "usable", size_text(plan.usable), size_text(current.usable)),
        ("−", "weights", size_text(plan.model_memory), size_text(current.model_memory)),
        ("−", "overhead", size_text(plan.overhead), size_text(current.overhead)),
        ("−", "state", size_text(plan.state_memory), size_text(current.state_memory)),
        ("=", "KV cache", size_text(plan.kv_budget), size_text(current.kv_budget)),
        ("→", "blocks", str(plan.num_blocks), str(current.num_blocks)),
        ("→", "tokens", str(plan.max_tokens_cached), str(current.max_tokens_cached)),
        ("→", "full-length requests", f"{plan.max_concurrency:.4g}", f"{current.max_concurrency:.4g}"),
    ]
    chain = "".join(_step(*step) for step in steps)
    fits = (
        f"max_model_len {plan.max_model_len}; the largest that fits is <b>{plan.max_model_len_that_fits}</b>; "
        f"max_num_seqs {plan.max_num_seqs}"
    )
    return f'<div class="vmp-chain">{chain}</div>{plan_picture_html(plan)}<div style="margin-top:6px">{fits}</div>'


def _step(operator: str, name: str, value: str, was: str) -> str:
    before = f'<div class="vmp-was">was {html.escape(was)}</div>' if was != value else ""
    sign = f"<span>{operator}</span>" if operator else ""
    return (
        f'<div>{sign}<div class="vmp-box" data-name="{name}"><div class="vmp-k">{name}</div>'
        f'<div class="vmp-v">{html.escape(value)}</div>{before}</div></div>'
    )
