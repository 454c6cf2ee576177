"""The same clients before this port and before mlx_lm.server, in turn: the part of the load that both can serve.

Chat and text completions, greedy, streamed and whole, short, long and with a shared beginning; nobody leaves. Both have
the same weights and, on a CPU, the same BLAS; both may decode as many requests at once.
"""

import asyncio
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.format.text import aligned
from tests.benchmarks.gpu.servers import running
from tests.benchmarks.machine import describe
from tests.load.clients import Book, Client
from tests.load.expected import Expected, ask_alone
from tests.load.notebook import NUM_SEQS
from tests.load.questions import CHAT, COMPLETIONS, MAX_MODEL_LEN, Question, plain_questions, visits
from tests.load.replies import Said
from tests.load.report import Kind, by_kind
from tests.load.run import write_model

OURS, THEIRS = "this port", "mlx_lm.server"
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    OURS: {"max_num_seqs": NUM_SEQS, "max_model_len": MAX_MODEL_LEN, "gpu_memory_utilization": 0.2},
    THEIRS: {"decode-concurrency": NUM_SEQS, "prompt-concurrency": NUM_SEQS},
}


@dataclass
class Side:
    """One server's turns."""

    books: list[Book] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def all(self) -> Kind:
        """All requests of all turns."""
        return by_kind([answer for book in self.books for answer in book.answers])[-1]

    @property
    def asked(self) -> int:
        """Requests of all turns."""
        return self.all.count + self.failed

    @property
    def wrong(self) -> int:
        """Replies that differ from those that mlx-lm gives alone."""
        return sum(book.num_other for book in self.books)

    @property
    def failed(self) -> int:
        """Requests without a reply."""
        return sum(book.num_faults - book.num_other for book in self.books)

    @property
    def tokens_per_second(self) -> float:
        """Of whole replies, from the first request to the last byte."""
        return sum(answer.num_tokens for book in self.books for answer in book.answers) / max(1e-9, self.seconds)


@dataclass(frozen=True)
class Comparison:
    """Both servers under the same load."""

    clients: int
    turns: int
    sides: Mapping[str, Side]

    def rows(self) -> list[tuple[str, float, float]]:
        """Each figure with both servers' values; milliseconds but for rates."""
        ours, theirs = (self.sides[name] for name in (OURS, THEIRS))
        found = [("tokens a second", ours.tokens_per_second, theirs.tokens_per_second)]
        for name, what in (("first token", "wait"), ("between tokens", "gap"), ("to the end", "whole")):
            for at in ("p50", "p95", "p99"):
                pair = [1000 * getattr(getattr(side.all, what), at, float("nan")) for side in (ours, theirs)]
                found.append((f"{name}, {at}", pair[0], pair[1]))
        found.append(("requests", ours.asked, theirs.asked))
        found.append(("of them failed", ours.failed, theirs.failed))
        found.append(("of them not as alone", ours.wrong, theirs.wrong))
        return found

    def table(self) -> str:
        """For people; the ratio is this port's figure over the other's."""
        lines = [("milliseconds, or as named", OURS, THEIRS, "ratio")]
        for name, one, other in self.rows():
            lines.append((name, f"{one:,.1f}", f"{other:,.1f}", f"{one / other:.2f}" if other else ""))
        faults = [f"{name}: {fault}" for name, side in self.sides.items() for b in side.books for fault in b.faults[:2]]
        return "\n".join([f"{self.clients} clients, {self.turns} turns each", *aligned(lines, 1), *faults])

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "clients": self.clients, "turns": self.turns, "machine": describe(),
            "rows": [{"name": name, OURS: one, THEIRS: other} for name, one, other in self.rows()],
            "all": {name: asdict(side.all) for name, side in self.sides.items()},
        }  # fmt: skip


def compare(clients: int, most: int, turns: int) -> Comparison:
    """``most`` questions of each of ``clients`` in each turn. The first turn of both, of one client, is not counted."""
    sides = {OURS: Side(), THEIRS: Side()}
    questions = [question for question in plain_questions() if _both_serve(question)]
    with tempfile.TemporaryDirectory(prefix="vm-magic-load-") as folder, ExitStack() as stack:
        model = write_model(Path(folder))
        urls = {
            name: stack.enter_context(running(who, model, OPTIONS[name])).address
            for name, who in ((OURS, "ours"), (THEIRS, "theirs"))
        }
        expected = ask_alone(urls[OURS], {}, questions, model)
        asked = expected.askable(questions)
        for url in urls.values():
            asyncio.run(_turn(url, 1, 8, 0, asked, expected))
        for turn in range(1, turns + 1):
            for name, url in urls.items():
                begin = time.monotonic()
                sides[name].books.append(asyncio.run(_turn(url, clients, most, turn, asked, expected)))
                sides[name].seconds += time.monotonic() - begin
    return Comparison(clients, turns, sides)


async def _turn(
    url: str, clients: int, most: int, seed: int, questions: Sequence[Question], expected: Expected
) -> Book:
    book = Book()
    await asyncio.gather(*[
        Client(
            number, url, None, visits(seed, number, questions, leaving=False), expected.said, book, agree=_same_words
        ).run(None, most)
        for number in range(clients)
    ])  # fmt: skip
    return book


def _both_serve(question: Question) -> bool:
    return question.path in (CHAT, COMPLETIONS) and not isinstance(question.body.get("prompt"), list)


def _same_words(one: Said, other: Said) -> bool:
    """mlx_lm.server leaves out the space before a reply's first word."""
    return [text.lstrip() for text in one.texts] == [text.lstrip() for text in other.texts]
