"""Responses under way and those kept for later: retrieval, ``previous_response_id``, cancelling."""

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from engine.errors import UnknownResponseError
from engine.openai.http.lifetime import OpenRequest
from engine.openai.routes.responses_output import JsonObject, ResponseBuilder
from engine.openai.schema.left_out import LeftOut
from engine.openai.schema.responses_input import InputReader
from engine.openai.schema.responses_tools import GivenTool
from engine.openai.serving.generation import Job

MAX_RESPONSES = 1000
MAX_BYTES = 64 * 1024 * 1024
"""Bounds of the store: the oldest responses that are over are forgotten first."""


class ResponseCancelledError(Exception):
    """A background response was cancelled by its client."""


class RunningResponse:
    """One response: its job, its object and, in the background, its events.

    ``messages`` are those before its own; ``brought_tools`` came with items among them.
    """

    def __init__(
        self,
        builder: ResponseBuilder,
        job: Job,
        messages: list[dict[str, Any]],
        brought_tools: Sequence[GivenTool] = (),
    ) -> None:
        self.builder = builder
        self.job = job
        self.brought_tools = brought_tools
        self.events: list[JsonObject] = []
        self.num_bytes = 0
        self.work: OpenRequest | None = None
        self.task: asyncio.Task[None] | None = None
        self._messages = messages
        self.listeners: dict[Followed, Callable[[], None]] = {}

    @property
    def id(self) -> str:
        """The response's id."""
        return str(self.builder.response["id"])

    def conversation(self) -> list[dict[str, Any]]:
        """The messages up to this response's own, without instructions: what the next turn continues."""
        reader = InputReader(self._messages, self.builder.toolbox, LeftOut(), lambda _: None)
        reader.read(self.builder.response["output"])
        return reader.messages

    def publish(self, *events: JsonObject) -> None:
        """Keep ``events`` and tell those who follow, which none of them does too."""
        self.events += events
        for listener in list(self.listeners.values()):
            listener()

    async def cancel(self) -> None:
        """End a background response and wait until it is over. Safe to repeat."""
        if self.work is not None and not self.builder.over:
            self.work.end(ResponseCancelledError())
        if self.task is not None:
            await asyncio.wait([self.task])

    def measure(self) -> None:
        """Count the bytes that keeping this response costs (as JSON), now that it is over: what ran it is let go."""
        self.work = self.task = None
        self.job.release()
        self.num_bytes = len(json.dumps([self.conversation(), self.builder.response, self.events]))


class Followed:
    """The events of a background response whose number is greater than ``after``, those to come included."""

    def __init__(self, running: RunningResponse, after: int) -> None:
        self._running, self._position = running, after + 1

    def listen(self, listener: Callable[[], None] | None) -> None:
        """See :class:`EventSource`."""
        if listener is None:
            self._running.listeners.pop(self, None)
        else:
            self._running.listeners[self] = listener

    def take(self) -> Sequence[JsonObject] | None:
        """See :class:`EventSource`."""
        some = self._running.events[self._position :]
        self._position += len(some)
        return some if some or not self.ending else None

    @property
    def ending(self) -> bool:
        """See :class:`EventSource`."""
        return self._running.builder.over


class ResponseStore:
    """Responses by id, bounded in number and bytes. Lives in the server's event loop."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._by_id: OrderedDict[str, RunningResponse] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, response_id: str, *, param: str | None = None) -> RunningResponse:
        """The response. Raises UnknownResponseError."""
        if response_id not in self._by_id:
            raise UnknownResponseError(f"Response with id '{response_id}' not found.", param=param)
        return self._by_id[response_id]

    def output_item(self, item_id: str) -> JsonObject | None:
        """An item that a stored response wrote; None if there is none of that id."""
        outputs = (response.builder.response["output"] for response in self._by_id.values())
        return next((item for output in outputs for item in output if item["id"] == item_id), None)

    def add(self, response: RunningResponse) -> None:
        """Keep ``response`` from its beginning."""
        self._by_id[response.id] = response
        self._shrink()

    def settle(self, response: RunningResponse) -> None:
        """Account for ``response``, which is over, and forget the oldest ones if there is too much."""
        if response.id in self._by_id:
            response.measure()
            self._shrink()

    def remove(self, response_id: str) -> None:
        """Forget a response."""
        self._by_id.pop(response_id, None)

    def _shrink(self) -> None:
        total = sum(response.num_bytes for response in self._by_id.values())
        for response in list(self._by_id.values()):
            if len(self._by_id) <= self._max_responses and total <= self._max_bytes:
                return
            if response.builder.over:
                total -= response.num_bytes
                self.remove(response.id)
