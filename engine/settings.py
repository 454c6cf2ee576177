"""Live settings: sampling defaults that a notebook changes while the engine runs."""

import threading
from collections.abc import Mapping
from typing import Any

from engine.presets import MODEL_PRESET, PRESET_FIELDS, preset_values
from engine.sampling_params import SamplingParams


class Settings:
    """Sampling values set by the user for all requests that do not say otherwise.

    A preset lies below what is set by name. Thread-safe; values are checked when set, by building a
    :class:`SamplingParams`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, Any] = {}
        self._preset: str | None = None

    @property
    def preset(self) -> str | None:
        """The preset in force, or None: the model's own values hold."""
        return self._preset

    def update(self, *, preset: str | None = None, **values: Any) -> None:
        """Set ``values`` (sampling names); ``None`` removes one. Raises RequestError, changing nothing.

        ``preset`` names a set of :data:`engine.presets.PRESETS`, or ``model`` for none: whatever was
        set before of the names that presets decide is forgotten, so that the preset is in force.
        Raises ConfigError for an unknown one.
        """
        with self._lock:
            chosen = self._preset if preset is None else preset
            chosen = None if chosen == MODEL_PRESET else chosen
            kept = self._values if preset is None else _without(self._values, PRESET_FIELDS)
            merged = {name: value for name, value in {**kept, **values}.items() if value is not None}
            SamplingParams().replace(**{**preset_values(chosen or MODEL_PRESET), **merged})
            self._values, self._preset = merged, chosen

    def snapshot(self) -> Mapping[str, Any]:
        """A copy of the sampling values in force here, the preset's included."""
        with self._lock:
            return {**preset_values(self._preset or MODEL_PRESET), **self._values}

    def layers(self) -> list[tuple[str, Mapping[str, Any]]]:
        """(source, values), the lower layer first: the preset, then what was set by name."""
        with self._lock:
            layers: list[tuple[str, Mapping[str, Any]]] = [("set", dict(self._values))]
            return [(f"preset {self._preset}", preset_values(self._preset)), *layers] if self._preset else layers

    def adopt(self, other: "Settings") -> None:
        """Take over what is set in ``other``, forgetting what was set here (another model's settings)."""
        with other._lock:
            values, preset = dict(other._values), other._preset
        with self._lock:
            self._values, self._preset = values, preset

    def reset(self) -> None:
        """Forget everything that was set."""
        with self._lock:
            self._values, self._preset = {}, None


def _without(values: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
