"""What a model's tokenizer is, and which tokens end a reply, each with the files that say so."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.errors import ModelLoadError
from engine.model_card.card import Fact
from engine.model_card.model_files import ModelFiles, as_mapping
from engine.models.resolve import resolve
from engine.models.weight_format import TOKENIZER_FILES, read_json
from engine.text.tokens.folder_tokenizer import read_tokenizer_file
from engine.text.tokens.tokenizer import Tokenizer, load_tokenizer

_GENERATION = "generation_config.json"
_GGML = "tokenizer.ggml."
_GGML_NAMES = {"unk": "unknown", "sep": "seperator", "pad": "padding"}
"""Special tokens that GGUF's keys call otherwise, one of them so spelled."""
_SPECIAL_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_HIGHEST = 12
"""More end tokens than this are counted, not listed."""


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer, and what its files are called in a card. ``folder`` None: all is in ``file``."""

    tokenizer: Tokenizer
    file: str
    folder: Path | None

    def named(self, key: str) -> str:
        """Where an entry such as ``eos_token`` stands."""
        if self.folder is None:
            name = key.removesuffix("_token")
            return f"{self.file}: {_GGML}{_GGML_NAMES.get(name, name)}_token_id"
        for name in _SPECIAL_FILES:
            if key in self._keys[name]:
                return f"{name}: {key}"
        return f"{self.file}: {key}"

    @cached_property
    def _keys(self) -> dict[str, frozenset[str]]:
        """What the files of special tokens name."""
        return {name: _keys(self.folder / name) for name in _SPECIAL_FILES} if self.folder else {}


def read_tokenizer(files: ModelFiles) -> TokenizerFiles | None:
    """The tokenizer that a load would use. Files that are missing or broken are a problem, and then there is none."""
    if files.args.tokenizer is None and files.is_folder and not any(map(files.has, TOKENIZER_FILES)):
        files.problem(f"no tokenizer ({', '.join(TOKENIZER_FILES)}): give one with --tokenizer")
        return None
    # End tokens are read apart, so that a broken configuration does not hide the tokenizer.
    alone = replace(files.args, override_generation_config={"eos_token_id": 0})
    tokenizer = files.attempt("the tokenizer", lambda: load_tokenizer(files.resolved, alone))
    if tokenizer is None and files.args.tokenizer is None and files.has("tokenizer.json"):
        tokenizer = files.attempt("tokenizer.json", lambda: _bare_tokenizer(files.folder / "tokenizer.json"))
    if tokenizer is None:
        return None
    if files.args.tokenizer is not None:
        path = resolve(files.args.tokenizer, part="tokenizer").path
        return TokenizerFiles(tokenizer, "--tokenizer", path if path.is_dir() else None)
    if not files.is_folder:
        return TokenizerFiles(tokenizer, files.resolved.path.name, None)
    first = next(name for name in TOKENIZER_FILES if files.has(name))
    return TokenizerFiles(tokenizer, first, files.folder)


def _bare_tokenizer(path: Path) -> Tokenizer:
    """What ``tokenizer.json`` says alone, where a file beside it cannot be read."""
    return Tokenizer(read_tokenizer_file(path))


def tokenizer(files: ModelFiles, read: TokenizerFiles, rows: Fact | None) -> Iterator[Fact]:
    """Its kind, its vocabulary beside the embedding's ``rows``, what it adds to a text, its special tokens."""
    hf = read.tokenizer.hf
    if (kind := read.tokenizer.config.get("tokenizer_class")) is not None:
        yield Fact("class", str(kind), read.named("tokenizer_class"))
    if read.folder is not None and (taken := read.tokenizer.sources.get("class")) is not None:
        yield Fact("taken as", taken, f"the class that transformers takes; {read.tokenizer.sources['tokenizer']}")
    yield Fact("kind", type(hf.model).__name__, _kind_source(read))
    if files.gguf is not None and (pre := files.gguf.metadata.get(f"{_GGML}pre")):
        yield Fact("pre-tokenizer", str(pre), f"{read.file}: {_GGML}pre")
    elif hf.pre_tokenizer is not None:
        yield Fact("pre-tokenizer", type(hf.pre_tokenizer).__name__, read.file)
    added = hf.get_added_tokens_decoder()
    special = sum(token.special for token in added.values())
    total = read.tokenizer.vocab_size
    yield Fact("vocabulary", total, f"{read.file}: {len(added)} of them added, {special} special")
    if rows is not None:
        yield rows
        highest = max((total - 1, *added))
        if isinstance(rows.value, int) and highest >= rows.value:
            files.problem(
                f"{read.file} has token ids up to {highest}, and the embedding has {rows.value} rows ({rows.source})"
            )
    yield from _beginning(files, read)
    yield from _special(files, read)


def end_tokens(files: ModelFiles, read: TokenizerFiles | None, rows: Fact | None) -> Iterator[Fact]:
    """Each id that ends a reply, its text, and every file that names it."""
    named = named_ends(files, read)
    sources: dict[int, list[str]] = {}
    for source, ids in named.items():
        for token_id in ids:
            sources.setdefault(token_id, []).append(source)
    for token_id in sorted(sources)[:_HIGHEST]:
        text = None if read is None else read.tokenizer.hf.id_to_token(token_id)
        shown = (
            "without a tokenizer"
            if read is None
            else "not in the vocabulary"
            if text is None
            else json.dumps(text, ensure_ascii=False)
        )
        yield Fact(f"id {token_id}", shown, "; ".join(sources[token_id]))
        _check_end(files, read, token_id, text, rows, sources[token_id][0])
    if len(sources) > _HIGHEST:
        yield Fact("more", len(sources) - _HIGHEST, "; ".join(named))
    if not sources:
        files.problem("no file names an end token: a reply would end at its limit only")
    elif files.gguf is None and len({tuple(ids) for ids in named.values()}) > 1:
        said = "; ".join(f"{source} {', '.join(map(str, ids))}" for source, ids in named.items())
        files.remark(f"end tokens differ ({said}): any of them ends a reply")


