"""How many connections stay open, and how long one may keep the port waiting: the files are the kernel's."""

import asyncio
import resource
from typing import Protocol

TICK = 1.0
"""Seconds between looks at the connections, while there are any."""
IDLE_SECONDS = 75
"""How long an idle connection stays open: longer than clients keep theirs, or they write into one just closed."""
LINGER_SECONDS = 5.0
"""How long a client that still sends has for reading the answer after which its connection closes."""
_SHARE = 4
"""The port takes one of so many of the files that the process may open."""
_FEWEST, _MOST = 16, 2048
_MOST_LINGERING = 32


def default_max_connections() -> int:
    """As many as leave the kernel most of the files that it may open."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST if files == resource.RLIM_INFINITY else min(_MOST, max(_FEWEST, files // _SHARE))


class Watched(Protocol):
    """A connection as :class:`OpenConnections` looks at it."""

    @property
    def rank(self) -> tuple[bool, float] | None:
        """Which goes first where there are too many: without a key before with one, idle longest; None: it works."""

    @property
    def lingers(self) -> bool:
        """Whether it was answered for the last time."""

    def refuse(self) -> None:
        """Say that there are too many, and close."""

    def drop(self) -> None:
        """Close now, whatever is under way."""

    def check(self, now: float) -> None:
        """End what takes too long."""


class OpenConnections:
    """The connections of one port, at most ``limit`` but for those that are just closing. Lives in its event loop."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._open: dict[Watched, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: Watched) -> None:
        """Watch ``connection``. One too many takes the place of one that nobody works on, else it is refused."""
        others = [one for one in self._open if not one.lingers]
        self._open[connection] = None
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TICK, self._look)
        if len(others) < self.limit:
            return
        ranked = [(rank, place) for place, one in enumerate(others) if (rank := one.rank) is not None]
        if ranked:
            others[min(ranked)[1]].drop()
        elif len(self._open) - len(others) <= _MOST_LINGERING:
            connection.refuse()
        else:
            connection.drop()

    def discard(self, connection: Watched) -> None:
        """Watch ``connection`` no more."""
        self._open.pop(connection, None)

    def _look(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in list(self._open):
            connection.check(now)
        self._timer = loop.call_later(TICK, self._look) if self._open else None
