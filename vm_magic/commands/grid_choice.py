"""Buttons below a grid that make the sampling values of one of its variants those of all requests."""

from typing import TYPE_CHECKING, Any

from engine.batch.prompt_table import is_missing
from vm_magic.show.display_handle import can_update
from vm_magic.state.live_settings import change_settings
from vm_magic.state.session import current_session
from vm_magic.state.settings_text import SETTABLE

if TYPE_CHECKING:
    import pandas

MOST_BUTTONS = 8
"""With more variants there are none: the table says the values, and ``set`` takes them."""


def variants_of(frame: "pandas.DataFrame") -> list[dict[str, Any]]:
    """The sampling values of a grid's variants, each once; only those in which they differ."""
    names = [name for name in frame.columns if name in SETTABLE and frame[name].astype(str).nunique() > 1]
    if not names:
        return []
    found: dict[str, dict[str, Any]] = {}
    for record in frame[names].to_dict("records"):
        values = {str(name): _plain(value) for name, value in record.items() if not is_missing(value)}
        found.setdefault(str(values), values)
    return [values for values in found.values() if values]


def offer_settings(shell: Any, frame: "pandas.DataFrame") -> None:
    """Show a button for each variant, where there can be some and there is a choice."""
    variants = variants_of(frame)
    if not (can_update(shell) and 2 <= len(variants) <= MOST_BUTTONS):
        return
    from vm_magic.panel.choice_buttons import ChoiceButtons

    texts = [" ".join(f"{name}={_text(value)}" for name, value in values.items()) for values in variants]

    def choose(place: int) -> str:
        change_settings(current_session(), variants[place])
        back = " ".join(f"{name}=none" for name in variants[place])
        return f"Set for all requests: {texts[place]} (%vllm_metal set {back} takes it back)"

    hint = f"A button sets one for all requests, as %vllm_metal set {texts[0]} does"
    ChoiceButtons(shell, [f"Use {text}" for text in texts], hint, choose)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """A number of numpy's as one of Python's."""
    return value.item() if hasattr(value, "item") else value
