"""What a panel shows of a remote server: this notebook's requests there, and the server's own figures."""

import math
import time
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.errors import RequestError, VMMagicError
from engine.runtime.activity import Rate, RequestActivity, Throughput
from vm_magic.remote.llm import RemoteLLM
from vm_magic.remote.metrics import ServerState, read_state

if TYPE_CHECKING:
    from concurrent.futures import Future

    import httpx

    from vm_magic.remote.stream import RemoteStream

POLL_SECONDS = 2.0
"""Shortest time between two requests for ``/metrics``."""
POLL_TIMEOUT = 1.5
PAUSE_WITHOUT_METRICS = 60.0
"""Until a server that shows no ``/metrics`` is asked again."""


@dataclass(frozen=True)
class RemoteActivity:
    """This notebook's ``requests`` at the server; ``rates`` are the server's, of all its clients.

    ``state`` is None while nothing is known, and ``problem`` says why, in words, once that is known.
    """

    requests: tuple[RequestActivity, ...]
    rates: tuple[Rate, ...]
    second: int
    state: ServerState | None
    problem: str


class ServerWatch:
    """Asks ``remote`` for its metrics now and then. One thread calls :meth:`poll`, often; nothing here waits."""

    def __init__(self, remote: RemoteLLM) -> None:
        self.remote = remote
        self._state: ServerState | None = None
        self._problem = ""
        self._asked: Future[httpx.Response] | None = None
        self._asked_at = -math.inf
        self._pause = POLL_SECONDS
        self._throughput = Throughput()
        self._counted: tuple[float, float] | None = None

    def look(self) -> RemoteActivity:
        """What is known by now; asks nobody."""
        now = time.monotonic()
        requests = tuple(request_activity(stream, now) for stream in self.remote.requests())
        return RemoteActivity(requests, self._throughput.recent(now), int(now), self._state, self._problem)

    def poll(self) -> None:
        """Take an answer that has come, give up one that is late, and ask again when it is time."""
        now = time.monotonic()
        asked = self._asked
        if asked is not None and asked.done():
            self._asked = None
            self._take(asked, now)
        elif asked is not None and now - self._asked_at >= POLL_TIMEOUT:
            self._asked = None
            asked.cancel()
            self._fail(f"/metrics did not answer within {POLL_TIMEOUT:g} s")
        if self._asked is None and now - self._asked_at >= self._pause:
            self._asked_at = now
            try:
                self._asked = self.remote.ask_metrics(POLL_TIMEOUT)
            except VMMagicError as error:
                self._fail(str(error))

    def _take(self, asked: "Future[httpx.Response]", now: float) -> None:
        self._pause = POLL_SECONDS
        try:
            state = read_state(asked.result().text, self.remote.model)
        except RequestError:
            self._pause = PAUSE_WITHOUT_METRICS
            self._fail("the server shows no /metrics")
        except (VMMagicError, CancelledError) as error:
            self._fail(str(error) or "the connection was closed")
        else:
            self._state, self._problem = state, ""
            if state == ServerState():
                self._problem = "the server's /metrics are not vLLM's"
            self._count(state.generation_tokens, now)

    def _fail(self, problem: str) -> None:
        self._state, self._problem = None, problem

    def _count(self, generated: float | None, now: float) -> None:
        """Spread what was generated since the last answer over the seconds between."""
        before, self._counted = self._counted, None if generated is None else (now, generated)
        if before is None or generated is None:
            return
        then, count = before
        new = int(generated - count if generated >= count else generated)  # less than before: the server restarted
        first, last = int(then), int(now)
        num_seconds = max(1, last - first)
        for place in range(num_seconds):
            share = new * (place + 1) // num_seconds - new * place // num_seconds
            self._throughput.add(last - num_seconds + 1 + place, 0, share)


def request_activity(stream: "RemoteStream", now: float) -> RequestActivity:
    """A stream as the panel lists it: ``waiting`` until its first token; only the server knows its prompt's tokens."""
    metrics, num_tokens = stream.metrics, stream.num_tokens
    return RequestActivity(
        request_id=stream.request_id,
        state="running" if num_tokens else "waiting",
        num_prompt_tokens=0,
        num_computed_tokens=0,
        num_cached_tokens=None,
        num_output_tokens=num_tokens,
        tokens_per_second=metrics.decode_rate(num_tokens),
        time_to_first_token=metrics.time_to_first_token,
        age=now - metrics.arrival_time,
        thinking=stream.thinking,
        params=stream.params,
    )
