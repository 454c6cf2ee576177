"""``python -m tests.load.growth``: thousands of short requests, one after another and in parallel, with the panel open.

After each part the resident memory of the kernel and what glibc's arenas have in use of it; at the end what is left
of it once they gave their free pages back (``malloc_trim``): the difference is what arenas keep and nothing holds.
"""

import argparse
import asyncio
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.format.text import aligned
from tests.benchmarks.machine import describe
from tests.load.clients import Book, Client
from tests.load.expected import ask_alone
from tests.load.notebook import Held, Notebook
from tests.load.questions import CHAT, GREEDY, Question, visits
from tests.load.run import notebook, write_model

logger = logging.getLogger("tests.load")
PARALLEL = 25
"""Clients of the half of a part that is asked at once."""


@dataclass(frozen=True)
class Part:
    """So many requests, and what the kernel holds after them."""

    requests: int
    held: Held


@dataclass(frozen=True)
class LongLived:
    """A run. The first part is the warm-up."""

    parts: Sequence[Part]
    trimmed: int
    """Resident bytes at the end, after ``malloc_trim``."""
    book: Book

    def growth(self) -> float:
        """Bytes of resident memory for each request since the warm-up."""
        first, last = self.parts[0], self.parts[-1]
        return (last.held.rss - first.held.rss) / max(1, last.requests - first.requests)

    def table(self) -> str:
        """For people."""
        rows: list[tuple[str, ...]] = [
            ("requests", "rss MB", "in use MB", "threads", "files", "our objects", "Python blocks")
        ]
        for part in self.parts:
            sizes = ("" if size is None else f"{size / 1e6:.1f}" for size in (part.held.rss, part.held.in_use))
            rows.append((
                f"{part.requests:,}", *sizes, str(part.held.threads), str(part.held.files),
                f"{part.held.num_objects:,}", f"{part.held.python_blocks:,}",
            ))  # fmt: skip
        return "\n".join([
            *aligned(rows, 0), f"{self.growth():+.0f} bytes a request since the first part; "
            f"{self.trimmed / 1e6:.1f} MB once the arenas gave free pages back",
            f"{self.book.num_faults} faults", *self.book.faults,
        ])  # fmt: skip

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "parts": [asdict(part) for part in self.parts], "faults": self.book.num_faults,
            "bytes_per_request": self.growth(), "trimmed": self.trimmed, "machine": describe(),
        }  # fmt: skip


def short_questions() -> list[Question]:
    """Chats of a few tokens."""
    texts = ("Hi", "One, two,", "The river")
    return [
        Question(
            text, "chat", CHAT, {"messages": [{"role": "user", "content": text}], "max_tokens": 2, **GREEDY}, said=text
        )
        for text in texts
    ]


async def long_lived(model: Path, requests: int, parts: int) -> LongLived:
    """Ask ``requests`` in ``parts``: half of each one after another, half in parallel."""
    async with notebook(model) as kernel:
        headers = {"Authorization": f"Bearer {kernel.key}"}
        known = await asyncio.to_thread(ask_alone, kernel.base_url, headers, short_questions(), model)
        book, found = Book(), list[Part]()
        questions = known.askable(short_questions())

        async def ask(client: int, most: int) -> None:
            mix = visits(0, client, questions, leaving=False)
            await Client(client, kernel.base_url, kernel.key, mix, known.said, book).run(None, most)

        for number in range(1, parts + 1):
            half = requests // parts // 2
            await ask(0, half)
            await asyncio.gather(*[ask(1 + client, half // PARALLEL) for client in range(PARALLEL)])
            found.append(await _part(kernel, number * requests // parts, found[0].held if found else None))
            logger.info("%s requests, %.1f MB", found[-1].requests, found[-1].held.rss / 1e6)
        await kernel.run("inside.trim()")
        return LongLived(found, kernel.rss(), book)


async def _part(kernel: Notebook, requests: int, first: Held | None) -> Part:
    return Part(requests, await kernel.held(first))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.load.growth", description=__doc__)
    parser.add_argument("--requests", type=int, default=5000, metavar="N", help="in all (5000)")
    parser.add_argument("--parts", type=int, default=10, metavar="N", help="after each, what is held (10)")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), metavar="DIR", help="folder of the JSON")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logger.setLevel(logging.INFO)
    with tempfile.TemporaryDirectory(prefix="vm-magic-load-") as folder:
        run = asyncio.run(long_lived(write_model(Path(folder)), args.requests, args.parts))
    print(run.table())
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "load-growth.json").write_text(json.dumps(run.as_json(), indent=1), encoding="utf-8")
    return 1 if run.book.num_faults else 0


if __name__ == "__main__":
    sys.exit(main())
