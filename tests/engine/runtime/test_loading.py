"""A load that is given up ends, or says that it still ends; the next one waits for it. No model is loaded here."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from engine.errors import EngineClosedError, MemoryPlanError, ModelLoadError
from engine.models.local import ResolvedModel
from engine.params.engine_args import EngineArgs
from engine.runtime import loading
from engine.runtime.engine_thread import EngineThread
from engine.runtime.loading import STILL_ENDING, Progress, start_engine

RESOLVED = ResolvedModel("m", Path("m"), "folder")


class Builds:
    """In place of ``build_engine``: what it does next, and how often it was begun."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.goes_on = threading.Event()
        self.raises: BaseException | None = None
        self.threads: list[threading.Thread] = []

    def __call__(self, _resolved: Any, _args: Any, _tokenizer: Any, _metrics: Any, report: Progress) -> NoReturn:
        self.threads.append(threading.current_thread())
        self.begun.release()
        if self.raises is not None:
            raise self.raises
        self.goes_on.wait()  # a library's call, which nothing breaks off
        report("load", 0, 0)
        raise AssertionError("the load went on")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Iterator[Builds]:
    made = Builds()
    monkeypatch.setattr(loading, "build_engine", made)
    yield made
    made.goes_on.set()
    loading.wait_for_ending_loads()


def start(progress: Progress | None = None) -> Any:
    return start_engine(RESOLVED, EngineArgs.from_options("m", {}), None, None, progress)  # type: ignore[arg-type]


def interrupted_twice(builds: Builds, monkeypatch: pytest.MonkeyPatch) -> KeyboardInterrupt:
    """■ while the load is in a call that cannot be broken off, and again while its end is waited for."""
    start_thread, close = EngineThread.start, EngineThread.close

    def start_and_stop(self: EngineThread) -> NoReturn:
        self._thread.start()
        builds.begun.acquire()
        raise KeyboardInterrupt

    def stop(_self: EngineThread) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(EngineThread, "start", start_and_stop)
    monkeypatch.setattr(EngineThread, "close", stop)
    with pytest.raises(KeyboardInterrupt) as stopped:
        start()
    monkeypatch.setattr(EngineThread, "start", start_thread)
    monkeypatch.setattr(EngineThread, "close", close)
    return stopped.value


def test_a_second_interrupt_says_that_the_load_still_ends_and_the_next_load_waits_for_it(
    builds: Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert interrupted_twice(builds, monkeypatch).__notes__ == [STILL_ENDING]
    (ending,) = builds.threads
    assert ending.is_alive()
    builds.raises = EngineClosedError("the second load")
    ends: list[BaseException] = []

    def load_again() -> None:
        try:
            start()
        except EngineClosedError as error:
            ends.append(error)

    again = threading.Thread(target=load_again)
    again.start()
    assert not builds.begun.acquire(timeout=0.3)
    assert again.is_alive()
    builds.goes_on.set()
    again.join()
    assert not ending.is_alive()
    assert ends == [builds.raises]
    assert len(builds.threads) == 2


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (ValueError("[reshape] x\ny"), ModelLoadError, r"^m: cannot be loaded \(ValueError: \[reshape\] x y\)"),
        (SystemExit(3), ModelLoadError, "^m: cannot be loaded"),
        (type("PanicException", (BaseException,), {})("index"), ModelLoadError, "PanicException: index"),
        (RuntimeError("[malloc] Unable to allocate 9 bytes"), MemoryPlanError, "^m: out of memory while loading"),
        (ModelLoadError("as it is"), ModelLoadError, "^as it is$"),
    ],
)
def test_whatever_a_load_fails_with_is_one_line_and_says_what_it_was(
    builds: Builds, error: BaseException, kind: type[Exception], says: str
) -> None:
    builds.raises = error
    with pytest.raises(kind, match=says) as told:
        start()
    assert "\n" not in str(told.value)
    assert told.value is error or told.value.__cause__ is error


def test_what_progress_raises_comes_out_as_it_is(builds: Builds) -> None:
    class StopError(Exception):
        pass

    stop = StopError("enough")

    def progress(_stage: str, _done: int, _total: int) -> NoReturn:
        raise stop

    builds.goes_on.set()
    with pytest.raises(StopError) as raised:
        start(progress)
    assert raised.value is stop
