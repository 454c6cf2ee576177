"""A format in which models lie on disk: which files are one, what they say. To add a format, write one of these."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from engine.errors import ModelLoadError

Part = Literal["weights", "config", "tokenizer"]
"""What of a model is needed: everything, ``config.json`` alone (for a plan), or its tokenizer."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model that loads without a download; ``bytes`` is the size of its weights."""

    name: str
    path: Path
    bytes: int
    kind: str


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """Where a tokenizer is: in the files of ``folder``, or in ``metadata`` with GGUF's keys."""

    folder: Path
    metadata: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is looked for: ``part`` of the ``model`` that the user named, in the quantization ``quant`` or ""."""

    model: str
    quant: str
    part: Part


class WeightFormat(ABC):
    """How models of one format are recognised, and what their files say without their weights. No state, no MLX.

    ``kind`` is the format's name in :class:`~engine.models.local.ResolvedModel`, and that of the reader of its weights
    in ``engine/runner/load/loader.py``. ``file_suffix``: what a file that is a whole model ends with, if any is.
    """

    kind: str
    file_suffix: str | None = None
    sampling_source: ClassVar[str] = "generation_config.json"
    """Where :meth:`generation_config` finds sampling values."""

    @abstractmethod
    def claims(self, folder: Path, wanted: Wanted) -> bool:
        """Whether ``folder`` is read as this format."""

    @abstractmethod
    def missing(self, folder: Path, wanted: Wanted) -> list[str]:
        """Files that ``folder`` lacks."""

    @abstractmethod
    def open(self, folder: Path, wanted: Wanted) -> Path:
        """The path of the model in ``folder``. Raises ModelNotFoundError for what is missing."""

    @abstractmethod
    def to_download(self, files: Sequence[str], wanted: Wanted) -> list[str] | None:
        """Patterns of those of a repository's ``files`` to download, or None if it holds no model of this format."""

    @abstractmethod
    def cached(self, name: str, folder: Path) -> Iterator[CachedModel]:
        """The complete models in ``folder``, the snapshot of a hub repository ``name``."""

    def config(self, path: Path) -> dict[str, Any]:
        """The configuration of the model at ``path`` (its folder or file), in the words of ``config.json``."""
        return read_json(path / "config.json")

    def generation_config(self, path: Path) -> dict[str, Any]:
        """The model's sampling defaults, in the words of ``generation_config.json``."""
        return read_json(path / "generation_config.json")

    def tokenizer_limit(self, path: Path) -> float:
        """Most tokens that the tokenizer's files allow."""
        limit = read_json(path / "tokenizer_config.json").get("model_max_length")
        return float(limit) if isinstance(limit, int | float) and limit > 0 else math.inf

    def tokenizer_source(self, path: Path) -> TokenizerSource:
        """Where the model's own tokenizer is."""
        return TokenizerSource(path)

    def end_token_ids(self, path: Path) -> frozenset[int]:
        """Ids that end a reply."""
        return end_token_ids(self.config(path), self.generation_config(path))


def end_token_ids(*configs: Mapping[str, Any]) -> frozenset[int]:
    """Ids that end a reply, as any of ``configs`` or their ``text_config`` says.

    Raises :class:`ModelLoadError` for what is neither an id nor a list of them.
    """
    found: set[int] = set()
    for config in configs:
        text = config.get("text_config")
        for source in (config, text if isinstance(text, Mapping) else {}):
            value = source.get("eos_token_id")
            ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
            if not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
                raise ModelLoadError(
                    f"eos_token_id {str(value)[:80]!r} is neither a token id nor a list of them; mend it in the "
                    "model's configuration or give ids with --override-generation-config"
                )
            found.update(ids)
    return frozenset(found)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``, {} if there is none.

    Raises :class:`ModelLoadError` for bad JSON and for a file that may not be read.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # of bad bytes, bad JSON, lists in lists without end
        raise ModelLoadError(f"{path}: not valid JSON; fetch the file again") from None
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path}: not a JSON object; fetch the file again")
    return value
