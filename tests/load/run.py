"""A run: rounds of clients and cells, and after each a look at what the kernel holds."""

import asyncio
import itertools
import logging
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.models.resolve import resolve
from tests import tiny_models
from tests.benchmarks.machine import describe
from tests.load.clients import Book, Client
from tests.load.expected import Expected, ask_alone
from tests.load.notebook import CellFailedError, Held, Notebook, cells
from tests.load.questions import CHAT, TEMPLATE, Question, other_questions, plain_questions, visits
from tests.load.report import Growth, Report

logger = logging.getLogger("tests.load")
PAUSE = 0.3
"""Seconds between two cells: the person reads."""


@dataclass(frozen=True)
class Wanted:
    """How much. ``most`` questions of each client and round, or rounds that share ``seconds``.

    The first round is the warm-up; ``warm_clients`` of it, if not all.
    """

    clients: int = 200
    rounds: int = 2
    seconds: float | None = None
    most: int | None = None
    warm_clients: int | None = None
    seed: int = 0
    traced: bool = False

    def round_ends(self) -> float | None:
        """When a round that begins now takes no more questions."""
        return None if self.seconds is None else time.monotonic() + self.seconds / self.rounds


def write_model(folder: Path) -> Path:
    """A tiny random model whose template shows tools."""
    tiny_models.write_model(folder, "llama", resolve("smollm2").path)
    settings = folder / "tokenizer_config.json"
    text = tiny_models.tokenizer_settings(resolve("smollm2").path, chat_template=TEMPLATE)
    settings.write_text(text, encoding="utf-8")
    return folder


@asynccontextmanager
async def notebook(model: Path, **options: Any) -> AsyncIterator[Notebook]:
    """A kernel that runs meanwhile."""
    running = await Notebook.start(model, **options)
    try:
        yield running
    finally:
        await running.close()


def run(wanted: Wanted) -> Report:
    """The whole run, in this thread."""
    with tempfile.TemporaryDirectory(prefix="vm-magic-load-") as folder:
        return asyncio.run(_run(wanted, write_model(Path(folder))))


async def _run(wanted: Wanted, model: Path) -> Report:
    async with notebook(model) as kernel:
        logger.info("the kernel listens on %s", kernel.base_url)
        questions = [*plain_questions(), *other_questions()]
        headers = {"Authorization": f"Bearer {kernel.key}"}
        expected = await asyncio.to_thread(ask_alone, kernel.base_url, headers, questions, model)
        logger.info("%s replies are known, %s proved by mlx-lm", len(expected.said), expected.num_proved)
        load = _Load(wanted, kernel, expected, expected.askable(questions))
        if wanted.traced:
            await kernel.run("import tracemalloc; tracemalloc.start(1)")
        begin = time.monotonic()
        first = await kernel.held()
        logger.info("at first %.1f MB", first.rss / 1e6)
        counts = [wanted.warm_clients or wanted.clients, *[wanted.clients] * (wanted.rounds - 1)]
        rounds = [await load.round(first, count) for count in counts]
        return Report(
            wanted.clients, time.monotonic() - begin, load.book, Growth(rounds), expected.num_proved,
            len(expected.dropped), load.num_cells, describe(),
        )  # fmt: skip


class _Load:
    def __init__(self, wanted: Wanted, kernel: Notebook, expected: Expected, questions: Sequence[Question]) -> None:
        self._wanted, self._kernel = wanted, kernel
        self.book, self.num_cells = Book(), 0
        self._visits = [visits(wanted.seed, number, questions) for number in range(wanted.clients)]
        self._expected = expected
        chat = next(question for question in questions if question.path == CHAT and question.kind == "chat")
        said = expected.said[chat.said or ""].texts[0]
        self._cells = itertools.cycle(cells(chat.body["messages"], chat.body["max_tokens"], said))

    async def round(self, first: Held, num_clients: int) -> Held:
        """So many clients and the notebook; then what is held, with as few threads and files as at ``first``."""
        until, most = self._wanted.round_ends(), self._wanted.most
        asked = [
            asyncio.create_task(
                Client(
                    number, self._kernel.base_url, self._kernel.key, mix, self._expected.said, self.book
                ).run(until, most)
            )
            for number, mix in enumerate(self._visits[:num_clients])
        ]  # fmt: skip
        over = asyncio.gather(*asked)
        written = asyncio.create_task(self._write_cells(over))
        try:
            await over
            await written
        finally:
            for task in (*asked, written):
                task.cancel()
            with suppress(asyncio.CancelledError):
                await asyncio.gather(*asked, written, return_exceptions=True)
        held = await self._kernel.held(first)
        logger.info("%s requests, %s faults, %.1f MB", len(self.book.answers), self.book.num_faults, held.rss / 1e6)
        return held

    async def _write_cells(self, over: "asyncio.Future[Any]") -> None:
        """Cells one after another while clients ask; the last of a round restores what cells changed."""
        while not over.done():
            cell = next(self._cells)
            try:
                await self._kernel.run(cell)
            except CellFailedError as error:
                self.book.num_faults += 1
                self.book.faults.append(f"a cell: {error}")
            self.num_cells += 1
            await asyncio.wait([over], timeout=PAUSE)
        await self._kernel.run("llm.settings.reset()")
