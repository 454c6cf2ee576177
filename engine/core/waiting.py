"""Requests that wait for their turn: the most urgent first, at a cost that does not grow with how many wait."""

import heapq
import itertools
from collections.abc import Iterator

from engine.core.request import Request

_SPARE = 64
"""Entries of requests that ended while they waited are cleared once there are more than this, and more than others."""


def urgency(request: Request) -> tuple[int, float, int]:
    """What requests are served by, lowest first."""
    return request.priority, request.arrival_time, request.index


class _Line:
    """Requests that could start now, in order of priority and arrival."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, float, int], int, Request]] = []
        self._ready: dict[Request, int] = {}
        """The number of its entry: others in the heap are of before, when it last waited."""
        self._numbers = itertools.count()
        """Of two that are as urgent, who came first goes first."""

    def __len__(self) -> int:
        return len(self._ready)

    def __iter__(self) -> Iterator[Request]:
        return (request for _, number, request in sorted(self._heap) if self._ready.get(request) == number)

    @property
    def num_entries(self) -> int:
        """Those of requests that wait no more included."""
        return len(self._heap)

    def first(self) -> Request | None:
        """The most urgent one."""
        while self._heap:
            _, number, request = self._heap[0]
            if self._ready.get(request) == number:
                return request
            heapq.heappop(self._heap)
        return None

    def add(self, request: Request) -> None:
        """One more."""
        number = self._ready[request] = next(self._numbers)
        heapq.heappush(self._heap, (urgency(request), number, request))

    def remove(self, request: Request) -> None:
        """One less, if it is one of these."""
        if request in self._ready:
            del self._ready[request]
            if len(self._heap) - len(self._ready) > max(_SPARE, len(self._ready)):
                self._heap = [entry for entry in self._heap if self._ready.get(entry[2]) == entry[1]]
                heapq.heapify(self._heap)


class WaitingQueue:
    """Those that are *ready* in order of priority and arrival; siblings stand *aside* until their prompt is computed.

    Where ``n`` completions share a prompt, nobody looks at all but the first until its blocks are there to be shared.
    Those of the port's clients (``served``) and the notebook's own stand in lines of their own, which start by turns.
    """

    def __init__(self) -> None:
        self.own, self.served = _Line(), _Line()
        self.served_next = False
        """Whose turn it is, where both kinds wait."""
        self._aside: dict[Request, dict[Request, None]] = {}
        self._parents: dict[Request, Request] = {}

    def __len__(self) -> int:
        return self.num_ready + len(self._parents)

    def __iter__(self) -> Iterator[Request]:
        """All of them, the most urgent first: for those who look, not for a step."""
        return iter(sorted([*self.own, *self.served, *self._parents], key=urgency))

    def in_turn(self) -> list[Request]:
        """All of them in the order in which they are to start: for those who look, not for a step."""
        lines: tuple[list[Request], list[Request]] = ([], [])
        for request in self:
            lines[request.served].append(request)
        pairs = itertools.zip_longest(*(lines[::-1] if self.served_next else lines))
        return [request for pair in pairs for request in pair if request is not None]

    @property
    def num_ready(self) -> int:
        """How many could start now."""
        return len(self.own) + len(self.served)

    @property
    def num_aside(self) -> int:
        """How many wait for a sibling."""
        return len(self._parents)

    def first(self) -> Request | None:
        """The most urgent of those that are ready and have their turn."""
        mine, others = (self.served, self.own) if self.served_next else (self.own, self.served)
        return mine.first() or others.first()

    def add(self, request: Request) -> None:
        """Queue a request that may start as soon as there is room."""
        self._line(request).add(request)

    def add_aside(self, request: Request, parent: Request) -> None:
        """Have a request wait until :meth:`release` of ``parent``, which computes the prompt of both."""
        self.remove(request)
        self._parents[request] = parent
        self._aside.setdefault(parent, {})[request] = None

    def release(self, parent: Request) -> None:
        """The siblings that wait for ``parent`` are ready from now on."""
        for request in self._aside.pop(parent, ()):
            del self._parents[request]
            self.add(request)

    def remove(self, request: Request) -> None:
        """Forget a request, if it waits at all."""
        parent = self._parents.pop(request, None)
        if parent is None:
            self._line(request).remove(request)
            return
        del self._aside[parent][request]
        if not self._aside[parent]:
            del self._aside[parent]

    def _line(self, request: Request) -> _Line:
        return self.served if request.served else self.own
