"""The headers of safetensors files, one by one: what each tensor is, and whether its file is whole."""

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ModelLoadError

_LONGEST_HEADER = 100_000_000
"""Bytes, as the format has it: a longer one is not a header."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in ``file``: its element type as the format calls it (``BF16``), its shape and its bytes."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @property
    def num_values(self) -> int:
        """Elements; of packed weights, those that hold several."""
        return math.prod(self.shape)


def read_header(path: Path) -> Iterator[StoredTensor]:
    """The tensors of one file. Raises :class:`ModelLoadError` where its header cannot be read or its data are cut."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size, _LONGEST_HEADER):
            raise ModelLoadError(f"{path.name}: not a safetensors file{_pointer(start + file.read(120))}")
        try:
            header = json.loads(file.read(length))
        except ValueError:
            raise ModelLoadError(f"{path.name}: its header is not valid JSON; fetch the file again") from None
    header.pop("__metadata__", None)
    end = 0
    for name, entry in header.items():
        begins, ends = entry["data_offsets"]
        end = max(end, ends)
        yield StoredTensor(path.name, name, str(entry["dtype"]), tuple(entry["shape"]), ends - begins)
    if size < 8 + length + end:
        raise ModelLoadError(f"{path.name}: cut short ({size} of {8 + length + end} bytes); fetch the file again")


def _pointer(text: bytes) -> str:
    """A file that Git's large-file storage left as a pointer is a common case."""
    return "; it is a Git LFS pointer: run `git lfs pull`" if text.startswith(b"version https://git-lfs") else ""
