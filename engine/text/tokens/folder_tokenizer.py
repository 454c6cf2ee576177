"""A tokenizer from a model's folder: ``tokenizer.json`` and what the files beside it change about it.

The ids are those that transformers' AutoTokenizer gives, but for special tokens that the vocabulary lacks: they are
not added, since the model knows none. transformers itself, which takes a second to import, is asked only for classes
that are not in :mod:`engine.text.tokens.tokenizer_class` and for folders without a ``tokenizer.json``.
"""

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from engine.errors import ModelLoadError, error_line
from engine.models.reading import is_fault
from engine.models.weight_format import read_json
from engine.text.tokens.tokenizer_class import (
    CLASS_TOKENS,
    OTHER_CLASSES,
    TokenizerClass,
    build_as,
    choose_class,
    mend_mistral,
)

_CONFIG = "tokenizer_config.json"
_MAP = "special_tokens_map.json"
_FILE = "tokenizer.json"
_CHARSMAP = re.compile(rb'"precompiled_charsmap"\s*:\s*"((?:[A-Za-z0-9+/]{4})+[A-Za-z0-9+/=]*)"')
"""A table in base64 that begins with its size."""
_USUAL_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word")


@dataclass(frozen=True)
class FolderTokenizer:
    """What a folder's files say: the tokenizer, special tokens and templates by name, everything else.

    ``sources`` names the file that each came from, see :class:`engine.text.tokens.tokenizer.Tokenizer`.
    """

    hf: tokenizers.Tokenizer
    named_tokens: Mapping[str, str]
    named_templates: Mapping[str, str]
    config: Mapping[str, Any]
    sources: Mapping[str, str]


@dataclass(frozen=True)
class _Files:
    """The JSON files of a folder, read once: ``special`` is ``tokenizer_config.json``, and where that lists no
    tokens, ``special_tokens_map.json`` over it: so transformers reads folders of before the list."""

    folder: Path
    config: Mapping[str, Any]
    model: Mapping[str, Any]
    special: Mapping[str, Any]
    chosen: TokenizerClass

    @property
    def named_tokens(self) -> dict[str, Any]:
        """Special tokens by name, strings or objects; those of the class first, which a file may replace or remove."""
        return {**CLASS_TOKENS.get(self.chosen.name, {}), **_named(self.special)}


def read_folder(folder: Path) -> FolderTokenizer:
    """The tokenizer in ``folder``. Raises :class:`ModelLoadError`."""
    files = _read_files(folder)
    templates, sources = _chat_templates(folder, files.config)
    sources["class"] = f"{files.chosen.name} ({files.chosen.source})"
    sources["special_tokens"] = _CONFIG if files.special == files.config else f"{_MAP} over {_CONFIG}"
    hf, whole = None, (folder / _FILE).is_file() and "fast_tokenizer_files" not in files.config
    if whole and files.chosen.name not in OTHER_CLASSES:
        hf = _from_own_files(files)
    if hf is not None:
        changes = ["its split replaced by the class's"] if files.chosen.builds_its_own else []
        changes += ["its split mended (fix_mistral_regex)"] if mend_mistral(hf, files.model, files.config) else []
        sources["tokenizer"] = ", ".join([_FILE, *changes])
        named = {name: text for name, value in files.named_tokens.items() if (text := _token_text(value))}
    else:
        hf, named = _through_transformers(folder)
        sources["tokenizer"] = f"{_vocabulary_file(folder)}, through transformers"
    hf.encode_special_tokens = bool(files.config.get("split_special_tokens", False))
    return FolderTokenizer(hf, named, templates, files.special, sources)


def _read_files(folder: Path) -> _Files:
    config, model = read_json(folder / _CONFIG), read_json(folder / "config.json")
    if config.get("tokenizer_class") == "NewlineTokenizer":
        raise ModelLoadError(
            f"{folder / _CONFIG}: the class NewlineTokenizer, which writes line breaks as <n>, is not supported; "
            "give another tokenizer with --tokenizer"
        )
    if (folder / "tekken.json").is_file() and not (folder / _FILE).is_file():
        raise ModelLoadError(
            f"{folder}: only Mistral's own tekken.json, which is not read; give a folder or hub id with {_FILE} as "
            "--tokenizer"
        )
    special = config if "added_tokens_decoder" in config else {**config, **read_json(folder / _MAP)}
    named = str(config.get("tokenizer_class") or model.get("tokenizer_class") or "")
    # Only a Llama class asks whether the file is byte-level: no other reads a file of ten megabytes twice.
    asks = named.removesuffix("Fast") == "LlamaTokenizer" and (folder / _FILE).is_file()
    byte_level = asks and b'"ByteLevel"' in (folder / _FILE).read_bytes()
    return _Files(folder, config, model, special, choose_class(model, config, byte_level))


