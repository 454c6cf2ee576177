"""Memory of this process on its device: what MLX holds, what may still be taken, and giving it back.

Importing this module does not import MLX.
"""

from pathlib import Path

from engine.runner.device.cgroups import memory_groups
from engine.runner.device.devices import Device
from engine.runner.device.rlimits import KEPT, has_limits, process_room


class FreeMemory:
    """The least of what the device's limit, and on Linux CPUs the machine, the control groups and ``ulimit``, leave.

    Buffers that MLX keeps for reuse count as free.
    """

    def __init__(self, device: Device, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> None:
        self.limit = device.memory_limit
        on_cpu = device.kind == "cpu"
        self._meminfo = proc / "meminfo" if on_cpu and (proc / "meminfo").is_file() else None
        self._proc = proc if on_cpu and has_limits() else None
        self._cgroups = tuple(memory_groups(proc, cgroups)) if on_cpu else ()

    def __call__(self) -> int:
        """Bytes; never below 0."""
        free = self.limit - active_memory()
        if self._meminfo is not None:
            free = min(free, _available(self._meminfo))
        for group in self._cgroups:
            free = min(free, group.free())
        if self._proc is not None and (room := process_room(self._proc)) is not None:
            free = min(free, room.num_bytes - KEPT + cached_memory())
        return max(0, free)


def _available(meminfo: Path) -> int:
    """What the kernel says can be taken without swapping."""
    with meminfo.open(encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise OSError(f"{meminfo} has no MemAvailable")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether MLX (or Python) could not allocate memory."""
    text = str(error).lower()
    words = ("bad_alloc", "malloc", "unable to allocate", "failed to allocate", "out of memory")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in text for word in words))


def active_memory() -> int:
    """Bytes of MLX arrays alive."""
    import mlx.core as mx

    return int(mx.get_active_memory())


def cached_memory() -> int:
    """Bytes of freed arrays that MLX keeps for reuse."""
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
