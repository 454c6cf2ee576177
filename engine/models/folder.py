"""The format of most models: a folder with ``config.json``, safetensors and a tokenizer's files."""

import json
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import index as whole
from pathlib import Path

from engine.errors import ModelLoadError, ModelNotFoundError
from engine.format.text import listed
from engine.models.weight_format import TOKENIZER_FILES, CachedModel, Part, Wanted, WeightFormat, read_json

_WEIGHT_FILES, _INDEX = "model*.safetensors", "model.safetensors.index.json"
"""The names that mlx-lm reads."""
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d{1,9})\.")
_LFS_POINTER = b"version https://git-lfs"
_TOKENIZER_PATTERNS = ["*.json", "*.jinja", "*.txt", "*.tiktoken", "tokenizer.model"]
_PATTERNS: dict[Part, list[str]] = {
    "weights": [*_TOKENIZER_PATTERNS, _WEIGHT_FILES, "*.py"],
    "config": ["config.json", "generation_config.json", "hf_quant_config.json", _INDEX],
    "tokenizer": _TOKENIZER_PATTERNS,
}


class FolderFormat(WeightFormat):
    """A folder as transformers and mlx-lm write it. Also what a folder without any model is taken for."""

    kind = "folder"

    def claims(self, folder: Path, wanted: Wanted) -> bool:
        """Any folder, unless the user named a quantization, and so one file in it."""
        return folder.is_dir() and not wanted.quant

    def missing(self, folder: Path, wanted: Wanted) -> list[str]:
        """The tokenizer, the config, or shards that the index names."""
        if wanted.part == "tokenizer":
            return [] if any((folder / name).is_file() for name in TOKENIZER_FILES) else ["tokenizer.json"]
        if not (folder / "config.json").is_file():
            return ["config.json"]
        return missing_shards(folder) if wanted.part == "weights" else []

    def open(self, folder: Path, wanted: Wanted) -> Path:
        """The folder itself."""
        missing = self.missing(folder, wanted)
        if missing == ["model.safetensors"] and (any(folder.glob("*.bin")) or any(folder.glob("*.pth"))):
            raise ModelNotFoundError(
                f"{wanted.model}: has PyTorch weights only; convert them with `mlx_lm.convert --hf-path {wanted.model}`"
            )
        other = sorted({*missing, *(file.name for file in folder.glob("*.safetensors"))} & _names(folder))
        if missing and other and not any(_weight_files(folder)):
            raise ModelNotFoundError(
                f"{wanted.model}: has weights in {other[0]}, but only {_WEIGHT_FILES} are read; rename the files so"
            )
        if missing:
            raise ModelNotFoundError(f"{wanted.model}: {listed(missing)} missing in {folder}")
        return folder

    def to_download(self, files: Sequence[str], wanted: Wanted) -> list[str] | None:
        """The patterns of the part, where the repository has it."""
        part = wanted.part
        has_weights = any(name.startswith("model") and name.endswith(".safetensors") for name in files)
        if part == "tokenizer" and any(name.startswith("tokenizer") for name in files):
            found = True
        else:
            found = "config.json" in files and (has_weights or part == "config")
        return _PATTERNS[part] if found and not wanted.quant else None

    def cached(self, name: str, folder: Path) -> Iterator[CachedModel]:
        """The folder, if nothing is missing."""
        if (folder / "config.json").is_file() and not missing_shards(folder):
            size = sum(file.stat().st_size for file in _weight_files(folder))
            yield CachedModel(name, folder, size, self.kind)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as the header of a safetensors file tells of it; ``dtype`` in the format's words (``F8_E4M3``)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """What safetensors files say of themselves: the tensors in the files here, and bytes in all (0: unknown).

    ``tensors`` are in the order of their data, file after file. ``complete``: all are here.
    """

    tensors: tuple[StoredTensor, ...] = ()
    num_bytes: int = 0
    complete: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names."""
        return tuple(tensor.name for tensor in self.tensors)

    @property
    def num_layers(self) -> int:
        """Layers that the names of tensors tell of; 0 where they tell none."""
        found = (_LAYER.search(tensor.name) for tensor in self.tensors)
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    @property
    def bytes_by_dtype(self) -> Counter[str]:
        """Bytes by element type (``BF16``)."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors:
            sizes[tensor.dtype] += tensor.num_bytes
        return sizes


def stored_weights(folder: Path) -> StoredWeights:
    """From the headers of the files; where some are missing, the bytes in all from the index."""
    files = sorted(_weight_files(folder))
    held = [(path, tensor) for path in files for tensor in _tensors(path)]
    tensors = tuple(tensor for _, tensor in held)
    _check_once(folder, held)
    if missing_shards(folder):
        metadata = read_json(folder / _INDEX).get("metadata")
        total = metadata.get("total_size") if isinstance(metadata, dict) else None
        return StoredWeights(tensors, int(total) if isinstance(total, int | float) and 0 < total < 1 << 60 else 0)
    return StoredWeights(tensors, sum(tensor.num_bytes for tensor in tensors), complete=bool(tensors))


def _check_once(folder: Path, held: Iterable[tuple[Path, StoredTensor]]) -> None:
    """Refuse files that hold a tensor of the same name: which of them is meant would be left to chance."""
    first: dict[str, Path] = {}
    for path, tensor in held:
        other = first.setdefault(tensor.name, path)
        if other != path:
            raise ModelLoadError(
                f"{folder}: {other.name} and {path.name} both hold {tensor.name}; move away the files of one conversion"
            )


def missing_shards(folder: Path) -> list[str]:
    """Weight files that ``folder`` lacks, by its safetensors index or the numbers in the files' names.

    An index may tell of other files than are there, as after a conversion: then the files' own numbers count, and a
    load checks that every parameter is in them. Raises :class:`ModelLoadError` for an index that is none.
    """
    there = {file.name for file in _weight_files(folder)}
    index = _index(folder)
    named = set(index.values())
    if not there:
        return sorted(named) or ["model.safetensors"]
    if not named & there:
        return _missing_numbers(there)
    return [] if named <= there or index.keys() <= _tensor_names(folder, there) else sorted(named - there)


def _weight_files(folder: Path) -> Iterator[Path]:
    """Those that are there: a link of a hub's snapshot may lead nowhere."""
    return (file for file in folder.glob(_WEIGHT_FILES) if file.is_file())


