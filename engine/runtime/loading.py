"""One load: its thread, what ends it early, and what is told of one that fails."""

import logging
import threading
import traceback
from collections.abc import Callable

from engine.errors import MemoryPlanError, ModelLoadError, VMMagicError, error_line
from engine.models.local import ResolvedModel
from engine.models.reading import is_fault, keep_short
from engine.params.engine_args import EngineArgs
from engine.runner.device.faults import device_failure
from engine.runner.device.memory import is_out_of_memory
from engine.runtime.builder import BuiltEngine, build_engine
from engine.runtime.engine_thread import EngineThread
from engine.runtime.metrics import EngineMetrics
from engine.text.tokens.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]
STILL_ENDING = "the load that was stopped still ends, in a call that cannot be broken off; the next load waits for it"
_FRAMES = 6
"""Of a failure's innermost calls, so many go into the log."""
_ending: list[EngineThread] = []
"""Threads of loads that were given up, and nobody waited for to the end."""
logger = logging.getLogger("engine")


class _Cancelled:
    """Whether a load was given up, and what its progress raised to give it up."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._set = threading.Event()
        self.raised: BaseException | None = None

    def set(self) -> None:
        """Have the load end at its next report."""
        self._set.set()

    def report(self, stage: str, done: int, total: int) -> None:
        """Tell of the load, on its thread. Raises KeyboardInterrupt once it is given up."""
        if self._set.is_set():
            raise KeyboardInterrupt
        if self._progress is not None:
            try:
                self._progress(stage, done, total)
            except BaseException as error:
                self.raised = error
                raise


def start_engine(
    resolved: ResolvedModel,
    args: EngineArgs,
    tokenizer: Tokenizer,
    metrics: EngineMetrics,
    progress: Progress | None,
) -> tuple[EngineThread, BuiltEngine]:
    """Load a model on a thread of its own and wait for it; what is raised meanwhile, an interrupt too, ends both.

    An earlier load that was given up ends first. A second interrupt, while the thread ends, does not wait for that:
    it has a note that says so.
    """
    wait_for_ending_loads()
    cancelled = _Cancelled(progress)

    def build() -> BuiltEngine:
        try:
            return build_engine(resolved, args, tokenizer, metrics, cancelled.report)
        except BaseException as error:
            keep_short(error)
            cause = _shortage(error) or error  # of which a part of the load may have made something else
            if error is cancelled.raised or not is_fault(cause) or device_failure(error) is not None:
                raise
            raise _told(resolved.name, cause) from error.with_traceback(None)  # its frames hold the weights

    thread = EngineThread(build)
    try:
        return thread, thread.start()
    except BaseException:
        cancelled.set()
        _end(thread)
        raise


def wait_for_ending_loads() -> None:
    """Wait until the threads of all loads that were given up have ended; an interrupt comes through."""
    while _ending:
        _ending[0].close()
        _ending.pop(0)


def _end(thread: EngineThread) -> None:
    try:
        thread.close()
    except KeyboardInterrupt as error:
        _ending.append(thread)
        error.add_note(STILL_ENDING)
        raise


def _shortage(error: BaseException | None) -> BaseException | None:
    """That memory ran out, if ``error`` came of it."""
    while error is not None and not is_out_of_memory(error):
        error = error.__cause__
    return error


def _told(name: str, error: BaseException) -> VMMagicError:
    """What the user is told of ``error``; the log has where it came from, for it may be a fault of this engine."""
    calls = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
    where = " < ".join(f"{call.name} ({call.filename.rpartition('/')[2]}:{call.lineno})" for call in reversed(calls))
    logger.error("%s: %s in %s", name, error_line(error), where)
    if is_out_of_memory(error):
        return MemoryPlanError(
            f"{name}: out of memory while loading ({error_line(error)}); free memory, or take a smaller or more "
            "quantized model"
        )
    return ModelLoadError(
        f"{name}: cannot be loaded ({error_line(error)}): its files are damaged or not of one model, fetch them again; "
        "or it is a fault of this engine, of which the log says where"
    )