def _check_end(
    files: ModelFiles, read: TokenizerFiles | None, token_id: int, text: str | None, rows: Fact | None, source: str
) -> None:
    limit = rows.value if rows is not None and isinstance(rows.value, int) else None
    if limit is not None and not 0 <= token_id < limit:
        files.problem(f"end token {token_id} ({source}) is out of the model's vocabulary of {limit}")
    elif read is not None and text is None:
        files.remark(f"end token {token_id} ({source}) is no token of the tokenizer")


def named_ends(files: ModelFiles, read: TokenizerFiles | None) -> dict[str, list[int]]:
    """Ids by where they are named, as a load reads them."""
    override = files.args.override_generation_config.get("eos_token_id")
    if override is not None:
        return {"--override-generation-config": _ids(override)}
    if files.gguf is not None:
        return _gguf_ends(files)
    found = {one.source: _ids(one.value) for one in files.words.all("eos_token_id")}
    if (own := files.json(_GENERATION).get("eos_token_id")) is not None:
        found[f"{_GENERATION}: eos_token_id"] = _ids(own)
    for source, ids in found.items():
        if not ids:
            files.problem(f"{source} is neither a token id nor a list of them")
    if read is not None and (text := read.tokenizer.eos_token) is not None:
        token_id = read.tokenizer.hf.token_to_id(text)
        if token_id is not None:
            found[read.named("eos_token")] = [token_id]
    return {source: ids for source, ids in found.items() if ids}


def _gguf_ends(files: ModelFiles) -> dict[str, list[int]]:
    assert files.gguf is not None, "asked of a GGUF file"
    name, metadata = files.resolved.path.name, files.gguf.metadata
    found = {
        f"{name}: {_GGML}{kind}_token_id": _ids(metadata[f"{_GGML}{kind}_token_id"])
        for kind in ("eos", "eot", "eom")
        if f"{_GGML}{kind}_token_id" in metadata
    }
    said = {token_id for ids in found.values() for token_id in ids}
    if others := sorted(files.gguf.end_token_ids() - said):
        found[f"{name}: control tokens that end a turn by their names"] = others
    return found


def _ids(value: Any) -> list[int]:
    """Token ids of an entry, which may be one or a list."""
    values = value if isinstance(value, list) else [value]
    return sorted({one for one in values if isinstance(one, int) and not isinstance(one, bool)})


def _beginning(files: ModelFiles, read: TokenizerFiles) -> Iterator[Fact]:
    """What is added to a text: ids around those that the text alone gives."""
    alone = read.tokenizer.encode("a", add_special_tokens=False)
    whole = read.tokenizer.encode("a")
    place = next((i for i in range(len(whole)) if whole[i : i + len(alone)] == alone), 0)
    before, behind = whole[:place], whole[place + len(alone) :]
    parts = [f"{_texts(read, before)} before"] * bool(before) + [f"{_texts(read, behind)} behind"] * bool(behind)
    yield Fact("adds to a text", " and ".join(parts) or "nothing", f"{read.file}: its post-processor")
    wanted, bos = read.tokenizer.config.get("add_bos_token"), read.tokenizer.named_tokens.get("bos_token")
    if isinstance(wanted, bool) and bos is not None and wanted != (bos in map(read.tokenizer.hf.id_to_token, before)):
        files.remark(
            f"{read.named('add_bos_token')} is {str(wanted).lower()}, and {read.file} "
            f"{'adds none' if wanted else 'adds one'}: the latter counts"
        )


def _special(files: ModelFiles, read: TokenizerFiles) -> Iterator[Fact]:
    """Special tokens by name, those of a chat first; a name without a token in the vocabulary is noted."""
    named = read.tokenizer.named_tokens
    for name in sorted(named, key=lambda name: (name not in ("bos_token", "eos_token"), name)):
        token_id = read.tokenizer.hf.token_to_id(named[name])
        text = json.dumps(named[name], ensure_ascii=False)
        yield Fact(
            name, f"{text}, {'not in the vocabulary' if token_id is None else f'id {token_id}'}", read.named(name)
        )
        if token_id is None:
            line = f"{read.named(name)} is {text}, which the vocabulary has not"
            (files.problem if name == "eos_token" else files.remark)(line)
        stated = files.words.find(f"{name}_id")
        if name == "bos_token" and stated is not None and token_id is not None and stated.value != token_id:
            files.remark(f"{stated.source} is {stated.value}, and {read.named(name)} has id {token_id}")


def _texts(read: TokenizerFiles, ids: Iterable[int]) -> str:
    return " ".join(str(read.tokenizer.hf.id_to_token(token_id)) for token_id in ids)


def _kind_source(read: TokenizerFiles) -> str:
    if read.folder is None:
        return f"{read.file}: {_GGML}model"
    return f"{read.file}: model.type" if read.file == "tokenizer.json" else f"{read.file}, through transformers"


def _keys(path: Path) -> frozenset[str]:
    """The entries that a file names, its extra special tokens included; none where it cannot be read, as is noted."""
    try:
        entries = read_json(path)
    except (ModelLoadError, OSError):
        return frozenset()
    return (
        frozenset({key for key, value in entries.items() if value is not None})
        | as_mapping(entries.get("extra_special_tokens")).keys()
    )
