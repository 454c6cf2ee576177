"""What a GPU's first steps compile, compiled while weights are read.

MLX compiles many CUDA kernels when they are first needed, a second or more each, and keeps them for the process
whatever the sizes of arrays. Reading weights waits for disks and copies. So a thread meanwhile lets a small model of
the same kind take the steps that the loaded one is about to take.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine.errors import error_line
from engine.runner.device.threads import mlx_thread

logger = logging.getLogger("engine")


Check = Callable[[], None]
"""Called between two pieces of work: raises where the rest is not wanted any more."""


class _UnwantedError(Exception):
    """The load that the rehearsal is for is over."""


@contextmanager
def meanwhile(work: Callable[[Check], None]) -> Iterator[None]:
    """Run ``work`` on a thread of its own while the body runs, and wait for it; its failure is only a log line.

    Where the body fails, by an interrupt say, the work ends at its next check.
    """
    unwanted = threading.Event()

    def check() -> None:
        if unwanted.is_set():
            raise _UnwantedError

    thread = threading.Thread(target=_run, args=(work, check), name="vm-rehearsal", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        unwanted.set()
        raise
    finally:
        thread.join()


def _run(work: Callable[[Check], None], check: Check) -> None:
    started = time.perf_counter()
    try:
        with mlx_thread():
            work(check)
    except _UnwantedError:
        logger.debug("rehearsal: given up after %.2f s", time.perf_counter() - started)
    except Exception as error:  # noqa: BLE001  (the load itself meets what matters)
        logger.debug("rehearsal: %s", error_line(error, 200))
    else:
        logger.debug("rehearsal: %.2f s", time.perf_counter() - started)
