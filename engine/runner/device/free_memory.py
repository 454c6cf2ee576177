"""Bytes that this process may still take on its device, read anew each time: others take memory, too."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.runner.device.devices import Device, active_memory


@dataclass(frozen=True, slots=True)
class _Cgroup:
    """A control group with a limit in bytes; pages of files count as used there but are given up at once."""

    limit: int
    current: Path
    stat: Path
    file_pages: str

    def free(self) -> int:
        return self.limit - int(self.current.read_text()) + self._reclaimable()

    def _reclaimable(self) -> int:
        for line in self.stat.read_text().splitlines():
            if line.startswith(self.file_pages):
                return int(line.split()[1])
        return 0


class FreeMemory:
    """The least of what the device's limit, and on Linux CPUs the machine and the control groups, leave.

    Buffers that MLX keeps for reuse count as free.
    """

    def __init__(self, device: Device, proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> None:
        self.limit = device.memory_limit
        on_cpu = device.kind == "cpu"
        self._meminfo = proc / "meminfo" if on_cpu and (proc / "meminfo").is_file() else None
        self._cgroups = tuple(_limited_cgroups(proc, cgroups)) if on_cpu else ()

    def __call__(self) -> int:
        """Bytes; never below 0."""
        free = self.limit - active_memory()
        if self._meminfo is not None:
            free = min(free, _available(self._meminfo))
        for group in self._cgroups:
            free = min(free, group.free())
        return max(0, free)


def _available(meminfo: Path) -> int:
    """What the kernel says can be taken without swapping."""
    with meminfo.open(encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise OSError(f"{meminfo} has no MemAvailable")


def _limited_cgroups(proc: Path, cgroups: Path) -> Iterator[_Cgroup]:
    """The control groups (v1 and v2), from this process's own up to the root, that have a limit."""
    membership = proc / "self" / "cgroup"
    for line in membership.read_text().splitlines() if membership.is_file() else ():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        parts = [part for part in path.split("/") if part and part != ".."]
        for depth in range(len(parts), -1, -1):
            if hierarchy == "0" and not controllers:
                for root in (cgroups, cgroups / "unified"):
                    yield from _limited(root.joinpath(*parts[:depth]), "memory.max", "memory.current", "inactive_file ")
            elif "memory" in controllers.split(","):
                folder = (cgroups / "memory").joinpath(*parts[:depth])
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
                yield from _limited(folder, *names)


def _limited(folder: Path, limit: str, current: str, file_pages: str) -> Iterator[_Cgroup]:
    files = folder / limit, folder / current, folder / "memory.stat"
    if not all(file.is_file() for file in files):
        return
    text = files[0].read_text().strip()
    if text.isdigit() and int(text) < 2**60:  # v1 writes a huge number for none
        yield _Cgroup(int(text), files[1], files[2], file_pages)
