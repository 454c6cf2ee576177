"""The files of a model as its card reads them: each once; one that cannot be read becomes a problem and stays empty."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from engine.errors import VMMagicError, error_line
from engine.models.local import ResolvedModel
from engine.models.model_config import ModelConfig, read_model_config
from engine.models.reading import is_fault
from engine.models.resolve import resolve
from engine.models.weight_format import read_json
from engine.params.engine_args import EngineArgs

if TYPE_CHECKING:
    from engine.models.gguf_file import GGUFFile

T = TypeVar("T")
_GGUF_KEYS = {
    "head_dim": "attention.key_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "num_hidden_layers": "block_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rope_local_base_freq": "rope.freq_base_swa",
    "rope_scaling": "rope.scaling.type",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
}
"""Entries of config.json, and the keys of a GGUF file, behind its architecture, from which they are made."""


@dataclass(frozen=True, slots=True)
class Found:
    """An entry of a configuration, and where it stands."""

    value: Any
    source: str


@dataclass(frozen=True)
class Words:
    """A model's configuration in its own words. ``file`` is its name, ``gguf`` what it was made from, if so."""

    values: Mapping[str, Any]
    file: str
    gguf: "GGUFFile | None" = None

    @cached_property
    def text(self) -> Mapping[str, Any]:
        """The entries of the language model inside one that also sees or hears."""
        return as_mapping(self.values.get("text_config"))

    def find(self, *names: str) -> Found | None:
        """The first of ``names`` that has a value, the language model's own before the whole model's."""
        for name in names:
            for part, prefix in ((self.text, "text_config."), (self.values, "")):
                if part.get(name) is not None:
                    return Found(part[name], self.source(prefix + name))
        return None

    def all(self, name: str) -> list[Found]:
        """Every place where ``name`` has a value."""
        parts = ((self.values, ""), (self.text, "text_config."))
        return [Found(part[name], self.source(prefix + name)) for part, prefix in parts if part.get(name) is not None]

    def source(self, key: str) -> str:
        """Where ``key`` stands, for people."""
        if self.gguf is None:
            return f"{self.file}: {key}"
        name = "general.architecture" if key == "model_type" else f"{self.gguf.architecture}.{_GGUF_KEYS.get(key, key)}"
        return f"{self.file}: {name if name in self.gguf.metadata else 'not named, follows from the rest'}"


@dataclass
class ModelFiles:
    """Reads the model ``resolved`` as a load with ``args`` would, and notes what is wrong on the way."""

    resolved: ResolvedModel
    args: EngineArgs
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    _read: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def is_folder(self) -> bool:
        """Whether the model is a folder; else it is one file."""
        return self.resolved.path.is_dir()

    @property
    def folder(self) -> Path:
        """The model's folder, or that of its file."""
        return self.resolved.path if self.is_folder else self.resolved.path.parent

    @cached_property
    def gguf(self) -> "GGUFFile | None":
        """The header of a GGUF file, None for a folder or a file that cannot be read."""
        if self.is_folder:
            return None
        from engine.models.gguf_file import open_gguf

        return self.attempt(self.resolved.path.name, lambda: open_gguf(self.resolved.path))

    def has(self, name: str) -> bool:
        """Whether the folder has a file ``name``."""
        return self.is_folder and (self.folder / name).is_file()

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object of the folder; {} where there is none or it cannot be read."""
        if not self.is_folder:
            return {}
        if name not in self._read:
            self._read[name] = self.attempt(name, lambda: read_json(self.folder / name)) or {}
        return self._read[name]

    @cached_property
    def words(self) -> Words:
        """The configuration in the file's own words."""
        if self.args.hf_config_path is not None:
            values = self.attempt("--hf-config-path", lambda: _other_config(str(self.args.hf_config_path)))
            return Words(values or {}, "--hf-config-path")
        if self.is_folder:
            return Words(self.json("config.json"), "config.json")
        name = self.resolved.path.name
        if self.gguf is None:
            return Words({}, name)
        values = self.attempt(name, lambda: self.resolved.format.config(self.resolved.path))
        return Words(values or _shape_of(self.gguf), name, self.gguf)

    @cached_property
    def config(self) -> ModelConfig | None:
        """What a load would make of the configuration; None where it would refuse."""
        if not self.words.values:
            return None
        return self.attempt(self.words.file, lambda: read_model_config(self.resolved, self.args))

    def attempt(self, what: str, read: Callable[[], T]) -> T | None:
        """What ``read`` gives; None, and a problem that names ``what``, where it fails."""
        try:
            return read()
        except VMMagicError as error:
            self.problem(str(error))
        except BaseException as error:
            if not is_fault(error):
                raise
            self.problem(f"{what}: cannot be read ({error_line(error)})")
        return None

    def collected(self, what: str, parts: Iterable[T]) -> Iterator[T]:
        """``parts`` up to the first that fails, which becomes a problem that names ``what``."""
        iterator = iter(parts)
        while (found := self.attempt(what, lambda: next(iterator, None))) is not None:
            yield found

    def problem(self, line: str) -> None:
        """Note what would be refused or change tokens; once, however many parts find it."""
        if line not in self.problems:
            self.problems.append(line)

    def remark(self, line: str) -> None:
        """Note what is worth knowing."""
        if line not in self.remarks:
            self.remarks.append(line)


def _shape_of(file: "GGUFFile") -> dict[str, Any]:
    """What a GGUF file of an architecture that is not supported says of its shape."""
    begin = f"{file.metadata.get('general.architecture')}."
    found = {name: file.metadata.get(begin + key) for name, key in _GGUF_KEYS.items() if name != "rope_scaling"}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def _other_config(given: str) -> dict[str, Any]:
    path = Path(given).expanduser()
    return read_json(path if path.is_file() else resolve(given, part="config").path / "config.json")


def as_mapping(value: Any) -> Mapping[str, Any]:
    """``value`` where it is an object of JSON, else an empty one."""
    return value if isinstance(value, Mapping) else {}
