"""What the limits of this process (``ulimit -v``, ``ulimit -d``) leave of memory on Linux. Imports no MLX."""

import resource
from dataclasses import dataclass
from pathlib import Path

from engine.errors import MemoryPlanError
from engine.params.sizes import size_text

RESERVED = 512 << 20
"""Bytes for what maps memory beside MLX's arrays: threads' stacks and heaps, libraries that load late. A load takes
about as much, and where a thread cannot start, MLX and OpenBLAS end the process."""
KEPT = 128 << 20
"""Bytes of it that stay aside once an engine runs."""
_LIMITS = (
    ("ulimit -v", resource.RLIMIT_AS, "VmSize:"),
    ("ulimit -d", resource.RLIMIT_DATA, "VmData:"),
)
"""What people call a limit, its number, and the line of ``/proc/self/status`` that counts towards it."""


@dataclass(frozen=True, slots=True)
class ProcessRoom:
    """Bytes that this process may still map, and the limit that says so."""

    num_bytes: int
    name: str
    limit: int

    def __str__(self) -> str:
        left, aside = size_text(max(0, self.num_bytes)), size_text(RESERVED)
        return f"`{self.name}` of {size_text(self.limit)} leaves {left}, of which {aside} are for threads and libraries"


def check_process_room(proc: Path = Path("/proc")) -> None:
    """Raise MemoryPlanError where a limit leaves too little to begin a load: a thread that cannot start ends all."""
    room = process_room(proc)
    if room is not None and room.num_bytes < RESERVED:
        raise MemoryPlanError(f"not enough memory to load a model: {room}; raise it to load one")


def has_limits() -> bool:
    """Whether this process has such a limit."""
    return any(resource.getrlimit(number)[0] != resource.RLIM_INFINITY for _, number, _ in _LIMITS)


def process_room(proc: Path = Path("/proc")) -> ProcessRoom | None:
    """The least that a limit leaves; None where there is no limit, or nothing counts towards it."""
    status = proc / "self" / "status"
    if not has_limits() or not status.is_file():
        return None
    used = {line.split()[0]: int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "kB" in line}
    found = [
        ProcessRoom(limit - used[line], name, limit)
        for name, number, line in _LIMITS
        for limit in [resource.getrlimit(number)[0]]
        if limit != resource.RLIM_INFINITY and line in used
    ]
    return min(found, key=lambda room: room.num_bytes, default=None)