def _names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if file.is_file()}


def _index(folder: Path) -> dict[str, str]:
    """Tensor -> file, as the index of ``folder`` tells; {} without one."""
    path = folder / _INDEX
    if not path.is_file():
        return {}
    found = read_json(path).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise ModelLoadError(f"{path}: no weight_map of tensors and files; fetch the file again")
    return found


def _missing_numbers(names: Iterable[str]) -> list[str]:
    """Of files numbered ``-00001-of-00003``, those that are not there."""
    names = set(names)
    missing: set[str] = set()
    for name in names:
        match = re.fullmatch(r"(.*-)(\d+)-of-(\d+)(\..*)", name)
        if match is not None:
            start, number, total, end = match.groups()
            wanted = (f"{start}{i:0{len(number)}}-of-{total}{end}" for i in range(1, int(total) + 1))
            missing.update(one for one in wanted if one not in names)
    return sorted(missing)


def _tensor_names(folder: Path, names: Iterable[str]) -> set[str]:
    """Tensors in these of its files; a file that cannot be read has none."""
    found: set[str] = set()
    for name in names:
        try:
            found.update(tensor.name for tensor in _tensors(folder / name))
        except (OSError, ModelLoadError):
            continue
    return found


def _tensors(path: Path) -> list[StoredTensor]:
    """The tensors in a safetensors file, in the order of their data. Raises ModelLoadError where it is not whole."""
    there = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if _LFS_POINTER.startswith(start) and there >= len(start) == 8:
            raise ModelLoadError(f"{path}: a pointer of Git LFS, not the weights; run `git lfs pull` in the folder")
        try:
            (size,) = struct.unpack("<Q", start)
            header = json.loads(file.read(min(size, there)))
            entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
            tensors = sorted(
                (*map(whole, entry["data_offsets"]), name, str(entry["dtype"]), *map(whole, entry["shape"]))
                for name, entry in entries
            )
            needed = 8 + size + max((end for _, end, *_ in tensors), default=0)
            stored = [
                StoredTensor(name, dtype, tuple(shape), end - start) for start, end, name, dtype, *shape in tensors
            ]
        except (struct.error, ValueError, AttributeError, KeyError, TypeError, RecursionError):
            raise ModelLoadError(f"{path}: not a safetensors file; fetch the file again") from None
    if there < needed:
        raise ModelLoadError(f"{path}: cut short, {there} of {needed} bytes; fetch the file again")
    return stored
