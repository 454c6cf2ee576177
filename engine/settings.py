"""Live settings: sampling defaults that a notebook changes while the engine runs."""

import threading
from collections.abc import Mapping
from typing import Any

from engine.sampling_params import SamplingParams


class Settings:
    """Sampling values set by the user for all requests that do not say otherwise.

    Thread-safe; values are checked when set, by building a :class:`SamplingParams`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, Any] = {}

    def update(self, **values: Any) -> None:
        """Set ``values`` (sampling names); ``None`` removes one. Raises RequestError, changing nothing."""
        with self._lock:
            merged = {**self._values, **values}
            merged = {name: value for name, value in merged.items() if value is not None}
            SamplingParams().replace(**merged)
            self._values = merged

    def snapshot(self) -> Mapping[str, Any]:
        """A copy of what is set."""
        with self._lock:
            return dict(self._values)

    def reset(self) -> None:
        """Forget everything that was set."""
        with self._lock:
            self._values = {}
