"""Which model this is, in a few facts that mean the same on another machine: no folders, no user names."""

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from engine.model_card.origin import snapshot_commit
from engine.model_card.privacy import shareable
from engine.models.local import ResolvedModel
from engine.models.pypi import PACKAGE_MODELS

_EDGE = 1 << 16
"""Bytes read at each end of a weight file: the header, and numbers of its last tensor."""
_WHOLE = 1 << 22
"""Files up to this size are read whole."""
_TOLD_BY = ("*.json", "*.jinja", "*.model", "*.txt")
_WEIGHTS = ("*.safetensors", "*.gguf", "*.npz")


def plain_name(name: str) -> str:
    """What a user called a model, without folders of this machine: ``org/name`` stays, a path keeps its last part."""
    base = name.partition(":")[0]
    is_path = base.startswith(("/", "~", ".")) or base.count("/") > 1 or Path(base).exists()
    return shareable(Path(name).name if is_path else name)


@lru_cache(maxsize=8)
def model_identity(resolved: ResolvedModel) -> dict[str, str | int]:
    """Where a model came from (repository and commit, or package), its format, its size, and a hash of its files.

    ``fingerprint`` tells models apart by their small files and by the ends of their weight files: equal ones are the
    same model but for an edit in the middle of a file. What cannot be read is left out.
    """
    path = resolved.path
    found: dict[str, str | int] = {"format": resolved.kind}
    packaged, commit = PACKAGE_MODELS.get(resolved.name), snapshot_commit(path)
    if packaged is not None:
        found["package"] = " ".join(wheel.requirement for wheel in packaged.wheels)
    elif commit is not None:
        repo = next(part.parent.parent for part in (path, *path.parents) if part.name == commit)
        found["repository"], found["commit"] = repo.name.removeprefix("models--").replace("--", "/"), commit
    try:
        files = sorted(_files(path), key=lambda file: file.name)
        found["files"] = ", ".join(shareable(file.name) for file in files if file.suffix in _SUFFIXES)[:200]
        found["bytes"] = sum(file.stat().st_size for file in files)
        found["fingerprint"] = _fingerprint(files)
    except OSError:
        pass
    return found


_SUFFIXES = tuple(pattern[1:] for pattern in _WEIGHTS)


def _files(path: Path) -> Iterable[Path]:
    if not path.is_dir():
        return [path]
    return {file for pattern in (*_TOLD_BY, *_WEIGHTS) for file in path.glob(pattern) if file.is_file()}


def _fingerprint(files: Iterable[Path]) -> str:
    told = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        told.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as opened:
            if size <= _WHOLE:
                told.update(opened.read(_WHOLE))
                continue
            told.update(opened.read(_EDGE))
            opened.seek(-_EDGE, 2)
            told.update(opened.read(_EDGE))
    return told.hexdigest()[:16]
