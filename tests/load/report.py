"""What a run showed, as a table and as JSON."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from engine.format.text import aligned
from tests.load.clients import Answer, Book
from tests.load.notebook import Held

BOUNDED = {"Block", "Rate", "StepTotals", "StepMark"}
"""Classes whose objects fill a pool, or rings of some minutes or steps, and then are as many as before."""


@dataclass(frozen=True)
class Spread:
    """Percentiles of seconds."""

    p50: float
    p95: float
    p99: float
    most: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Spread | None":
        """None of nothing."""
        if not seconds:
            return None
        p50, p95, p99, most = np.percentile(np.asarray(seconds), (50, 95, 99, 100)).tolist()
        return cls(p50, p95, p99, most)

    def __str__(self) -> str:
        return " ".join(f"{1000 * value:.0f}" for value in (self.p50, self.p95, self.p99, self.most))


@dataclass(frozen=True)
class Kind:
    """One kind of requests. ``wait``: to the first token of streams; ``gap``: between tokens; ``whole``: to the end."""

    name: str
    count: int
    share: float
    wait: Spread | None
    gap: Spread | None
    whole: Spread | None


def by_kind(answers: Sequence[Answer]) -> list[Kind]:
    """All kinds, and all together as ``all``."""
    groups: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[answer.kind].append(answer)
    found = [_kind(name, group, len(answers)) for name, group in sorted(groups.items())]
    generating = [answer for answer in answers if answer.kind not in ("bad", "service")]
    return [*found, _kind("all", generating, len(answers))]


def _kind(name: str, answers: Sequence[Answer], total: int) -> Kind:
    return Kind(
        name, len(answers), len(answers) / max(1, total),
        Spread.of([a.first for a in answers if a.first is not None]),
        Spread.of([gap for a in answers for gap in a.gaps]),
        Spread.of([a.seconds for a in answers if not a.left]),
    )  # fmt: skip


@dataclass(frozen=True)
class Growth:
    """What was held after each round; the first one is the warm-up."""

    rounds: Sequence[Held]

    @property
    def rss_share(self) -> float:
        """Growth of the resident memory from the end of the warm-up to the end, as a share."""
        return self.rounds[-1].rss / self.rounds[0].rss - 1

    @property
    def in_use_share(self) -> float:
        """The same of what is in use of it; 0 where that is not known."""
        first, last = self.rounds[0].in_use, self.rounds[-1].in_use
        return 0.0 if first is None or last is None else last / first - 1

    @property
    def objects(self) -> dict[str, int]:
        """Classes of ours of which there are more at the end than after the warm-up."""
        first, last = self.rounds[0].objects, self.rounds[-1].objects
        grown = {name: count - first.get(name, 0) for name, count in last.items()}
        return dict(sorted(((n, c) for n, c in grown.items() if c > 0), key=lambda pair: -pair[1]))

    @property
    def objects_share(self) -> float:
        """Growth of their number, without those that rings and pools of a fixed size hold."""
        first, last = (
            sum(count for name, count in one.objects.items() if name.rpartition(".")[2] not in BOUNDED)
            for one in (self.rounds[0], self.rounds[-1])
        )
        return last / first - 1


@dataclass(frozen=True)
class Report:
    """A whole run."""

    clients: int
    seconds: float
    book: Book
    growth: Growth
    num_proved: int
    num_dropped: int
    cells: int
    machine: Mapping[str, Any]

    @property
    def per_client(self) -> tuple[int, int]:
        """The fewest and the most replies of a client."""
        counts: dict[int, int] = dict.fromkeys(range(self.clients), 0)
        for answer in self.book.answers:
            counts[answer.client] += 1
        return min(counts.values()), max(counts.values())

    def table(self) -> str:
        """For people."""
        lines: list[tuple[str, ...]] = [("kind", "requests", "share", "first token", "between tokens", "to the end")]
        for kind in by_kind(self.book.answers):
            spreads = [str(spread) if spread else "" for spread in (kind.wait, kind.gap, kind.whole)]
            lines.append((kind.name, f"{kind.count:,}", f"{kind.share:.1%}", *spreads))
        held: list[tuple[str, ...]] = [
            ("after round", "rss MB", "in use MB", "threads", "files", "our objects", "Python blocks", "preemptions")
        ]
        for number, one in enumerate(self.growth.rounds):
            sizes = (f"{size / 1e6:.1f}" for size in (one.rss, one.in_use or 0))
            counts = (one.threads, one.files, one.num_objects, one.python_blocks, one.preemptions)
            held.append((str(number), *sizes, *(f"{count:,}" for count in counts)))
        book, (fewest, most) = self.book, self.per_client
        return "\n".join([
            "milliseconds: p50 p95 p99 max", *aligned(lines, 1), "", *aligned(held, 1), "",
            f"{len(book.answers):,} requests of {self.clients} clients in {self.seconds:.0f} s, {self.cells} cells "
            f"meanwhile; {fewest} to {most} a client; {sum(a.left for a in book.answers)} left early, "
            f"{book.num_repeated} repeated on the server's word",
            f"{book.num_judged:,} replies compared with {self.num_proved} that mlx-lm gives too and others said alone "
            f"({self.num_dropped} left out: near ties)",
            f"since the warm-up: resident memory {self.growth.rss_share:+.2%}, in use "
            f"{self.growth.in_use_share:+.2%}; more of {self.growth.objects}",
            f"{book.num_faults} faults", *book.faults,
        ])  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "clients": self.clients, "seconds": self.seconds, "cells": self.cells, "requests": len(self.book.answers),
            "judged": self.book.num_judged, "proved": self.num_proved, "dropped": self.num_dropped,
            "left": sum(answer.left for answer in self.book.answers), "repeated": self.book.num_repeated,
            "faults": self.book.num_faults, "examples": self.book.faults, "per_client": self.per_client,
            "kinds": [asdict(kind) for kind in by_kind(self.book.answers)],
            "held": [asdict(one) for one in self.growth.rounds], "machine": self.machine,
        }  # fmt: skip