def _from_own_files(files: _Files) -> tokenizers.Tokenizer | None:
    """As :func:`_from_file`; whatever the files hold in place of tokens is a refusal."""
    try:
        return _from_file(files)
    except BaseException as error:
        if not is_fault(error):
            raise
        raise ModelLoadError(
            f"{files.folder}: the special tokens of {_CONFIG}, {_MAP} or added_tokens.json cannot be read "
            f"({error_line(error)}); fetch these files again"
        ) from error


def _from_file(files: _Files) -> tokenizers.Tokenizer | None:
    """``tokenizer.json`` with what the class and the other files change; None where transformers is to be asked."""
    hf = read_tokenizer_file(files.folder / _FILE)
    texts = {name: text for name, value in files.named_tokens.items() if (text := _token_text(value))}
    if files.chosen.builds_its_own and not build_as(files.chosen.name, hf, files.config, texts):
        return None
    listed = _listed_tokens(files, hf, set(texts.values()))
    before = hf.get_added_tokens_decoder().values()
    same, ordinary = {repr(token) for token in before}, {token.content for token in listed if not token.special}
    hf.add_tokens([token for token in listed if repr(token) not in same])
    if files.chosen.builds_its_own and any(token.special and token.content in ordinary for token in before):
        hf = tokenizers.Tokenizer.from_str(hf.to_str())  # the library forgets only so that they were special
    special = _special_tokens(files, hf, {token.content: token for token in listed})
    known = {token.content for token in hf.get_added_tokens_decoder().values()}
    hf.add_tokens([token for token in special if token.content not in known])
    if files.chosen.name == "Qwen2Tokenizer":  # which adds all of them again, plain
        hf.add_tokens([tokenizers.AddedToken(token.content, special=True) for token in special])
    elif files.chosen.name == "CohereTokenizer":
        hf.add_special_tokens(special)
    return hf


def read_tokenizer_file(path: Path) -> tokenizers.Tokenizer:
    """What ``tokenizer.json`` alone makes. Raises :class:`ModelLoadError`."""
    _check_charsmaps(path)
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:
        if not is_fault(error):
            raise
        raise ModelLoadError(f"{path}: not a tokenizer ({_first_line(error)}); fetch it again") from error


def _check_charsmaps(path: Path) -> None:
    """Refuse tables of characters that state a size beyond their end: the library ends the process for want of it."""
    for found in _CHARSMAP.finditer(path.read_bytes()):
        start = base64.b64decode(found[1][:8])
        if len(start) >= 4 and int.from_bytes(start[:4], "little") > len(found[1]):
            raise ModelLoadError(f"{path}: its precompiled_charsmap is damaged; fetch it again")


def _listed_tokens(files: _Files, hf: tokenizers.Tokenizer, named: set[str]) -> list[tokenizers.AddedToken]:
    """``added_tokens_decoder`` of ``tokenizer_config.json``, else ``tokenizer.json``'s own and ``added_tokens.json``.

    In the order of their ids; those with a name are special. Flags that differ replace those of ``tokenizer.json``.
    """
    if "added_tokens_decoder" in files.config:
        listed = files.config["added_tokens_decoder"]
        listed = listed if isinstance(listed, Mapping) else {}
        tokens = [_added_token(listed[index], False) for index in sorted(listed, key=int)]
    else:
        more = read_json(files.folder / "added_tokens.json")
        extra = named | {text for value in _extra(files.special) if (text := _token_text(value))}
        added = {index: tokenizers.AddedToken(text, special=text in extra) for text, index in more.items()}
        tokens = [token for _, token in sorted({**added, **hf.get_added_tokens_decoder()}.items())]
    for token in tokens:
        token.special = token.special or token.content in named
    return tokens


