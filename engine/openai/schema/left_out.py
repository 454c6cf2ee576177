"""What of a request was left out, told in ``explain``: a program's new field must not end its conversation."""

from collections.abc import Iterator

HOSTED = "this server runs no tools itself"


class LeftOut:
    """What was left out, each kind once with its reason and how often it came."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], int] = {}

    def add(self, what: str, why: str) -> None:
        """``what`` was left out because of ``why``."""
        self._counts[what, why] = self._counts.get((what, why), 0) + 1

    def lines(self) -> tuple[str, ...]:
        """One line for each kind, in the order in which they came."""
        return tuple(self._lines())

    def _lines(self) -> Iterator[str]:
        for (what, why), count in self._counts.items():
            yield f"left out: {what}{f' ({count} times)' if count > 1 else ''}: {why}"
