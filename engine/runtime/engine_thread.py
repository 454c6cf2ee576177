"""The one thread that owns MLX: it loads, steps and frees; everybody else talks to it through a queue."""

import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable
from typing import NoReturn, TypeVar

from engine.core.request import NewRequest
from engine.errors import DeviceFailedError, EngineClosedError, RequestError
from engine.format.text import shortened
from engine.handover import Answer, BackgroundThread
from engine.runner.device.faults import device_failure, driver_failure, give_up_device, has_driver
from engine.runner.device.placement import computing
from engine.runner.device.threads import mlx_thread
from engine.runtime.builder import BuiltEngine
from engine.runtime.callbacks import check_may_wait, serving
from engine.runtime.failures import failure_of, one_line
from engine.runtime.llm_engine import LLMEngine
from engine.runtime.stats_log import StatsLog
from engine.runtime.stream import RequestStream

T = TypeVar("T")
_Command = Callable[[LLMEngine], None]
_POLL = 0.1
_STUCK = 0.05
"""Seconds between checks for free memory while there is none."""
LONG_STEP = 5.0
"""Seconds after which the device is asked whether it still works, and between such questions."""
logger = logging.getLogger("engine")


class EngineThread:
    """Runs an engine on its own daemon thread. Never prints and never touches widgets.

    ``build`` runs on that thread; what it raises comes out of :meth:`start`. Once the device has failed (see
    :mod:`engine.runner.device.faults`) the thread stands still to the end of the process.
    """

    def __init__(self, build: Callable[[], BuiltEngine], name: str = "vm-engine") -> None:
        self._build: Callable[[], BuiltEngine] | None = build
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._built: Answer[BuiltEngine] = Answer()
        self._handed_over: dict[str, RequestStream] = {}
        """Streams of requests that the engine has not taken yet; it keeps the others."""
        self._under_way: dict[str, RequestStream] = {}
        """Those of all that have not ended: an id names one request."""
        self._lock = threading.Lock()
        self._closing = False
        self._failure: BaseException | None = None
        self._still, self._ended = threading.Event(), threading.Event()
        """Set once the thread does nothing more though it has not ended; and once it serves nothing more."""
        self._step_began: float | None = None
        self._watchers: list[_Command] = []
        self._thread = BackgroundThread(self._run, name)

    def start(self) -> BuiltEngine:
        """Start the thread and wait for the engine; KeyboardInterrupt passes through to the caller."""
        built = self._built  # the thread puts another in its place once it has built
        self._thread.start()
        return built.result()

    @property
    def alive(self) -> bool:
        """Whether requests are still served."""
        return self._thread.is_alive() and not self._closing

    def submit(self, request: NewRequest, stream: RequestStream) -> None:
        """Hand a request over; its deltas come through ``stream``. Raises RequestError for an id that is in use."""
        request_id = request.request_id
        try:
            with self._lock:
                self.check_open()
                if request_id in self._under_way:
                    said = (
                        f"request_id {shortened(request_id, 60)!r} is that of a request under way; choose another one."
                    )
                    error = RequestError(said, param="request_id")
                    stream.end(error)  # it never began: nobody may abort the other one by it
                    raise error
                self._under_way[request_id] = self._handed_over[request_id] = stream
            stream.when_over(lambda: self._forget(request_id, stream))
            self._about(request_id, "queued", lambda engine: self._add(engine, request, stream))
        except BaseException:
            self._forget(request_id, stream)
            raise

    def abort(self, request_id: str) -> None:
        """End a request soon. Safe for ids that are unknown or over."""
        self._about(request_id, "aborted", lambda engine: engine.abort_request(request_id))

    def finish_thinking(self, request_id: str) -> None:
        """End a request's thought soon. Safe for ids that are unknown or over."""
        self._about(request_id, "told to answer", lambda engine: engine.finish_thinking(request_id))

    def call(self, function: Callable[[LLMEngine], T]) -> T:
        """Run ``function`` between two steps and give its result. Raises OwnThreadError on the engine's thread."""
        check_may_wait("this call")
        answer: Answer[T] = Answer()

        def command(engine: LLMEngine) -> None:
            try:
                answer.set_result(function(engine))
            except BaseException as error:
                failure = device_failure(error)
                if failure is not None:
                    self._give_up(failure, engine)  # first: who is told may end the process
                answer.set_exception(failure or error)
                if failure is not None:
                    raise failure from error

        self.check_open()
        self._commands.put(command)
        while not answer.wait(_POLL):
            self.check_open()
        return answer.result()

    def post(self, command: _Command) -> None:
        """Run ``command`` soon, between two steps; nothing happens once the engine is closed. A failure is logged."""

        def guarded(engine: LLMEngine) -> None:
            try:
                command(engine)
            except BaseException as error:  # noqa: BLE001  (nobody waits for it, and the others' requests go on)
                failure_of("a change between two steps failed", error)

        if self.alive:
            self._commands.put(guarded)

    def watch(self, command: _Command) -> None:
        """Run ``command`` before every step from now on: it must be quick."""
        self._watchers.append(command)

    def close(self) -> None:
        """End all requests, free the engine on its own thread and wait for that. Safe to repeat."""
        with self._lock:
            self._closing = True
        self._commands.put(None)
        if threading.current_thread() is not self._thread:
            while self._thread.is_alive() and not self._still.is_set():
                self._thread.join(_POLL)

    def _about(self, request_id: str, what: str, command: _Command) -> None:
        """Queue a command that concerns one request, which alone fails if the command does."""

        def guarded(engine: LLMEngine) -> None:
            try:
                command(engine)
            except BaseException as error:  # noqa: BLE001  (the request ends here, and its stream is told)
                engine.fail_request(request_id, failure_of(f"the request could not be {what}", error))

        self._commands.put(guarded)

    def _forget(self, request_id: str, stream: RequestStream) -> None:
        for known in (self._under_way, self._handed_over):
            if known.get(request_id) is stream:
                known.pop(request_id, None)

    def _add(self, engine: LLMEngine, request: NewRequest, stream: RequestStream) -> None:
        with self._lock:
            self._handed_over.pop(request.request_id, None)
        engine.add_request(request, stream)

    def check_open(self) -> None:
        """Raises EngineClosedError if nothing is served any more."""
        if self._closing or self._failure is not None or not self._thread.is_alive():
            raise self._closed_error()

    def _closed_error(self) -> EngineClosedError:
        if self._failure is None:
            return EngineClosedError("the engine was closed; load a model again")
        if isinstance(self._failure, DeviceFailedError):
            return DeviceFailedError(str(self._failure))
        error = EngineClosedError(f"the engine failed ({one_line(self._failure)}); load the model again")
        error.__cause__ = self._failure
        return error

    def _run(self) -> None:
        try:
            with computing(), mlx_thread():
                self._live()
        except BaseException as error:
            failure = device_failure(error)
            if failure is not None:
                self._give_up(failure, None)
            elif self._build is None:
                raise
            self._built.set_exception(failure or error)  # before anything was built: start() raises it
            if failure is not None:
                self._stand_still(failure)

    def _live(self) -> None:
        """Make the engine, serve until it is closed, free it."""
        engine = self._make()
        if engine is None:
            return
        if has_driver():
            threading.Thread(target=self._watch, args=(weakref.ref(engine),), name="vm-watch", daemon=True).start()
        try:
            self._serve(engine)
        except BaseException as error:  # noqa: BLE001  (the thread ends here, and everyone waiting is told)
            failure = device_failure(error)
            if failure is not None:
                self._stand_still(failure, engine)
            self._failure = error
            logger.error("the engine thread failed: %s", one_line(error))
        finally:
            with self._lock:
                self._closing = True
            self._ended.set()
            self._end_streams(engine)
            engine.close()

    def _stand_still(self, failure: DeviceFailedError, engine: LLMEngine | None = None) -> NoReturn:
        """Tell everyone that the device failed, and never touch it again: neither memory nor streams are freed.

        Streams of MLX are freed where their thread ends, which therefore never does.
        """
        self._give_up(failure, engine)
        while True:
            threading.Event().wait()

    def _give_up(self, failure: DeviceFailedError, engine: LLMEngine | None) -> None:
        with self._lock:
            if self._still.is_set():
                return
            self._closing, self._failure = True, failure
            give_up_device(failure, engine)
            self._still.set()
            self._ended.set()
        logger.error("%s", failure)
        self._end_streams(engine)

    def _watch(self, engine: "weakref.ref[LLMEngine]") -> None:
        """While a step takes long, ask whether the device failed under it: MLX may then wait forever."""
        while not self._ended.wait(LONG_STEP):
            began = self._step_began
            if began is not None and time.monotonic() - began >= LONG_STEP:
                failure = driver_failure()
                if failure is not None:
                    self._give_up(failure, engine())

    def _make(self) -> LLMEngine | None:
        assert self._build is not None, "an engine thread runs once"
        try:
            built = self._build()
        except BaseException as error:  # noqa: BLE001  (start() raises it)
            failure = device_failure(error)
            if failure is not None:
                self._give_up(failure, None)
                self._built.set_exception(failure)
                self._stand_still(failure)
            error.__traceback__ = None  # its frames hold the weights
            self._built.set_exception(error)
            return None
        finally:
            self._build = None
        self._built.set_result(built)
        self._built = Answer()  # that one keeps the engine alive
        return built.engine

    def _serve(self, engine: LLMEngine) -> None:
        with serving():
            self._step_until_closed(engine)

    def _step_until_closed(self, engine: LLMEngine) -> None:
        log = StatsLog(engine.stats)
        idle = True
        while self._take_commands(engine):
            if not engine.has_work:
                idle = True
                continue
            if idle:
                log.resume()
            idle = False
            try:
                for watcher in self._watchers:
                    watcher(engine)
                self._step_began = time.monotonic()
                engine.step()
                log.tick(idle=not engine.has_work)
            except BaseException as error:  # noqa: BLE001  (a failing step: its requests are told, the engine goes on)
                engine.fail_step(failure_of("the model failed", error))
            finally:
                self._step_began = None

    def _take_commands(self, engine: LLMEngine) -> bool:
        """Run what others asked for; waits while there is no work. False: close."""
        block, timeout = not engine.has_work or engine.stuck, _STUCK if engine.stuck else None
        while True:
            try:
                command = self._commands.get(block=block, timeout=timeout)
            except queue.Empty:
                return True
            if command is None:
                return False
            command(engine)
            block = False

    def _end_streams(self, engine: LLMEngine | None) -> None:
        with self._lock:
            streams, self._handed_over = list(self._handed_over.values()), {}
        for stream in (*streams, *(engine.streams() if engine is not None else ())):
            stream.end(self._closed_error())
