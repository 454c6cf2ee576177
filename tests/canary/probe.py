"""What a seam is, and how it is tried."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any


class ChangedError(Exception):
    """A seam is not what it was. The message says how."""


@dataclass(frozen=True)
class Seam:
    """One thing of ``package`` that ``ours`` (a file of this project) depends on; ``probe`` raises where it changed."""

    package: str
    name: str
    ours: str
    probe: Callable[[], None]

    def changed(self) -> str | None:
        """How the seam changed, or None."""
        try:
            self.probe()
        except Exception as error:  # noqa: BLE001 - whatever a probe meets is what changed
            said = " ".join(str(error).split())[:200]
            return said if isinstance(error, ChangedError) else f"{type(error).__name__}: {said}"
        return None

    def line(self, changed: str | None) -> str:
        """What is told of it."""
        state = "ok" if changed is None else f"CHANGED ({changed})"
        return f"{self.package}: {self.name}: {state}; {self.ours} relies on it"


def expect(holds: object, how: str) -> None:
    """Raise ChangedError that says ``how`` unless something ``holds``."""
    if not holds:
        raise ChangedError(how)


def named(module: str, *names: str) -> Callable[[], None]:
    """A probe: ``module`` has ``names``, of which some may be attributes of a class (``A.b``)."""

    def probe() -> None:
        for name in names:
            found: Any = import_module(module)
            for part in name.split("."):
                expect(hasattr(found, part), f"{module} has no {name}")
                found = getattr(found, part)

    return probe


def takes(module: str, name: str, *parameters: str, keywords: tuple[str, ...] = ()) -> Callable[[], None]:
    """A probe: a function takes ``parameters`` in that order, first, and ``keywords`` by name."""

    def probe() -> None:
        found: Any = import_module(module)
        for part in name.split("."):
            expect(hasattr(found, part), f"{module} has no {name}")
            found = getattr(found, part)
        known = inspect.signature(found).parameters
        first = [one for one in known if one != "self"][: len(parameters)]
        expect(first == list(parameters), f"{name} takes {first} first")
        open_end = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values())
        missing = [one for one in keywords if one not in known and not open_end]
        expect(not missing, f"{name} takes no {', '.join(missing)}")

    return probe
