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

from engine.runner.device.threads import mlx_thread

logger = logging.getLogger("engine")


@contextmanager
def meanwhile(work: Callable[[], None]) -> Iterator[None]:
    """Run ``work`` on a thread of its own while the body runs, and wait for it; its failure is only a log line."""
    thread = threading.Thread(target=_run, args=(work,), name="vm-rehearsal", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _run(work: Callable[[], None]) -> None:
    started = time.perf_counter()
    try:
        with mlx_thread():
            work()
    except Exception as error:  # noqa: BLE001  (the load itself meets what matters)
        logger.debug("rehearsal: %s: %s", type(error).__name__, " ".join(str(error).split())[:200])
    else:
        logger.debug("rehearsal: %.2f s", time.perf_counter() - started)
