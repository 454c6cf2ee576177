"""Arrays as safetensors store them, in element types that MLX has no name for too."""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

_NAMES = {
    mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint8: "U8", mx.int8: "I8", mx.int16: "I16",
    mx.int32: "I32", mx.int64: "I64", mx.uint32: "U32", mx.bool_: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor with its element type in the format's words."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


Tensors = dict[str, mx.array | Stored]


def as_stored(array: mx.array, dtype: str | None = None) -> Stored:
    """``array``; ``dtype`` says what its bytes mean where MLX cannot, as ``F8_E4M3`` of uint8."""
    words = mx.contiguous(array).view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return Stored(dtype or _NAMES[array.dtype], tuple(array.shape), np.array(words).tobytes())


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Tensors, **files: Mapping[str, Any]) -> None:
    """``config.json``, ``model.safetensors``, and more JSON ``files`` by their names without the ending."""
    folder.mkdir(parents=True, exist_ok=True)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, value in tensors.items():
        one = value if isinstance(value, Stored) else as_stored(value)
        offsets = [len(data), len(data) + len(one.data)]
        header[name] = {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": offsets}
        data += one.data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    for name, content in {"config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=1))
