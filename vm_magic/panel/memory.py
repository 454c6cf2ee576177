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
            tooltip="share of the device's memory that the engine may use (memory_fraction)",
            layout=widgets.Layout(width="380px", max_width="100%"),
        )
        self.max_model_len = widgets.Text(
            description="max_model_len",
            tooltip="most tokens of a prompt and its reply together; empty: as many as fit",
            layout=widgets.Layout(width="250px", max_width="100%"),
        )
        self.max_num_seqs = widgets.Text(
            description="max_num_seqs",
            tooltip="most requests that run at once; empty: chosen from the memory",
            layout=widgets.Layout(width="240px", max_width="100%"),
        )
        for field in (self.max_model_len, self.max_num_seqs):
            field.style.description_width = "104px"
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
                widgets.HBox(
                    [self.apply, self.undo, self.verdict],
                    layout=widgets.Layout(align_items="center", flex_flow="row wrap"),
                ),
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
        changed: dict[str, Any] = {} if self._is_same(fraction, plan.fraction) else {"fraction": fraction}
        for field in (self.max_model_len, self.max_num_seqs):
            name = field.description
            current = _asked(plan, name)
            try:
                value = int_or_auto(field.value.strip() or "auto")
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            if value != current:
                changed[name] = value
        return changed

    @staticmethod
    def _is_same(shown: float, current: float) -> bool:
        """Whether the slider shows the plan's own fraction: as it is, or as a front end rounds it to a whole step."""
        return math.isclose(shown, current, abs_tol=1e-6) or math.isclose(
            shown, round(round(current / _STEP) * _STEP, 4), abs_tol=1e-6
        )

    def _show_current(self, plan: "MemoryPlan") -> None:
        self._syncing = True
        try:
            self.fraction.value = plan.fraction
            for field in (self.max_model_len, self.max_num_seqs):
                asked = _asked(plan, field.description)
                field.value = "" if asked == "auto" else str(asked)
        finally:
            self._syncing = False
        self._show_plan(plan, plan)
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
        self._show_plan(plan, self._plan)
        self.verdict.value = faint("Not applied yet.") if changed else ""
        self.apply.disabled = self.undo.disabled = not changed

    def _show_plan(self, plan: "MemoryPlan", current: "MemoryPlan") -> None:
        """The picture of ``plan``, and in empty boxes what it makes of them."""
        self.identity.value = identity_html(plan, current)
        self.max_model_len.placeholder = f"auto: {plan.max_model_len:,}"
        self.max_num_seqs.placeholder = f"auto: {plan.max_num_seqs:,}"

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
            self.verdict.value = faint("Applying …")
        try:
            llm.replan(**changed)  # without the lock: it waits for the engine's step
        except VMMagicError as error:
            with self._lock:
                self.verdict.value = bad(refusal(error))
                self.apply.disabled = False
            return
        with self._lock:
            self.verdict.value = good("Applied: " + " ".join(f"{name}={value}" for name, value in changed.items()))
        self._wake()


def refusal(error: Exception) -> str:
    """An error in words, with the largest length that fits where the plan knows it."""
    if not isinstance(error, MemoryPlanError):
        return str(error)
    fits = error.numbers.get("max_model_len_that_fits")
    # The first sentence names the shortage; the fields above are the settings that the rest would name.
    short = str(error).split(". ")[0].rstrip(".")
    return (
        f"{short}. The largest max_model_len that fits is {fits:,}." if isinstance(fits, int) and fits else f"{short}."
    )


def _asked(plan: "MemoryPlan", name: str) -> int | str:
    """What was asked for under ``name``: a number, the model's own length included, or ``auto``."""
    asked: int | str | None = getattr(plan.inputs, name)
    own: int = getattr(plan, name)
    return own if asked is None else asked


def identity_html(plan: "MemoryPlan", current: "MemoryPlan") -> str:
    """The identity from the device's limit to the requests that fit, each figure with what it was; and the picture."""
    steps: list[tuple[str, str, str, str]] = [
        ("", "limit", size_text(plan.device_limit), size_text(current.device_limit)),
        ("→", "usable", size_text(plan.usable), size_text(current.usable)),
        ("−", "weights", size_text(plan.model_memory), size_text(current.model_memory)),
        ("−", "overhead", size_text(plan.overhead), size_text(current.overhead)),
        ("−", "state", size_text(plan.state_memory), size_text(current.state_memory)),
        ("=", "KV cache", size_text(plan.kv_budget), size_text(current.kv_budget)),
        ("→", "blocks", f"{plan.num_blocks:,}", f"{current.num_blocks:,}"),
        ("→", "tokens", f"{plan.max_tokens_cached:,}", f"{current.max_tokens_cached:,}"),
        ("→", "full-length requests", f"{plan.max_concurrency:.4g}", f"{current.max_concurrency:.4g}"),
    ]
    chain = "".join(_step(*step) for step in steps)
    fits = (
        f"max_model_len {plan.max_model_len:,}; the largest that fits is <b>{plan.max_model_len_that_fits:,}</b>; "
        f"max_num_seqs {plan.max_num_seqs:,}"
    )
    return f'<div class="vmp-chain">{chain}</div>{plan_picture_html(plan)}<div style="margin-top:6px">{fits}</div>'


def _step(operator: str, name: str, value: str, was: str) -> str:
    before = f'<div class="vmp-was">was {html.escape(was)}</div>' if was != value else ""
    sign = f"<span>{operator}</span>" if operator else ""
    return (
        f'<div>{sign}<div class="vmp-box" data-name="{name}"><div class="vmp-k">{name}</div>'
        f'<div class="vmp-v">{html.escape(value)}</div>{before}</div></div>'
    )
