"""Two hundred clients and a notebook at once: right replies, nothing held afterwards, and checks that can fail."""

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.load import growth
from tests.load.clients import Book, Client
from tests.load.questions import (  # fmt: skip
    CHAT,
    COMPLETIONS,
    MESSAGES,
    RESPONSES,
    WEIGHTS,
    Question,
    Visit,
    other_questions,
    plain_questions,
    visits,
)
from tests.load.replies import BrokenReplyError, Said, same, streamed, whole
from tests.load.report import Report, by_kind
from tests.load.run import Wanted, run, write_model
from tests.nightly import NIGHTLY, size

CLIENTS = 200
pytestmark = pytest.mark.timeout(7200 if NIGHTLY else 900)
MOST_RSS_GROWTH = 0.12 if NIGHTLY else 0.5
"""Of the resident memory, from the end of the warm-up on: what glibc and MLX keep of what was freed."""
MOST_IN_USE_GROWTH = 0.06
"""Of the part of it that is in use."""
MOST_OBJECTS_GROWTH = 0.3
"""Of this project's objects: the last 32 requests are kept for ``explain``, and are larger or smaller ones."""
LONGEST_WAIT = 12
"""Times the median wait of its kind."""


@pytest.fixture(scope="module")
def report(smollm2_gguf: Path) -> Report:
    wanted = Wanted(CLIENTS, rounds=6, seconds=1200) if NIGHTLY else Wanted(CLIENTS, most=1, warm_clients=100)
    found = run(wanted)
    print(found.table())
    return found


@pytest.mark.nightly
def test_every_reply_under_load_is_the_one_given_alone_and_none_is_an_error_of_ours(report: Report) -> None:
    assert not report.book.faults, report.table()
    assert report.num_proved >= 20
    assert report.book.num_judged >= size(100, 2000)
    assert report.cells >= size(5, 200)


@pytest.mark.nightly
def test_every_client_and_every_kind_of_request_has_its_turn(report: Report) -> None:
    fewest, _ = report.per_client
    assert fewest >= size(1, 6)
    kinds = {kind.name: kind for kind in by_kind(report.book.answers)}
    assert set(kinds) == {*WEIGHTS, "all"}
    assert any(answer.left for answer in report.book.answers)
    for name in ("chat", "completion", "message", "response", "prefix"):
        wait = kinds[name].wait
        assert wait is not None
        assert wait.most <= LONGEST_WAIT * wait.p50, f"{name}: {wait}"


@pytest.mark.nightly
def test_after_the_load_nothing_is_held_and_nothing_has_grown(report: Report) -> None:
    warm, last = report.growth.rounds[0], report.growth.rounds[-1]
    assert last.threads <= warm.threads
    assert last.files <= warm.files
    assert last.pooled <= (os.cpu_count() or 1) + 4
    assert report.growth.rss_share < MOST_RSS_GROWTH, report.table()
    assert report.growth.in_use_share < MOST_IN_USE_GROWTH, report.table()
    assert report.growth.objects_share < MOST_OBJECTS_GROWTH, report.growth.objects


@pytest.mark.nightly
def test_thousands_of_short_requests_leave_the_resident_memory_flat(smollm2_gguf: Path, tmp_path: Path) -> None:
    found = asyncio.run(growth.long_lived(write_model(tmp_path), size(100, 5000), size(2, 10)))
    print(found.table())
    assert not found.book.faults
    assert found.book.num_judged == size(100, 5000)
    warm, last = found.parts[size(1, 3) - 1], found.parts[-1]
    assert last.held.rss < warm.held.rss * (1.02 if NIGHTLY else 1.15), found.table()
    assert (last.held.threads, last.held.files) <= (warm.held.threads, warm.held.files)


@pytest.mark.nightly
@pytest.mark.skipif(not NIGHTLY, reason="a bench: make nightly runs it")
def test_both_servers_answer_the_same_load(smollm2_gguf: Path) -> None:
    from tests.load.against import OURS, compare

    found = compare(50, 2, 2)
    print(found.table())
    assert (found.sides[OURS].wrong, found.sides[OURS].failed) == (0, 0)
    assert all(side.asked == 200 for side in found.sides.values())