def _special_tokens(
    files: _Files, hf: tokenizers.Tokenizer, listed: Mapping[str, tokenizers.AddedToken]
) -> list[tokenizers.AddedToken]:
    """Tokens that the files or the class name as special; those with usual names as ``listed`` has them.

    One that is named again with other flags comes again, and the last count. Only those that the vocabulary has: the
    model knows no others.
    """
    named, found = files.named_tokens, []
    for name in sorted(named, key=lambda name: _USUAL_NAMES.index(name) if name in _USUAL_NAMES else len(_USUAL_NAMES)):
        if text := _token_text(value := named[name]):
            plain = _added_token(value if isinstance(value, Mapping) else {"content": text}, True)
            usual = name in _USUAL_NAMES and name in files.special
            found.append(listed.get(text, plain) if usual else plain)
    for value in _extra(files.special):
        if text := _token_text(value):
            plain = _added_token({"content": text}, True)
            found.append(_added_token(value, False) if isinstance(value, Mapping) else plain)
    once: dict[str, tokenizers.AddedToken] = {}
    for token in found:
        once.setdefault(repr(token), token)
    return [token for token in once.values() if hf.token_to_id(token.content) is not None]


def _named(special: Mapping[str, Any]) -> dict[str, Any]:
    """What has a name that ends in ``_token``, and extra tokens with names of their own, as transformers reads them."""
    extra = special.get("extra_special_tokens")
    named = {name: value for name, value in special.items() if name.endswith("_token") and not isinstance(value, bool)}
    return {**named, **extra} if isinstance(extra, Mapping) else named


def _extra(special: Mapping[str, Any]) -> list[Any]:
    """Special tokens without names; the older key counts where the newer one has none."""
    lists = (special.get("extra_special_tokens"), special.get("additional_special_tokens"))
    return next((values for values in lists if values and isinstance(values, list)), [])


def _added_token(token: Mapping[str, Any], special: bool) -> tokenizers.AddedToken:
    flags = {name: bool(token[name]) for name in _FLAGS if name in token}
    return tokenizers.AddedToken(token["content"], special=special or bool(token.get("special", False)), **flags)


def _token_text(token: object) -> str | None:
    """A special token's text: the files write a string or an object."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def _through_transformers(folder: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """What transformers makes of a folder: of older formats, or by a class that only it knows; special tokens by name.

    Nothing in the folder is executed.
    """
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        hf: tokenizers.Tokenizer = loaded.backend_tokenizer
    except BaseException as error:
        if not is_fault(error):
            raise
        reason = _first_line(error)
        problem = "its class cannot be loaded" if (folder / _FILE).is_file() else f"no {_FILE}"
        raise ModelLoadError(f"{folder}: {problem} ({reason}); give a tokenizer with --tokenizer") from error
    named = {name: str(text) for name, text in loaded.special_tokens_map.items() if isinstance(text, str)}
    return hf, {name: text for name, text in named.items() if hf.token_to_id(text) is not None}


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def _vocabulary_file(folder: Path) -> str:
    """The file that transformers reads where it is asked."""
    names = (_FILE, "tokenizer.model", "tiktoken.model", "vocab.json", "vocab.txt")
    return next((name for name in names if (folder / name).is_file()), "the folder")


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """The templates by name, and the file of each: their own files first, then ``tokenizer_config.json``."""
    template = read_json(folder / "chat_template.json").get("chat_template")
    source = _CONFIG if template is None else "chat_template.json"
    template = template or config.get("chat_template")
    found = _by_name(template, folder / source)
    sources = dict.fromkeys(found, source)
    file = folder / "chat_template.jinja"
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if file.is_file() or more:
        paths = {"default": file} if file.is_file() else {}
        paths |= {path.stem: path for path in more}
        found = {name: _read_template(path) for name, path in paths.items()}
        sources = {name: str(path.relative_to(folder)) for name, path in paths.items()}
    return found, {f"template {name}": source for name, source in sources.items()}


def _by_name(template: object, path: Path) -> dict[str, str]:
    """Templates by name: the files write one text, texts by name, or a list of objects with ``name``, ``template``."""
    if isinstance(template, list) and all(isinstance(entry, Mapping) for entry in template):
        pairs = [(entry.get("name"), entry.get("template")) for entry in template]
    elif isinstance(template, Mapping):
        pairs = list(template.items())
    else:
        pairs = [] if template is None else [("default", template)]
    if all(isinstance(text, str) for pair in pairs for text in pair):
        return dict(pairs)
    raise ModelLoadError(f"{path}: chat_template is neither a text nor texts by name; fetch the file again")


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{path}: cannot be read ({error_line(error)}); fetch it again") from None
