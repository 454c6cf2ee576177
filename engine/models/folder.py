"""The format of most models: a folder with ``config.json``, safetensors and a tokenizer's files."""

import json
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ModelLoadError, ModelNotFoundError
from engine.models.weight_format import TOKENIZER_FILES, CachedModel, Part, Wanted, WeightFormat, read_json

_TOKENIZER_PATTERNS = ["*.json", "*.jinja", "*.txt", "*.tiktoken", "tokenizer.model"]
_PATTERNS: dict[Part, list[str]] = {
    "weights": [*_TOKENIZER_PATTERNS, "model*.safetensors", "*.py"],
    "config": ["config.json", "generation_config.json", "hf_quant_config.json", "model.safetensors.index.json"],
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
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ModelNotFoundError(f"{wanted.model}: {', '.join(missing[:3])}{more} missing in {folder}")
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
            size = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
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
    def bytes_by_dtype(self) -> Counter[str]:
        """Bytes by element type (``BF16``)."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors:
            sizes[tensor.dtype] += tensor.num_bytes
        return sizes


def stored_weights(folder: Path) -> StoredWeights:
    """From the headers of the files; where some are missing, the bytes in all from the index."""
    files = sorted(folder.glob("model*.safetensors"))
    tensors = tuple(tensor for path in files for tensor in _tensors(path))
    if missing_shards(folder):
        metadata = read_json(folder / "model.safetensors.index.json").get("metadata") or {}
        return StoredWeights(tensors, int(metadata.get("total_size") or 0))
    return StoredWeights(tensors, sum(tensor.num_bytes for tensor in tensors), complete=bool(tensors))


def missing_shards(folder: Path) -> list[str]:
    """Weight files that the safetensors index names and ``folder`` lacks; also when there are none at all."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
        return sorted(name for name in names if not (folder / name).is_file())
    return [] if any(folder.glob("model*.safetensors")) else ["model.safetensors"]


def _tensors(path: Path) -> list[StoredTensor]:
    """The tensors in a safetensors file, in the order of their data. Raises ModelLoadError for a broken header."""
    with path.open("rb") as file:
        try:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(size, path.stat().st_size)))
        except (struct.error, ValueError):
            raise ModelLoadError(f"{path}: not a safetensors file; fetch the file again") from None
    header.pop("__metadata__", None)
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    lacking = 8 + size + max((entry["data_offsets"][1] for _, entry in entries), default=0) - path.stat().st_size
    if lacking > 0:
        raise ModelLoadError(f"{path}: {lacking} bytes are missing at its end; fetch the file again")
    return [
        StoredTensor(name, entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in entries
    ]
