"""Compiled kernels on disk: a private folder in which a file that is not as it was written counts as not there."""

import contextlib
import hashlib
import os
import stat
import tempfile
import time
from pathlib import Path

_MAGIC = b"vm-magic kernel 1\n"
_SUFFIX = ".kernel"
_LEFT_OVER = ".writing-"
_LEFT_OVER_SECONDS = 3600
_MOST_BYTES = 128 << 20
"""A kernel takes 5 to 80 kB."""


class KernelStore:
    """Files named after their keys. Nothing here raises: what cannot be read is missing, what cannot be written is not.

    Several processes may share a folder without a lock: a file appears whole or not at all.
    """

    def __init__(self, folder: Path, most_bytes: int = _MOST_BYTES) -> None:
        self.folder = folder
        self._most_bytes = most_bytes

    def get(self, key: str) -> bytes | None:
        """What was put under ``key``; None too for a file of someone else's, or one cut short or altered."""
        try:
            content = _read_private(self._path(key))
        except OSError:
            return None
        start = len(_MAGIC) + hashlib.sha256().digest_size
        body = content[start:]
        if content[:start] != _MAGIC + _checksum(key, body):
            return None
        with contextlib.suppress(OSError):
            os.utime(self._path(key))  # those used last are kept longest
        return body

    def put(self, key: str, body: bytes) -> bool:
        """Keep ``body`` under ``key``, in place of what is there; False where that is not possible."""
        if not make_private(self.folder) or not replace_file(self._path(key), _MAGIC + _checksum(key, body) + body):
            return False
        self._trim()
        return True

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{_SUFFIX}"

    def _trim(self) -> None:
        """Remove what was used longest ago where the folder holds too much, and what killed processes left."""
        with contextlib.suppress(OSError):
            for path in self.folder.glob(f"{_LEFT_OVER}*"):
                if time.time() - path.stat().st_mtime > _LEFT_OVER_SECONDS:
                    path.unlink(missing_ok=True)
            found = [(path.stat().st_mtime, path.stat().st_size, path) for path in self.folder.glob(f"*{_SUFFIX}")]
            total = sum(size for _, size, _ in found)
            for _, size, path in sorted(found):
                if total <= self._most_bytes:
                    break
                path.unlink(missing_ok=True)
                total -= size


def make_private(folder: Path) -> bool:
    """Make ``folder`` this user's alone, where it is not; False for one of someone else's."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            return False
        if status.st_mode & 0o077:
            folder.chmod(0o700)
    except OSError:
        return False
    return True


def replace_file(path: Path, content: bytes) -> bool:
    """Write ``path``, readable for this user only, in one step; False where that is not possible."""
    try:
        descriptor, name = tempfile.mkstemp(prefix=_LEFT_OVER, dir=path.parent)
    except OSError:
        return False
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(name)
        return False
    return True


def _read_private(path: Path) -> bytes:
    """The content of a regular file that this user owns and nobody else may write; OSError for any other."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise PermissionError(f"{path} is not this user's own")
        return file.read()


def _checksum(key: str, body: bytes) -> bytes:
    """Of a file's body and of the name it stands under, so that files cannot change places."""
    return hashlib.sha256(key.encode() + b"\0" + body).digest()
