"""Other processes of this user that hold a model on this machine: each says so in a small file, with sizes.

The files lie in a folder that only the user may enter, and say what is planned, not what is talked about. A file
counts while its process holds a lock on it, which ends with the process however that ends: process ids would say
nothing across containers, and are used again. What is stale or cannot be read is left out and nothing here is ever
an error: where there is no such folder, or no locks, nobody is seen.
"""

import fcntl
import json
import logging
import os
import secrets
import socket
import stat
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

from engine.format.text import shortened
from engine.models.pypi import cache_folder
from engine.params.engine_args import DEFAULT_MEMORY_FRACTION
from engine.params.sizes import plain_size
from engine.runner.device.devices import Device, describe_device
from engine.runner.device.memory import active_memory

logger = logging.getLogger("engine")
_MOST_BYTES, _MOST_CHARACTERS = 4096, 80
"""Of a file, and of a name in it."""
_SETTLED = 10.0
"""Seconds after which a file that nobody holds is stale: until then its owner may not have locked it yet."""
_OLD = 30.0
"""Seconds from which what is in use is written again with the next request."""
_FORGOTTEN = 7 * 86_400.0
"""Seconds after which a file of another machine (a home that machines share) is stale."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What one model takes, in bytes: ``planned`` at most, ``in_use`` when it was written.

    ``device`` tells devices apart whose memory is not shared; ``notebook`` is "" where the process knows of none.
    """

    model: str
    planned: int
    in_use: int
    device: str
    port: int | None = None
    notebook: str = ""

    @classmethod
    def read(cls, text: bytes) -> Self:
        """What a file says. Raises ValueError for what no process of ours wrote, or one on another machine."""
        values = json.loads(text)
        if not isinstance(values, dict) or values.pop("machine", None) != _machine():
            raise ValueError("of another machine, or nothing of ours")
        known = {field.name for field in fields(cls)}
        held = cls(**{name: value for name, value in values.items() if name in known})
        if not all(isinstance(size, int) and 0 <= size < 1 << 60 for size in (held.planned, held.in_use)):
            raise ValueError("not sizes")
        if not all(isinstance(name, str) for name in (held.model, held.device, held.notebook)):
            raise ValueError("not names")
        if not (held.port is None or isinstance(held.port, int)):
            raise ValueError("not a port")
        return held

    def __str__(self) -> str:
        port = f"port {self.port}" if self.port else ""
        return ", ".join(_printable(name) for name in (self.notebook, self.model, port) if name)


class Notice:
    """This process's file about one model, until :meth:`close` or the end of the process.

    It is made where MLX may be asked for its device; written and closed from any thread.
    """

    def __init__(self) -> None:
        self._device = _device_key(describe_device())
        self._name = f"{os.getpid()}-{secrets.token_hex(4)}.json"
        self._lock = threading.Lock()
        self._file: int | None = None
        self._closed = False
        self._written = 0.0
        _notices.add(self)

    @property
    def is_old(self) -> bool:
        """Whether what is in use may well have changed since it was written."""
        return time.monotonic() - self._written > _OLD

    def write(self, model: str, planned: int, port: int | None) -> None:
        """Say from now on that ``model`` may take ``planned`` bytes, and has ``port``; with what is in use now.

        The file is replaced whole, its lock with it.
        """
        held = Held(
            model=_printable(model),
            planned=planned,
            in_use=active_memory(),
            device=self._device,
            port=port,
            notebook=_printable(Path(os.environ.get("JPY_SESSION_NAME", "")).name),
        )
        with self._lock:
            if self._closed:
                return
            self._written = time.monotonic()
            try:
                with _folder(make=True) as folder:
                    before, self._file = self._file, _write_locked(folder, self._name, held)
                    if before is not None:
                        os.close(before)
            except OSError as error:
                logger.debug("other processes are not told of this model: %s", error)

    def close(self) -> None:
        """Take the file away. Safe to repeat."""
        with self._lock:
            self._closed = True
            if self._file is None:
                return
            try:
                with suppress(OSError), _folder() as folder:
                    os.unlink(self._name, dir_fd=folder)
            finally:  # an interrupt too
                file, self._file = self._file, None
                os.close(file)

    @property
    def name(self) -> str:
        """The file's."""
        return self._name

    def leave_to_parent(self) -> None:
        """In a fork's child: let go of the file, which is the parent's."""
        self._lock, self._closed = threading.Lock(), True
        file, self._file = self._file, None
        if file is not None:
            os.close(file)


_notices: "weakref.WeakSet[Notice]" = weakref.WeakSet()


