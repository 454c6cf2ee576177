"""One request to a remote server, with the surface of the engine's own streams."""

import asyncio
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from engine.chat.reply import ParsedCompletionDelta
from engine.errors import VMMagicError
from engine.outputs import RequestOutput, Usage
from engine.params.sampling_params import SamplingParams
from engine.runtime.stream import RequestStream
from vm_magic.remote.address import RemoteReplyError
from vm_magic.remote.wire import RemoteOutput, read_chat_choice, read_text_choice, read_usage

if TYPE_CHECKING:
    from vm_magic.remote.client import RemoteClient


class RemoteStream(RequestStream):
    """Deltas of one remote reply. :meth:`abort` closes the connection, upon which the server ends the request.

    Times are measured here, the network included. Raises the errors of :mod:`vm_magic.remote.address`.
    """

    def __init__(self, prompt: str | None, params: SamplingParams) -> None:
        super().__init__(f"remote-{uuid.uuid4().hex}", prompt, [], params, self._cancel)
        self.usage: Usage | None = None
        self.thinking = False
        """Whether the latest delta belonged to a thought."""
        self._future: Future[None] | None = None
        self._num_tokens = 0
        self._reason: str | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens so far, counted as they come: all completions together."""
        return self._num_tokens

    def start(self, client: "RemoteClient", path: str, body: dict[str, Any]) -> "RemoteStream":
        """Send the request; returns at once."""
        self._future = client.begin(self._pump(client, path, body))
        # A task that was cancelled before its first step never runs, and so cannot say that it ended.
        self._future.add_done_callback(lambda future: self._cut_off() if future.cancelled() else None)
        return self

    def snapshot(self) -> RemoteOutput:
        """Everything that came so far; counted here until the server reports its usage."""
        output = super().snapshot()
        usage = self.usage or Usage(completion_tokens=self._num_tokens)
        values = {name: getattr(output, name) for name in RequestOutput.__slots__}
        return RemoteOutput(**{**values, "num_cached_tokens": usage.cached_tokens}, usage=usage)

    def result(self) -> RemoteOutput:
        """Wait for the end and give everything."""
        super().result()
        return self.snapshot()

    def _cancel(self) -> None:
        if self._future is not None:
            self._future.cancel()

    async def _pump(self, client: "RemoteClient", path: str, body: dict[str, Any]) -> None:
        read = read_chat_choice if path.endswith("/chat/completions") else read_text_choice
        try:
            async for event in client.events(path, body, self._started):
                self._take(event, read)
            if self._reason is None:
                raise RemoteReplyError(f"{client.address.base_url} broke off its reply; what came is kept, ask again")
        except asyncio.CancelledError:
            self._cut_off()
            raise
        except VMMagicError as error:
            self._finish(error)
        except Exception as error:  # noqa: BLE001 - the request ends here, and whoever waits gets the error
            said = client.address.hidden(f"{type(error).__name__}: {error}")
            self._finish(RemoteReplyError(f"{client.address.base_url} sent a reply that cannot be read: {said}"))
        else:
            self._finish(None)

    def _started(self) -> None:
        self.metrics.scheduled_time = time.monotonic()

    def _take(self, event: Any, read: Callable[[Mapping[str, Any]], ParsedCompletionDelta]) -> None:
        if not isinstance(event, Mapping):
            raise TypeError(f"an event is not an object: {event!r}")
        if event.get("error"):
            error = event["error"]
            said = error.get("message") if isinstance(error, Mapping) else error
            raise RemoteReplyError(f"the server failed: {' '.join(str(said).split())}")
        if event.get("usage"):
            self.usage = read_usage(event["usage"])
            self.num_cached_tokens = self.usage.cached_tokens
        for choice in event.get("choices") or ():
            delta = read(choice)
            if delta.parsed is not None and delta.token_ids:
                self.thinking = bool(delta.parsed.reasoning) and not delta.parsed.content
            if delta.token_ids:
                self._time_tokens(len(delta.token_ids))
            if delta.finish_reason is not None:
                self._reason = delta.finish_reason
            if delta.token_ids or delta.finish_reason:
                self.put(delta)

    def _time_tokens(self, count: int) -> None:
        now = time.monotonic()
        self._num_tokens += count
        if self.metrics.first_token_time is None:
            self.metrics.first_token_time = now
        self.metrics.last_token_time = now

    def _cut_off(self) -> None:
        if not self.finished and self._reason is None:
            self._reason = "abort"
            self.put(ParsedCompletionDelta(0, "", [], finish_reason="abort", parsed=None))
        self._finish(None)

    def _finish(self, error: VMMagicError | None) -> None:
        if self.metrics.finished_time is None:
            self.metrics.finished_time = time.monotonic()
        self.end(error)
