"""The device that MLX computes on: its kind, its memory, and on Linux CPUs a fast BLAS before MLX loads.

Importing this module imports neither MLX nor a BLAS, so that :func:`choose_blas` can come first.
"""

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
from typing import Literal

from engine.errors import VMMagicError
from engine.runner.device.blas import use_openblas
from engine.runner.device.cgroups import cgroup_limits, usable_cpus
from engine.runner.device.rlimits import RESERVED, process_room

DeviceKind = Literal["metal", "cuda", "cpu"]
_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "OMP_NUM_THREADS")
"""What OpenBLAS reads when it loads."""
_CUDA_BUILDS = ("mlx-cuda-12", "mlx-cuda-13", "mlx-cuda")


@dataclass(frozen=True, slots=True)
class Device:
    """Where MLX computes. ``memory_limit`` is in bytes: what this process can hope to use on it."""

    kind: DeviceKind
    name: str
    memory_limit: int
    limited_by: str = ""
    """For people: which limit of this process leaves so little, if one does."""

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
    if sys.platform != "linux" or cuda_build_installed():
        return None
    _limit_blas_threads(os.environ, usable_cpus())
    version = use_openblas(os.environ, Path(sys.prefix))
    if version is not None:
        return f"CPU: {version}"
    return "CPU without OpenBLAS: prompts are 14-22 times slower; `pip install scipy-openblas32` and restart the kernel"


def _limit_blas_threads(env: MutableMapping[str, str], num_cpus: int) -> None:
    """Give OpenBLAS, which counts a machine's processors and ignores quotas, ``num_cpus`` threads unless the user did.

    Threads beyond a container's quota spin until it is used up, and all of them stand still.
    """
    if num_cpus < (os.cpu_count() or 1) and not any(env.get(name) for name in _THREAD_VARIABLES):
        env["OPENBLAS_NUM_THREADS"] = str(num_cpus)


def cuda_build_installed() -> bool:
    """Whether MLX here is one that computes with CUDA."""
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
        name = str(mx.device_info().get("device_name", "CPU"))
        return limited_cpu(name, mx.get_active_memory() + mx.get_cache_memory())
    info = mx.device_info()
    name = str(info.get("device_name", "GPU"))
    if mx.metal.is_available():
        return Device("metal", name, int(info["max_recommended_working_set_size"]))
    # What this process already holds is its own to plan with.
    free = int(info["free_memory"]) + mx.get_active_memory() + mx.get_cache_memory()
    return Device("cuda", name, min(free, int(info["total_memory"])))


def limited_cpu(name: str, held: int, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> Device:
    """The CPU, with the least of :func:`cpu_memory_limit` and what ``ulimit`` leaves beside the rest of the process.

    ``held``: bytes that MLX has mapped here already, which are its own to plan with.
    """
    most, room = cpu_memory_limit(proc, cgroups), process_room(proc)
    left = most if room is None else max(0, room.num_bytes - RESERVED + held)
    if room is None or left >= most:
        return Device("cpu", name, most)
    return Device("cpu", name, left, f"{room}; raise it for more")


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
