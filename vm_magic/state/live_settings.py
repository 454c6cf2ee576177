"""How the notebook changes live settings: one function, and ``%config VLLMMetal.temperature``."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from traitlets import HasTraits, TraitType

from engine.errors import ConfigError, RequestError
from engine.params.settings import THINKING_SWITCHES, Settings
from vm_magic.state.settings_text import MEMORY_NAMES, SETTABLE, check_setting

if TYPE_CHECKING:
    from vm_magic.state.session import Session


def change_settings(session: "Session", values: Mapping[str, Any]) -> None:
    """Set ``values`` (None removes one) for running requests and new ones; all of them or none.

    :data:`MEMORY_NAMES` change the loaded model's memory plan. Raises RequestError for a thinking switch or
    budget that the loaded model has no use for, and what ``LLM.replan`` raises.
    """
    memory = {name: value for name, value in values.items() if name in MEMORY_NAMES}
    values = {name: value for name, value in values.items() if name not in MEMORY_NAMES}
    _check_thinking(session, values)
    if memory:
        _check(session.settings, values)
        _change_memory(session, memory)
    if values:
        session.settings.update(**values)


def _check(settings: Settings, values: Mapping[str, Any]) -> None:
    """Raise what ``settings.update`` would."""
    trial = Settings()
    trial.adopt(settings)
    trial.update(**values)


def _change_memory(session: "Session", memory: Mapping[str, Any]) -> None:
    if session.remote is not None:
        names = ", ".join(memory)
        raise ConfigError(f"{names}: memory is the remote server's to plan; %vllm_metal connect --close comes back")
    changes = {"fraction" if name == "memory_fraction" else name: value for name, value in memory.items()}
    session.require().replan(**changes)


def _check_thinking(session: "Session", values: Mapping[str, Any]) -> None:
    llm = session.loaded
    if llm is not None and session.remote is None:
        if values.get("enable_thinking") is not None and not can_switch_thinking(llm):
            raise RequestError(
                "enable_thinking: this model's chat template has no switch for thinking", param="enable_thinking"
            )
        if values.get("thinking_token_budget") is not None and not llm.reasoning_parser:
            raise RequestError(
                "thinking_token_budget needs a model that thinks: load it with --reasoning-parser NAME",
                param="thinking_token_budget",
            )


def can_switch_thinking(llm: Any) -> bool:
    """Whether the model's chat template reads a switch for thinking."""
    return any(name in llm.template_variables for name in THINKING_SWITCHES)


def thinking_kwargs(llm: Any, think: bool | None) -> dict[str, Any]:
    """The chat template's variable for ``--think``. Raises RequestError if it has none to turn thinking on.

    A remote server's template is not known here: it gets every name for the switch.
    """
    if think is None:
        return {}
    known = getattr(llm, "template_variables", THINKING_SWITCHES)
    names = [name for name in THINKING_SWITCHES if name in known]
    if think and not names:
        raise RequestError(
            "--think: this model's chat template has no switch for thinking (enable_thinking); leave the flag out",
            param="think",
        )
    return dict.fromkeys(names, think)


class LiveSetting(TraitType[Any, Any]):  # type: ignore[misc]
    """A trait that holds no value of its own: reading and writing go to the session's live settings."""

    info_text = "a value as %vllm_metal set takes it; None: not set"

    def get(self, obj: HasTraits, cls: type | None = None) -> Any:  # noqa: ARG002 - traitlets' signature
        """What is set now, None if nothing is."""
        from vm_magic.state.session import current_session

        return current_session().settings.everything().get(self.name)

    def set(self, obj: HasTraits, value: Any) -> None:  # noqa: ARG002 - traitlets' signature
        """Set it for all requests that do not say otherwise."""
        from vm_magic.state.session import current_session

        name = str(self.name)
        change_settings(current_session(), {name: check_setting(name, value)})


LiveTraits = type(
    "LiveTraits",
    (HasTraits,),
    {
        "__doc__": "One trait per live setting, so that ``%config VLLMMetal.NAME`` shows and changes it.",
        **{name: LiveSetting(help=f"live setting; None: the model's own {name}").tag(config=True) for name in SETTABLE},
    },
)
