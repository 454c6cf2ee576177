"""How much the port's clients may have under way: what is more is refused at once, not kept waiting for ever."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from engine.errors import RequestError
from engine.openai.http.errors import QueueFullError
from engine.runtime.stream import RequestStream


class Place:
    """Room that one HTTP request takes: kept before its prompts are made, then taken by its streams."""

    def __init__(self, streams: "weakref.WeakSet[RequestStream]", size: int) -> None:
        self._streams = streams
        self.size = size

    def take(self, stream: RequestStream) -> None:
        """``stream`` comes out of this place."""
        self.size -= stream.params.n
        self._streams.add(stream)


class Admission:
    """Counts completions under way (vLLM's ``--max-num-queued-reqs``) and tokens of prompts that wait.

    Lives in the server's event loop. Streams are asked whether they are over, and not kept for it.
    """

    def __init__(self, max_reqs: int, max_tokens: int) -> None:
        self.max_reqs = max_reqs
        self.max_tokens = max_tokens
        self._places: set[Place] = set()
        self._streams: weakref.WeakSet[RequestStream] = weakref.WeakSet()

    @contextmanager
    def place(self, num_prompts: int, n: int) -> Iterator[Place]:
        """Room for ``n`` completions of each prompt, before the prompts are made: who would be refused costs little.

        Raises QueueFullError, or RequestError where it is more than there can ever be room for.
        """
        size = num_prompts * max(n, 1)
        if size > self.max_reqs:
            what = f"n={n} for {num_prompts} prompts" if num_prompts > 1 else f"n={n}"
            raise RequestError(
                f"{what}: {size} completions in one request, at most {self.max_reqs} are taken "
                "(--max-num-queued-reqs); send them in several.",
                param="n" if n > 1 else "prompt",
            )
        taken = self._num_taken()
        if taken + size > self.max_reqs:
            raise QueueFullError(_full(f"{taken} of at most {self.max_reqs} completions are under way"))
        place = Place(self._streams, size)
        self._places.add(place)
        try:
            yield place
        finally:
            self._places.discard(place)

    def check_tokens(self, sizes: Iterable[int]) -> None:
        """Raise QueueFullError where prompts of ``sizes`` tokens are too much beside those that wait.

        Whatever its size, one that nothing waits before is taken.
        """
        waiting = sum(
            len(stream.prompt_token_ids)
            for stream in self._streams
            if not stream.finished and stream.metrics.first_token_time is None
        )
        if waiting and waiting + sum(sizes) > self.max_tokens:
            raise QueueFullError(_full(f"prompts of {waiting} tokens wait (at most {self.max_tokens})"))

    def _num_taken(self) -> int:
        over = [stream for stream in self._streams if stream.finished]
        self._streams.difference_update(over)
        return sum(stream.params.n for stream in self._streams) + sum(place.size for place in self._places)


def _full(what: str) -> str:
    return f"The queue is full: {what}. Try again later."
