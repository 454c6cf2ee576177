"""Models that are on this machine already: the Hugging Face cache, folders, GGUF files in them."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.errors import ModelLoadError, ModelNotFoundError
from engine.models.pypi import PACKAGE_MODELS

Kind = Literal["folder", "gguf"]
Part = Literal["weights", "config", "tokenizer"]
"""What of a model is needed: everything, ``config.json`` alone (for a plan), or its tokenizer."""
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")


_QUANT = re.compile(r"(?:^|[-._])((?:I?Q\d|TQ\d|BF16|F16|FP16|F32|MXFP4)\w*)(?=[-.]|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model on this machine: ``name`` as the user gave it, ``path`` a folder or a ``.gguf`` file."""

    name: str
    path: Path
    kind: Kind


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model that loads without a download; ``bytes`` is the size of its weights."""

    name: str
    path: Path
    bytes: int
    kind: Kind


def offline(env: Mapping[str, str]) -> bool:
    """Whether one of the hub's variables forbids the network."""
    return any(env.get(name, "").strip().lower() in ("1", "true", "yes", "on") for name in _OFFLINE_VARIABLES)


def hub_cache() -> Path:
    """The Hugging Face cache folder, as ``HF_HUB_CACHE``, ``HF_HOME`` and ``XDG_CACHE_HOME`` say now."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or str(Path(base, "huggingface"))
    return Path(home).expanduser() / "hub"


def cached_models() -> list[CachedModel]:
    """Models that load without a download. Never raises: what cannot be read is left out."""
    packaged = [model for model in PACKAGE_MODELS.values() if model.fetched]
    found = [CachedModel(model.name, model.path, model.num_bytes, "gguf") for model in packaged]
    try:
        repos = sorted(hub_cache().glob("models--*"))
    except OSError:
        return found
    for folder in repos:
        try:
            found += _models_in(folder)
        except (OSError, ValueError):  # an unreadable or half-written entry is no model
            continue
    return found


def pick_gguf(model: str, names: list[str], quant: str) -> str:
    """The one GGUF file name that carries ``quant`` (or the only one). Errors name what there is."""
    files = [name for name in names if not Path(name).name.lower().startswith("mmproj")]
    mark = re.compile(rf"(?<![A-Za-z0-9]){re.escape(quant)}(?![A-Za-z0-9_])", re.IGNORECASE)
    matching = [name for name in files if not quant or mark.search(Path(name).name)]
    if len(matching) > 1 and all(re.search(r"-\d{5}-of-\d{5}", name) for name in matching):
        raise ModelLoadError(f"{model}: {matching[0]} is split; join the parts with `llama-gguf-split --merge` first")
    if len(matching) == 1:
        return matching[0]
    base = model.removesuffix(f":{quant}") if quant else model
    choices = ", ".join(f"{base}:{name}" for name in sorted({_quant_of(file) for file in files})) or "none"
    problem = f"{'several' if matching else 'no'} GGUF files{f' of {quant}' if quant else ''}"
    raise ModelNotFoundError(f"{model}: {problem}; there are: {choices}")


def missing_shards(folder: Path) -> list[str]:
    """Weight files that the safetensors index names and ``folder`` lacks; also when there are none at all."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
        return sorted(name for name in names if not (folder / name).is_file())
    return [] if any(folder.glob("model*.safetensors")) else ["model.safetensors"]


def _cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """The snapshot folder of ``repo`` in the Hugging Face cache, complete or not."""
    folder = hub_cache() / ("models--" + repo.replace("/", "--"))
    return _snapshot(folder, revision) if folder.is_dir() else None


def _snapshot(folder: Path, revision: str | None) -> Path | None:
    reference = folder / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    if commit:
        snapshot = folder / "snapshots" / commit
        return snapshot if snapshot.is_dir() else None
    snapshots = [path for path in folder.glob("snapshots/*") if path.is_dir()]  # fetched by commit, never by branch
    return max(snapshots, key=lambda path: path.stat().st_mtime, default=None)


def _models_in(folder: Path) -> Iterator[CachedModel]:
    """The models of one cache entry: its safetensors, or each of its GGUF files."""
    snapshot = _snapshot(folder, None)
    if snapshot is None:
        return
    name = folder.name.removeprefix("models--").replace("--", "/")
    if (snapshot / "config.json").is_file() and not missing_shards(snapshot):
        size = sum(file.stat().st_size for file in snapshot.glob("model*.safetensors"))
        yield CachedModel(name, snapshot, size, "folder")
    ggufs = [file for file in sorted(snapshot.rglob("*.gguf")) if not file.name.lower().startswith("mmproj")]
    alone = len(ggufs) == 1 and not (snapshot / "config.json").is_file()
    for file in ggufs:
        yield CachedModel(name if alone else f"{name}:{_quant_of(file.name)}", file, file.stat().st_size, "gguf")


def _quant_of(name: str) -> str:
    """The quantization in a GGUF file's name (``Q4_K_M``), or its stem."""
    marks = _QUANT.findall(Path(name).name.removesuffix(".gguf"))
    return str(marks[-1]) if marks else Path(name).stem
