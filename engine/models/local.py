"""Models that are on this machine already: the Hugging Face cache, folders, GGUF files in them."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ModelLoadError
from engine.models.formats import FORMATS, format_of_kind
from engine.models.pypi import PACKAGE_MODELS
from engine.models.weight_format import CachedModel, WeightFormat

OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model on this machine: ``name`` as the user gave it, ``path`` its folder or file, ``kind`` its format's."""

    name: str
    path: Path
    kind: str

    @property
    def format(self) -> WeightFormat:
        """What reads its files."""
        return format_of_kind(self.kind)


def offline(env: Mapping[str, str]) -> bool:
    """Whether one of the hub's variables forbids the network."""
    return any(env.get(name, "").strip().lower() in ("1", "true", "yes", "on") for name in OFFLINE_VARIABLES)


def hub_cache() -> Path:
    """The Hugging Face cache folder, as ``HF_HUB_CACHE``, ``HF_HOME`` and ``XDG_CACHE_HOME`` say now.

    ``~`` and variables (``$HOME``) in them stand for what they name, as in the hub's own library.
    """
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return _expanded(os.environ[name])
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return _expanded(os.environ.get("HF_HOME") or str(Path(base, "huggingface"))) / "hub"


def _expanded(path: str) -> Path:
    return Path(os.path.expandvars(os.path.expanduser(path)))


def cached_models() -> list[CachedModel]:
    """Models that load without a download. Never raises: what cannot be read is left out."""
    packaged = [model for model in PACKAGE_MODELS.values() if model.fetched]
    found = [CachedModel(model.name, model.path, model.num_bytes, model.format.kind) for model in packaged]
    try:
        repos = sorted(hub_cache().glob("models--*"))
    except OSError:
        return found
    for folder in repos:
        try:
            found += _models_in(folder)
        except (OSError, ValueError, ModelLoadError):  # an unreadable or half-written entry is not a model
            continue
    return found


def cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """The snapshot folder of ``repo`` in the Hugging Face cache, complete or not."""
    folder = hub_cache() / ("models--" + repo.replace("/", "--"))
    return _snapshot(folder, revision) if folder.is_dir() else None


def snapshots(repo: str) -> dict[str, Path]:
    """The snapshot folders of ``repo`` in the cache, complete or not, by what ``--revision`` may call them.

    That is the name of a branch or tag where one points there, else the commit.
    """
    folder = hub_cache() / ("models--" + repo.replace("/", "--"))
    names: dict[str, str] = {}
    for reference in sorted(path for path in (folder / "refs").rglob("*") if path.is_file()):
        names.setdefault(reference.read_text(errors="replace").strip(), str(reference.relative_to(folder / "refs")))
    found = sorted(path for path in folder.glob("snapshots/*") if path.is_dir())
    return {names.get(path.name, path.name): path for path in found}


def _snapshot(folder: Path, revision: str | None) -> Path | None:
    reference = folder / "refs" / (revision or "main")
    commit = reference.read_text(errors="replace").strip() if reference.is_file() else revision
    if commit:
        snapshot = folder / "snapshots" / commit
        return snapshot if snapshot.is_dir() else None
    snapshots = [path for path in folder.glob("snapshots/*") if path.is_dir()]  # fetched by commit, never by branch
    return max(snapshots, key=lambda path: path.stat().st_mtime, default=None)


def _models_in(folder: Path) -> Iterator[CachedModel]:
    """The models of one cache entry, in every format."""
    snapshot = _snapshot(folder, None)
    if snapshot is None:
        return
    name = folder.name.removeprefix("models--").replace("--", "/")
    for one in reversed(FORMATS):
        yield from one.cached(name, snapshot)
