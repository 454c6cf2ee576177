"""The device that MLX computes on: its kind, its memory, and on Linux CPUs a fast BLAS before MLX loads.

Importing this module imports neither MLX nor a BLAS, so that :func:`choose_blas` can come first.
"""

import ctypes
import gc
import importlib
import os
import resource
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from engine.errors import VMMagicError
from engine.runner.device.blas import use_openblas

DeviceKind = Literal["metal", "cuda", "cpu"]
_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")
"""What OpenBLAS reads when it loads."""
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's numbers for ``mallopt``."""
_CUDA_BUILDS = ("mlx-cuda-12", "mlx-cuda-13", "mlx-cuda")


@dataclass(frozen=True, slots=True)
class Device:
    """Where MLX computes. ``memory_limit`` is in bytes: what this process can hope to use on it."""

    kind: DeviceKind
    name: str
    memory_limit: int

    @property
    def chunk_size(self) -> int:
        """Most tokens in one step where the user does not say.

        Where a token costs milliseconds, longer chunks only delay other requests, aborts and interrupts.
        """
        return 512 if self.kind == "cpu" else 2048

    @property
    def runs_packed_weights_fast(self) -> bool:
        """Whether matrix products on packed (4 or 8 bit) weights beat float32 here."""
        return self.kind != "cpu"


def prepare_backend() -> str | None:
    """Set MLX up for this process; call it before anything else imports MLX or mlx-lm.

    Returns one line on the choice of BLAS (see :func:`choose_blas`), and imports mlx-lm without its
    effect on the limit of open files.
    """
    note = choose_blas()
    with file_limits_kept():
        importlib.import_module("mlx_lm.utils")
    return note


@cache
def choose_blas() -> str | None:
    """Put OpenBLAS in place of MLX's own BLAS on Linux CPUs and return one line that says what was chosen.

    The reference BLAS in MLX's CPU wheel is 14-22 times slower on prompts. Best called before MLX is
    imported. Returns None where there is nothing to do (macOS, CUDA builds). Only the first call acts;
    later ones return its line.
    """
    if sys.platform != "linux" or _cuda_build_installed():
        return None
    _limit_blas_threads(os.environ, usable_cpus())
    version = use_openblas(os.environ, Path(sys.prefix))
    if version is not None:
        return f"CPU: {version}"
    return "CPU without OpenBLAS: prompts are 14-22 times slower; `pip install scipy-openblas32` and restart the kernel"


def _limit_blas_threads(env: MutableMapping[str, str], num_cpus: int) -> None:
    """Give OpenBLAS, which counts a machine's processors and knows no quota, ``num_cpus`` threads unless the user did.

    Threads beyond a container's quota spin until it is used up, and all of them stand still.
    """
    if num_cpus < (os.cpu_count() or 1) and not any(env.get(name) for name in _THREAD_VARIABLES):
        env["OPENBLAS_NUM_THREADS"] = str(num_cpus)


def _cuda_build_installed() -> bool:
    for name in _CUDA_BUILDS:
        try:
            metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        return True
    return False


@contextmanager
def file_limits_kept() -> Iterator[None]:
    """Import mlx-lm inside this: its import lowers the process's limit of open files for good.

    A notebook kernel that serves clients needs its own limit, and only root could raise it again.
    """
    set_limit = resource.setrlimit
    resource.setrlimit = lambda *_: None
    try:
        yield
    finally:
        resource.setrlimit = set_limit


def describe_device() -> Device:
    """The device MLX uses by default. Imports MLX (see :func:`prepare_backend`)."""
    import mlx.core as mx

    if mx.default_device().type == mx.DeviceType.cpu:
        return Device("cpu", str(mx.device_info().get("device_name", "CPU")), cpu_memory_limit())
    info = mx.device_info()
    name = str(info.get("device_name", "GPU"))
    if mx.metal.is_available():
        return Device("metal", name, int(info["max_recommended_working_set_size"]))
    # What this process already holds is its own to plan with.
    free = int(info["free_memory"]) + mx.get_active_memory() + mx.get_cache_memory()
    return Device("cuda", name, min(free, int(info["total_memory"])))


