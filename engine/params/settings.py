"""Live settings: sampling defaults that a notebook changes while the engine runs."""

import logging
import threading
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

from engine.errors import ConfigError, RequestError, error_line
from engine.format.names import did_you_mean
from engine.params.sampling_params import CONSTRAINTS, SamplingParams
from engine.params.structured_outputs import ThinkingBudget

logger = logging.getLogger("engine")
THINKING_NAMES = ("enable_thinking", "thinking_token_budget")
"""Settings beside the sampling values."""
THINKING_SWITCHES = ("enable_thinking", "thinking")
"""What chat templates call the switch."""
MODEL_PRESET = "model"
"""The name that stands for the model's own ``generation_config.json``."""


def _preset(temperature: float, top_p: float, presence_penalty: float) -> Mapping[str, float]:
    return MappingProxyType(
        {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": 20,
            "min_p": 0.0,
            "presence_penalty": presence_penalty,
            "repetition_penalty": 1.0,
        }
    )


PRESETS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "qwen-thinking": _preset(1.0, 0.95, 1.5),
        "qwen-coding": _preset(0.6, 0.95, 0.0),
        "qwen-instruct": _preset(0.7, 0.80, 1.5),
    }
)
"""Qwen's sets for thinking in general, thinking for precise code, and replies without thinking."""


PRESET_FIELDS = frozenset(name for values in PRESETS.values() for name in values)
"""Sampling names that a preset decides."""


class Settings:
    """Values set by the user for all requests that do not say otherwise, including those that already run.

    Sampling values, a preset below what is set by name, and two about thinking: ``enable_thinking``
    (the chat template's switch) and ``thinking_token_budget``. Thread-safe; values are checked when set.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._values: dict[str, Any] = {}
        self._thinking: dict[str, Any] = {}
        self._preset: str | None = None
        self._listeners: list[Callable[[], object]] = []

    def __repr__(self) -> str:
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in self.everything().items())})"

    @property
    def preset(self) -> str | None:
        """The chosen preset, or None: the model's own values apply."""
        return self._preset

    def update(self, *, preset: str | None = None, **values: Any) -> None:
        """Set ``values`` (sampling names); ``None`` removes one. Raises RequestError, changing nothing.

        ``preset`` names a set of :data:`PRESETS`, or ``model`` for none: whatever was set before of the names
        that presets decide is forgotten, so that the preset's values apply. Raises ConfigError for an unknown one.
        """
        with self._lock:
            thinking = {**self._thinking, **{name: values.pop(name) for name in THINKING_NAMES if name in values}}
            chosen = self._preset if preset is None else preset
            chosen = None if chosen == MODEL_PRESET else chosen
            kept = self._values if preset is None else _without(self._values, PRESET_FIELDS)
            for name in set(CONSTRAINTS).intersection(values):
                raise RequestError(f"{name} belongs to a single request; it is not a setting.", param=name)
            merged = {name: value for name, value in {**kept, **values}.items() if value is not None}
            SamplingParams().replace(**{**preset_values(chosen or MODEL_PRESET), **merged})
            thinking = _checked_thinking(thinking)
            self._values, self._preset, self._thinking = merged, chosen, thinking
            self._tell()

    def snapshot(self) -> Mapping[str, Any]:
        """A copy of the sampling values that are set, the preset's included."""
        with self._lock:
            return {**preset_values(self._preset or MODEL_PRESET), **self._values}

    def thinking(self) -> Mapping[str, Any]:
        """A copy of what is set of :data:`THINKING_NAMES`."""
        with self._lock:
            return dict(self._thinking)

    def template_kwargs(self, variables: Collection[str]) -> dict[str, Any]:
        """What the thinking switch means to a chat template that reads ``variables``."""
        switch = self.thinking().get("enable_thinking")
        return {} if switch is None else {name: switch for name in THINKING_SWITCHES if name in variables}

    def everything(self) -> Mapping[str, Any]:
        """All that is set, as ``set`` would take it: preset, sampling values, thinking."""
        with self._lock:
            preset = {"preset": self._preset} if self._preset else {}
            return {**preset, **self.snapshot(), **self._thinking}

    def layers(self) -> list[tuple[str, Mapping[str, Any]]]:
        """(source, values), the lower layer first: the preset, then what was set by name."""
        with self._lock:
            layers: list[tuple[str, Mapping[str, Any]]] = [("set", dict(self._values))]
            return [(f"preset {self._preset}", preset_values(self._preset)), *layers] if self._preset else layers

    def adopt(self, other: "Settings") -> None:
        """Take over what is set in ``other``, forgetting what was set here (another model's settings)."""
        with other._lock:
            values, preset, thinking = dict(other._values), other._preset, dict(other._thinking)
        with self._lock:
            self._values, self._preset, self._thinking = values, preset, thinking
            self._tell()

    def reset(self) -> None:
        """Forget everything that was set."""
        with self._lock:
            self._values, self._preset, self._thinking = {}, None, {}
            self._tell()

    def on_change(self, tell: Callable[[], object]) -> None:
        """``tell()`` after every change, too, in their order; it must be quick. What it raises is logged."""
        with self._lock:
            self._listeners.append(tell)

    def _tell(self) -> None:
        for tell in list(self._listeners):
            try:
                tell()
            except Exception as error:
                logger.error("a listener to the settings failed: %s", error_line(error), exc_info=error)


def _checked_thinking(values: Mapping[str, Any]) -> dict[str, Any]:
    switch, budget = (values.get(name) for name in THINKING_NAMES)
    if switch is not None and not isinstance(switch, bool):
        raise RequestError(f"enable_thinking must be true or false, got {switch!r}.", param="enable_thinking")
    asked = ThinkingBudget.from_request(budget)
    given = {"enable_thinking": switch, "thinking_token_budget": None if asked is None else asked.limit}
    return {name: value for name, value in given.items() if value is not None}


def _without(values: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def preset_values(name: str) -> Mapping[str, float]:
    """The sampling values of preset ``name``; none for ``model``. Raises ConfigError naming those there are."""
    if name == MODEL_PRESET:
        return {}
    if name not in PRESETS:
        known = ", ".join([*PRESETS, MODEL_PRESET])
        hint = did_you_mean(name, [*PRESETS, MODEL_PRESET], f"there are: {known}")
        raise ConfigError(f"preset {name!r} is unknown; {hint}", flag="preset", value=name, allowed=known)
    return PRESETS[name]
