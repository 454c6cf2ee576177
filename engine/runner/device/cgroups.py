"""Control groups (v1 and v2) of this process on Linux: their limits of memory and processors."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NO_LIMIT = 2**60
"""Bytes; v1 writes a huge number where there is no limit."""


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """A control group with a limit in bytes; pages of files count as used there but are given up at once."""

    limit: int
    folder: Path
    usage_file: str
    file_pages: str

    def free(self) -> int:
        """Bytes that may still be taken in this group."""
        return self.limit - int((self.folder / self.usage_file).read_text()) + self._reclaimable()

    def _reclaimable(self) -> int:
        for line in (self.folder / "memory.stat").read_text().splitlines():
            if line.startswith(self.file_pages):
                return int(line.split()[1])
        return 0


_MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file "),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
)
"""Of v2 and v1: the limit, what is in use, and the line of ``memory.stat`` that counts pages of files."""


def memory_groups(proc: Path, cgroups: Path) -> Iterator[MemoryGroup]:
    """The groups, from this process's own up to the root, that have a limit and say what is in use."""
    for folder in _group_folders(proc, cgroups, "memory"):
        for limit_file, usage_file, file_pages in _MEMORY_FILES:
            if all((folder / name).is_file() for name in (usage_file, "memory.stat")):
                for limit in _read_numbers(folder / limit_file):
                    if limit < _NO_LIMIT:
                        yield MemoryGroup(limit, folder, usage_file, file_pages)


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
