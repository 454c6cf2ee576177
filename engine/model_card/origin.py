"""Where a model is: its format, its commit on the hub, its files, its terms."""

from collections.abc import Iterator
from pathlib import Path

from engine.model_card.card import Fact
from engine.model_card.model_files import ModelFiles
from engine.models.pypi import PACKAGE_MODELS
from engine.params.sizes import size_text

_NOTED = (
    "config.json",
    "generation_config.json",
    "hf_quant_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
)
"""Files that are named with their sizes; weights are counted elsewhere."""


def origin(files: ModelFiles) -> Iterator[Fact]:
    """What the model is called, and where it comes from."""
    path = files.resolved.path
    packaged = PACKAGE_MODELS.get(files.resolved.name)
    if packaged is not None:
        yield Fact("from", f"the Python package index: {packaged.requirement}", "built in")
    elif (commit := snapshot_commit(path)) is not None:
        yield Fact("from", "a snapshot of the hub", "the Hugging Face cache")
        yield from _revision(path, commit)
    else:
        yield Fact("from", "this machine", "listing")
    yield Fact("format", files.resolved.kind, "config.json" if files.is_folder else path.name)
    if packaged is not None and packaged.terms:
        yield Fact("terms", packaged.terms, "built in")
    if files.gguf is not None and (licence := files.gguf.metadata.get("general.license")):
        yield Fact("licence", str(licence), f"{path.name}: general.license")
    sizes = [(name, files.folder / name) for name in _NOTED if files.has(name)]
    if not files.is_folder:
        sizes = [(path.name, path)]
    named = tuple(f"{name} {size_text(file.stat().st_size)}" for name, file in sizes)
    if named:
        yield Fact("files", named, "listing")
    code = tuple(sorted(file.name for file in files.folder.glob("*.py"))) if files.is_folder else ()
    if code:
        yield Fact("Python files", code, "listing; none is run here")


def snapshot_commit(path: Path) -> str | None:
    """The commit of a snapshot in the Hugging Face cache, by where it lies."""
    for part in (path, *path.parents):
        if part.parent.name == "snapshots" and part.parent.parent.name.startswith("models--"):
            return part.name
    return None


def _revision(path: Path, commit: str) -> Iterator[Fact]:
    repo = next(part.parent.parent for part in (path, *path.parents) if part.name == commit)
    named = tuple(
        sorted(
            str(file.relative_to(repo / "refs"))
            for file in (repo / "refs").rglob("*")
            if file.is_file() and file.read_text(encoding="utf-8").strip() == commit
        )
    )
    yield Fact("repository", repo.name.removeprefix("models--").replace("--", "/"), "the Hugging Face cache")
    yield Fact("commit", commit, f"refs: {', '.join(named)}" if named else "no branch names it here")