def test_the_same_seed_brings_the_same_requests_and_every_kind_comes() -> None:
    questions = [*plain_questions(), *other_questions()]
    one, other, third = ([next(mix) for _ in range(300)] for mix in (
        visits(1, 5, questions), visits(1, 5, questions), visits(2, 5, questions)))  # fmt: skip
    assert one == other
    assert one != third
    assert {visit.question.kind for visit in one} == set(WEIGHTS)
    assert {visit.leaves for visit in one} == {None, 0, 1, 2, 5}


QUESTION = Question("hi", "chat", CHAT, {"messages": []}, said="hi")
RIGHT = {
    "choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}],
    "usage": {"completion_tokens": 1},
}


def faults(handler: Callable[[httpx.Request], httpx.Response], visit: Visit) -> Book:
    book = Book()
    client = Client(
        0, "http://x", "k", iter([visit]), {"hi": Said(("yes",), (), ("stop",))}, book,
        transport=lambda: httpx.MockTransport(handler),
    )  # fmt: skip
    asyncio.run(client.run(None, 1))
    return book


def sse(*events: Any, done: bool = True) -> bytes:
    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
    return "".join([*lines, *(["data: [DONE]\n\n"] if done else [])]).encode()


def delta(text: str, end: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": end}]}


@pytest.mark.parametrize(
    ("stream", "status", "content", "fault"),
    [
        (False, 200, json.dumps(RIGHT).encode(), None),
        (True, 200, sse(delta("y"), delta("es", "stop")), None),
        (False, 500, b'{"error": {"message": "oh"}}', "status 500"),
        (False, 503, b"{}", "without Retry-After"),
        (False, 200, json.dumps(RIGHT).replace("yes", "no").encode(), "and alone"),
        (True, 200, sse(delta("y"), delta("e", "stop")), "and alone"),
        (True, 200, sse(delta("y"), delta("es", "stop"), done=False), "without [DONE]"),
        (True, 200, sse(delta("y"), {"error": {"message": "oh"}}), "an error in the stream"),
        (False, 200, b"{}", "a broken reply"),
    ],
)
def test_a_client_finds_what_is_wrong(stream: bool, status: int, content: bytes, fault: str | None) -> None:
    book = faults(lambda _: httpx.Response(status, content=content), Visit(QUESTION, stream))
    assert book.num_faults == (0 if fault is None else 1)
    assert fault is None or fault in book.faults[0]


def test_a_refused_client_comes_back_when_it_is_told_to() -> None:
    replies = [httpx.Response(503, headers={"Retry-After": "0"}), httpx.Response(200, json=RIGHT)]
    book = faults(lambda _: replies.pop(0), Visit(QUESTION))
    assert (book.num_faults, book.num_repeated, book.num_judged) == (0, 1, 1)


def test_a_bad_request_that_is_served_is_a_fault() -> None:
    bad = Question("bad", "bad", CHAT, statuses=(400,))
    assert "status 200" in faults(lambda _: httpx.Response(200, json=RIGHT), Visit(bad)).faults[0]
    refused = httpx.Response(400, json={"error": {"message": "so"}})
    assert faults(lambda _: refused, Visit(bad)).num_faults == 0


def test_all_four_forms_of_a_reply_say_the_same() -> None:
    said = Said(("yes",), (), ("stop",))
    usage = {"output_tokens": 1}
    response = {
        "status": "completed", "usage": usage,
        "output": [{"type": "message", "content": [{"type": "output_text", "text": "yes"}]}],
    }  # fmt: skip
    message = {"content": [{"type": "text", "text": "yes"}], "stop_reason": "end_turn", "usage": usage}
    completion = {"choices": [{"text": "yes", "finish_reason": "stop"}], "usage": {"completion_tokens": 1}}
    assert all(
        same(whole(path, data), said)
        for path, data in ((CHAT, RIGHT), (COMPLETIONS, completion), (RESPONSES, response), (MESSAGES, message))
    )
    assert not same(Said(("yes",), logprobs=(-1.0,)), Said(("yes",), logprobs=(-1.1,)))
    deltas = [{"type": "response.output_text.delta", "delta": "ye"}]
    with pytest.raises(BrokenReplyError, match="the deltas say"):
        streamed(RESPONSES, [*deltas, {"type": "response.completed", "response": response}])
    with pytest.raises(BrokenReplyError, match="message_stop"):
        streamed(MESSAGES, [{"type": "message_start"}])