def _leave_all() -> None:
    for notice in _notices:
        notice.leave_to_parent()


os.register_at_fork(after_in_child=_leave_all)


def _device_key(device: Device) -> str:
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] if device.kind == "cuda" else ""
    return f"{device.kind} {first}".strip()


def neighbours() -> list[Held]:
    """What other processes of this user on this machine hold, the largest plan first. Clears away what is stale."""
    found = []
    own = {notice.name for notice in _notices}
    try:
        with _folder() as folder:
            for name in os.listdir(folder):
                if name not in own and (held := _look(folder, name)) is not None:
                    found.append(held)
    except OSError as error:
        logger.debug("other processes are not seen: %s", error)
    return sorted(found, key=lambda held: -held.planned)


def neighbours_line(planned: int, device: Device, others: Sequence[Held] | None = None) -> str | None:
    """What others hold of ``device`` beside the ``planned`` bytes here, in one line; None where nobody does."""
    key = _device_key(device)
    beside = [held for held in (neighbours() if others is None else others) if held.device == key]
    if not beside:
        return None
    theirs, in_use = sum(held.planned for held in beside), sum(held.in_use for held in beside)
    # Of a GPU's memory, CUDA tells what is free: what the others hold is missing in it.
    total = device.memory_limit + (in_use if device.kind == "cuda" else 0)
    who = "; ".join(map(str, beside))
    subject = f"{len(beside)} others ({who}) plan" if len(beside) > 1 else f"{_kind(beside[0])} ({who}) plans"
    sizes = f"up to {plain_size(theirs)} of this machine's {plain_size(total)}, {plain_size(in_use)} in use"
    if theirs + planned <= total:
        return f"{subject} {sizes}"
    return f"{subject} {sizes}: together more than there is; {_fix(theirs / total, len(beside))}"


def _kind(held: Held) -> str:
    return "Another notebook" if held.notebook else "Another program"


def _fix(share: float, number: int) -> str:
    """A fraction with which there is enough, where ``number`` others plan with ``share`` of all memory."""
    left, each = int(100 * (1 - share)) / 100, int(100 * DEFAULT_MEMORY_FRACTION / (number + 1)) / 100
    if left >= each:
        return f"--gpu-memory-utilization {left:g} fits beside"
    return f"--gpu-memory-utilization {max(each, 0.01):g} in each shares it"


def _printable(name: str) -> str:
    return shortened("".join(char for char in name if char.isprintable()), _MOST_CHARACTERS)


def _machine() -> str:
    """This machine since it was started; containers on it are the same."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


@contextmanager
def _folder(*, make: bool = False) -> Iterator[int]:
    """The folder as a descriptor. Raises OSError where it is not there, or not this user's alone."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    path = (Path(runtime, "vm-magic") if os.path.isabs(runtime) else cache_folder().parent) / "in-use"
    if make:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(folder)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise PermissionError(f"{path} is not this user's alone")
        yield folder
    finally:
        os.close(folder)


def _write_locked(folder: int, name: str, held: Held) -> int:
    """The descriptor of a new file ``name``, which is locked before it has that name."""
    temporary = f".{name}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    file = os.open(temporary, flags, 0o600, dir_fd=folder)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.write(file, json.dumps(asdict(held) | {"machine": _machine()}).encode())
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        os.close(file)
        with suppress(OSError):
            os.unlink(temporary, dir_fd=folder)
        raise
    return file


def _look(folder: int, name: str) -> Held | None:
    """What the file ``name`` says, if its process lives. Links and what is no file of this user are left as they are.

    Raises nothing: a file may go or be replaced at any moment.
    """
    with suppress(OSError, ValueError, TypeError, RecursionError):
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                return None
            age = time.time() - status.st_mtime
            text = os.read(file, _MOST_BYTES)
            if name.endswith(".json") and not name.startswith(".") and _is_locked(file):
                return Held.read(text)
            if age > (_SETTLED if _of_this_machine(text) else _FORGOTTEN) and not _is_locked(file):
                now = os.stat(name, dir_fd=folder, follow_symlinks=False)
                if (now.st_ino, now.st_dev) == (status.st_ino, status.st_dev):
                    os.unlink(name, dir_fd=folder)
        finally:
            os.close(file)
    return None


def _is_locked(file: int) -> bool:
    """Whether a living process holds the file. Raises OSError where files cannot be locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


def _of_this_machine(text: bytes) -> bool:
    """Whether what a file says comes from here; also what nobody can read."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return True
    return not isinstance(values, dict) or values.get("machine", _machine()) == _machine()