def cpu_memory_limit(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may use: the least of physical memory and the limits of its cgroups."""
    return min([physical_memory(proc), *cgroup_limits(proc, cgroups)])


def physical_memory(proc: Path = Path("/proc")) -> int:
    """Bytes of memory in this machine."""
    meminfo = proc / "meminfo"
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemTotal:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        raise VMMagicError("this system does not say how much memory it has; give --device-memory") from None


def cgroup_limits(proc: Path, cgroups: Path) -> Iterator[int]:
    """Memory limits in bytes (cgroup v1 and v2) from this process's group up to the root."""
    for folder in _group_folders(proc, cgroups, "memory"):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            yield from _read_numbers(folder / name)


def usable_cpus(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Processors that this process may keep busy: the least of its affinity and the quotas of its cgroups."""
    counts = [len(os.sched_getaffinity(0))]
    for folder in _group_folders(proc, cgroups, "cpu"):
        v1 = (*_read_numbers(folder / "cpu.cfs_quota_us"), *_read_numbers(folder / "cpu.cfs_period_us"))
        for quota in (_read_numbers(folder / "cpu.max"), v1):
            if len(quota) == 2:  # microseconds, and of how many; without a quota there is only the second
                counts.append(max(1, quota[0] // quota[1]))
    return min(counts)


def _group_folders(proc: Path, cgroups: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's groups (cgroup v1 and v2), each with its parents; some may not be there."""
    membership = proc / "self" / "cgroup"
    if not membership.is_file():
        return
    for line in membership.read_text().splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0" and not controllers:
            yield from _upwards(cgroups, path)
            yield from _upwards(cgroups / "unified", path)
        elif controller in controllers.split(","):
            yield from _upwards(cgroups / controller, path)


def _upwards(root: Path, path: str) -> Iterator[Path]:
    """``path`` and its parents below ``root``; inside a container only the root itself may be there."""
    parts = [part for part in path.split("/") if part and part != ".."]
    for depth in range(len(parts), -1, -1):
        yield root.joinpath(*parts[:depth])


def _read_numbers(file: Path) -> tuple[int, ...]:
    """The numbers in ``file``; none stands for "max" or -1 (no limit), and none is in a file that is not there."""
    try:
        words = file.read_text().split()
    except OSError:
        return ()
    return tuple(int(word) for word in words if word.isdigit())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether MLX (or Python) could not allocate memory."""
    text = str(error).lower()
    words = ("bad_alloc", "malloc", "unable to allocate", "failed to allocate", "out of memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in text for word in words))


def active_memory() -> int:
    """Bytes of MLX arrays alive."""
    import mlx.core as mx

    return int(mx.get_active_memory())


def cache_memory() -> int:
    """Bytes that MLX holds for reuse."""
    import mlx.core as mx

    return int(mx.get_cache_memory())


def peak_memory() -> int:
    """Most bytes of MLX arrays alive at once since :func:`reset_peak_memory`."""
    import mlx.core as mx

    return int(mx.get_peak_memory())


def reset_peak_memory() -> None:
    """Start a new measurement for :func:`peak_memory`."""
    import mlx.core as mx

    mx.reset_peak_memory()


def clear_cache() -> None:
    """Give MLX's reusable buffers back to the system."""
    import mlx.core as mx

    mx.clear_cache()


_spare_streams: list[Any] = []
"""CPU streams of threads that are over."""


@contextmanager
def mlx_thread() -> Iterator[None]:
    """What a thread that uses MLX does inside this; at its end, all that was freed goes back to the system.

    MLX never ends the native thread, and with it the heap, behind a CPU stream: threads take over each other's.
    """
    import mlx.core as mx

    try:
        stream = _spare_streams.pop()
    except IndexError:
        stream = mx.new_thread_unsafe_stream(mx.cpu)
    mx.set_default_stream(stream)
    try:
        yield
    finally:
        gc.collect()
        mx.synchronize(stream)
        leave_thread()
        _spare_streams.append(stream)
        return_free_memory()


def leave_thread() -> None:
    """Finish and destroy the calling thread's streams; a thread that ends without this aborts the process at exit."""
    import mlx.core as mx

    mx.synchronize()
    mx.clear_cache()
    mx.clear_streams()


def return_free_memory() -> None:
    """Give the C library's free memory back to the system: all threads', with the end of the calling thread's heap.

    Where a heap ends, ``malloc_trim`` leaves up to 64 MB, and every new thread may come to another heap; freeing
    a block of 64 kB cuts the end off down to a threshold. Nothing happens but with glibc.
    """
    libc = ctypes.CDLL(None)
    if sys.platform != "linux" or not hasattr(libc, "malloc_trim"):
        return
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
    libc.mallopt(_TRIM_THRESHOLD, 0)
    libc.free(libc.malloc(1 << 16))
    libc.malloc_trim(0)
    # Where glibc's own adapting ends once a process has freed a large block; after the call above it adapts no more.
    libc.mallopt(_TRIM_THRESHOLD, 64 << 20)
    libc.mallopt(_MMAP_THRESHOLD, 32 << 20)


def resident_memory(proc: Path = Path("/proc")) -> int:
    """Bytes of this process in physical memory (on macOS the most it ever had)."""
    statm = proc / "self" / "statm"
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
