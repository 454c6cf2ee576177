"""``python -m engine.batch.replica_process``: a replica of :mod:`engine.batch.replicas`.

Orders come pickled on standard input, which ends with the replica; answers go pickled to standard output, which nothing
else writes to.
"""

import os
import pickle
import signal
import sys
import threading
from functools import partial
from typing import IO, Any

from engine.batch.map import MapClient, MapJob
from engine.batch.replicas import ReplicaOrder
from engine.errors import EngineClosedError, GenerationError, RequestError, error_line

_NEWS_SECONDS = 0.5
"""Between two reports of how many tokens there are."""


class Answers:
    """Where answers are written, by any thread."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._lock = stream, threading.Lock()

    def send(self, *message: Any) -> None:
        """Write one message. Nobody reads any more: this process is about to end."""
        try:
            with self._lock:
                pickle.dump(message, self._stream)
                self._stream.flush()
        except BrokenPipeError:
            return


class Worker:
    """Does what it is told with one model."""

    def __init__(self, client: MapClient, answers: Answers) -> None:
        self._client, self._answers = client, answers
        self._jobs: dict[int, MapJob] = {}

    def follow(self, orders: IO[bytes]) -> None:
        """Follow ``orders`` until there are no more."""
        over = threading.Event()
        threading.Thread(target=self._report, args=(over,), daemon=True).start()
        try:
            while True:
                kind, number, *rest = pickle.load(orders)
                if kind == "submit":
                    self._submit(number, *rest)
                elif (job := self._jobs.get(number)) is not None:
                    job.stream.abort()
        except EOFError:
            return
        finally:
            over.set()

    def _submit(self, number: int, prompt: str, params: dict[str, Any]) -> None:
        try:
            job = self._jobs[number] = self._client.submit(prompt, params)
        except RequestError as error:
            self._answers.send("over", number, error)
            return
        job.stream.when_over(partial(self._over, number, job))

    def _over(self, number: int, job: MapJob) -> None:
        self._jobs.pop(number, None)
        try:
            self._answers.send("over", number, job.answer())
        except EngineClosedError as error:
            self._answers.send("lost", error_line(error))
        except (RequestError, GenerationError) as error:
            self._answers.send("over", number, type(error)(str(error)))
        except Exception as error:  # noqa: BLE001 - this is the engine's thread, which other prompts need
            self._answers.send("over", number, GenerationError(error_line(error)))

    def _report(self, over: threading.Event) -> None:
        while not over.wait(_NEWS_SECONDS):
            if counts := {number: job.stream.num_tokens for number, job in list(self._jobs.items())}:
                self._answers.send("tokens", counts)


def main() -> None:
    """Load the model, answer, free it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started this says when it ends
    answers = Answers(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)
    orders = sys.stdin.buffer
    order: ReplicaOrder = pickle.load(orders)
    try:
        model = order.load(order.model, **order.options)
    except Exception as error:  # noqa: BLE001 - told to whoever waits for this replica
        answers.send("lost", error_line(error))
        return
    with model:
        model.settings.update(**order.settings)
        client = order.client(model)
        answers.send("ready", client.look_ahead)
        Worker(client, answers).follow(orders)


if __name__ == "__main__":
    main()
