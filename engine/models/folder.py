"""The format of most models: a folder with ``config.json``, safetensors and a tokenizer's files."""

import json
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.errors import ModelNotFoundError
from engine.models.weight_format import TOKENIZER_FILES, CachedModel, Part, Wanted, WeightFormat, read_json

_TOKENIZER_PATTERNS = ["*.json", "*.jinja", "*.txt", "*.tiktoken", "tokenizer.model"]
_PATTERNS: dict[Part, list[str]] = {
    "weights": [*_TOKENIZER_PATTERNS, "model*.safetensors", "*.py"],
    "config": ["config.json", "generation_config.json", "model.safetensors.index.json"],
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
class StoredWeights:
    """What safetensors files say of themselves: bytes by element type (``BF16``), and bytes in all (0: unknown).

    ``names`` are those of the tensors in the files here, file after file, as they lie in them.
    """

    bytes_by_dtype: Counter[str] = field(default_factory=Counter)
    num_bytes: int = 0
    names: tuple[str, ...] = ()


def stored_weights(folder: Path) -> StoredWeights:
    """From the headers of the files where all are here, else from the index."""
    sizes: Counter[str] = Counter()
    names: list[str] = []
    for path in sorted(folder.glob("model*.safetensors")):
        for name, dtype, num_bytes in _tensors(path):
            sizes[dtype] += num_bytes
            names.append(name)
    if missing_shards(folder):
        metadata = read_json(folder / "model.safetensors.index.json").get("metadata") or {}
        return StoredWeights(sizes, int(metadata.get("total_size") or 0), tuple(names))
    return StoredWeights(sizes, sizes.total(), tuple(names))


def missing_shards(folder: Path) -> list[str]:
    """Weight files that the safetensors index names and ``folder`` lacks; also when there are none at all."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
        return sorted(name for name in names if not (folder / name).is_file())
    return [] if any(folder.glob("model*.safetensors")) else ["model.safetensors"]


def _tensors(path: Path) -> list[tuple[str, str, int]]:
    """Name, element type and bytes of the tensors in a safetensors file, in the order of their data."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return [(name, entry["dtype"], entry["data_offsets"][1] - entry["data_offsets"][0]) for name, entry in entries]
