"""Clients: each asks one thing after another over connections of its own, and judges what it gets."""

import asyncio
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.load.questions import CHAT, COMPLETIONS, Question, Visit
from tests.load.replies import GENERATING, BrokenReplyError, Said, is_first_token, same, streamed, whole

PATIENCE = 300.0
"""Seconds without a byte after which a client gives up, which is a fault."""
MOST_RETRIES = 1000
_MOST_FAULTS = 40


@dataclass(frozen=True, slots=True)
class Answer:
    """How one request went. Times are seconds since it was sent; ``first`` is None where nothing was streamed."""

    client: int
    kind: str
    stream: bool
    status: int
    seconds: float
    first: float | None = None
    gaps: tuple[float, ...] = ()
    num_tokens: int = 0
    left: bool = False


@dataclass
class Book:
    """What all clients saw."""

    answers: list[Answer] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    num_faults: int = 0
    num_judged: int = 0
    """Replies that were compared with what was said alone."""
    num_other: int = 0
    """Those of them that said something else."""
    num_repeated: int = 0
    """Requests repeated since the server asked for it (429 or 503 with Retry-After)."""

    def fault(self, question: Question, what: str) -> None:
        """Note that something was not as it must be."""
        self.num_faults += 1
        if len(self.faults) < _MOST_FAULTS:
            self.faults.append(f"{question.name} ({question.path}): {what[:600]}")


class Client:
    """One user of the port."""

    def __init__(
        self, number: int, base_url: str, key: str | None, visits: Iterator[Visit], said: Mapping[str, Said],
        book: Book, *, transport: Callable[[], httpx.AsyncBaseTransport] | None = None,
        agree: Callable[[Said, Said], bool] = same,
    ) -> None:  # fmt: skip
        self._number, self._base_url, self._visits = number, base_url, visits
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._said, self._book = said, book
        self._rng = random.Random(number)
        self._transport = transport or _own_connections
        self._agree = agree

    async def run(self, until: float | None, most: int | None) -> None:
        """Ask until that time of the clock, or so many questions. Leaves no connection."""
        transport = self._transport()
        async with httpx.AsyncClient(transport=transport, base_url=self._base_url, timeout=PATIENCE) as http:
            done = 0
            while (until is None or time.monotonic() < until) and (most is None or done < most):
                await self._visit(http, next(self._visits))
                done += 1

    async def _visit(self, http: httpx.AsyncClient, visit: Visit) -> None:
        question = visit.question
        try:
            if visit.leaves == 0:
                await self._leave_at_once(http, visit)
            else:
                await self._ask(http, visit)
        except httpx.HTTPError as error:
            self._book.fault(question, f"{type(error).__name__}: {error}")
        except (BrokenReplyError, KeyError, IndexError, ValueError, TypeError) as error:
            self._book.fault(question, f"a broken reply: {type(error).__name__}: {error}")

    async def _leave_at_once(self, http: httpx.AsyncClient, visit: Visit) -> None:
        """Whatever the server is at by then: waiting, reading the prompt, writing."""
        begin = time.monotonic()
        asking = asyncio.create_task(self._ask(http, visit))
        await asyncio.wait([asking], timeout=self._rng.expovariate(5))
        if asking.done():
            return await asking
        asking.cancel()
        await asyncio.wait([asking])
        self._note(visit, 0, begin, left=True)
        return None

    async def _ask(self, http: httpx.AsyncClient, visit: Visit) -> None:
        for _ in range(MOST_RETRIES):
            begin = time.monotonic()
            async with http.stream(**self._request(visit)) as response:
                pause = response.headers.get("retry-after")
                if response.status_code not in (429, 503):
                    await self._read(response, visit, begin)
                    return
                if pause is None:
                    self._book.fault(visit.question, f"{response.status_code} without Retry-After")
                    return
            self._book.num_repeated += 1
            await asyncio.sleep(float(pause) * self._rng.uniform(0.8, 1.2))
        self._book.fault(visit.question, f"refused {MOST_RETRIES} times")

    def _request(self, visit: Visit) -> dict[str, Any]:
        question, headers = visit.question, self._headers if visit.question.keyed else {}
        request: dict[str, Any] = {"method": question.method, "url": question.path, "headers": headers}
        if question.wire is not None:
            return {**request, "content": question.wire, "headers": {**headers, "content-type": "application/json"}}
        if question.method == "GET":
            return request
        more: dict[str, Any] = {"stream": True} if visit.stream else {}
        if visit.stream and question.path in (CHAT, COMPLETIONS):
            more["stream_options"] = {"include_usage": True}
        return {**request, "json": {**question.body, **more}}

    async def _read(self, response: httpx.Response, visit: Visit, begin: float) -> None:
        question = visit.question
        if response.status_code not in question.statuses:
            text = (await response.aread()).decode(errors="replace")
            self._book.fault(question, f"status {response.status_code}: {text}")
            return
        if response.status_code != 200 or question.path not in GENERATING:
            content = await response.aread()
            if response.status_code >= 400 and not json.loads(content)["error"]["message"]:
                self._book.fault(question, f"an error without words: {content!r}")
            self._note(visit, response.status_code, begin)
            return
        if visit.stream:
            await self._follow(response, visit, begin)
            return
        reply = whole(question.path, json.loads(await response.aread()))
        self._note(visit, 200, begin, num_tokens=reply.num_tokens or 0)
        self._judge(question, reply)

    async def _follow(self, response: httpx.Response, visit: Visit, begin: float) -> None:
        """Read a stream to its end, or leave it."""
        question = visit.question
        events: list[dict[str, Any]] = []
        times: list[float] = []
        async for event in _events(response):
            events.append(event)
            if is_first_token(question.path, event):
                times.append(time.monotonic())
            if visit.leaves is not None and len(events) >= visit.leaves:
                self._note(visit, 200, begin, times=times, left=True)
                return
        reply = streamed(question.path, events)
        self._note(visit, 200, begin, times=times, num_tokens=reply.num_tokens or len(times))
        self._judge(question, reply)

    def _note(
        self, visit: Visit, status: int, begin: float, *, times: list[float] | None = None, num_tokens: int = 0,
        left: bool = False,
    ) -> None:  # fmt: skip
        gaps = tuple(after - before for before, after in itertools.pairwise(times)) if times else ()
        first = times[0] - begin if times else None
        seconds = time.monotonic() - begin
        self._book.answers.append(
            Answer(self._number, visit.question.kind, visit.stream, status, seconds, first, gaps, num_tokens, left)
        )

    def _judge(self, question: Question, reply: Said) -> None:
        if question.said is None:
            if len(reply.texts) != question.num_choices or not all(reply.ends):
                self._book.fault(question, f"choices or ends are missing: {reply}")
            return
        self._book.num_judged += 1
        wanted = self._said[question.said]
        if not self._agree(reply, wanted):
            self._book.num_other += 1
            self._book.fault(question, f"it says {reply}, and alone {wanted}")


def _own_connections() -> httpx.AsyncBaseTransport:
    limits = httpx.Limits(max_connections=2, max_keepalive_connections=1)
    return httpx.AsyncHTTPTransport(verify=False, limits=limits)


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream. Lines end with LF alone: a model may write any other separator."""
    rest, done = b"", response.request.url.path not in (CHAT, COMPLETIONS)
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and line[5:].strip() == b"[DONE]":
                done = True
            elif line.startswith(b"data:"):
                yield json.loads(line[5:])
    if not done:
        raise BrokenReplyError("the stream ends without [DONE]")
