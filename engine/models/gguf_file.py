"""Read a GGUF file: metadata and where its tensors lie. No MLX.

gguf's own reader makes several numpy objects per string (5 s for a vocabulary of 49,152); this one
walks the header once (0.1 s). Its constants and dequantization are used as they are.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType
from gguf.quants import dequantize, quant_shape_to_byte_shape

from engine.errors import ModelLoadError
from engine.format.text import shortened
from engine.models.gguf_split import parts_of

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_END_TOKEN_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_END_TOKENS = frozenset(
    (
        *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>", "<|end|>", "<|return|>", "<|call|>"),
        *("<|flush|>", "<|calls|>", "<end_of_turn>", "<turn|>", "<|tool_response>", "<eos>", "<|endoftext|>"),
        *("<|end_of_text|>", "<end_of_utterance>", "<EOT>", "[EOT]", "[EOS]", "[e~[", "[|endofturn|]"),
        *("<|END_OF_TURN_TOKEN|>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    )
)
"""Control tokens that end a turn, whichever model has them; Gemma 4 writes ``<|tool_response>`` behind its calls."""
_SEPARATED_BY_END = (("<|return|>", "<|call|>"), ("<|flush|>", "<|calls|>"))
"""Vocabularies (gpt-oss; Solar Open) in which ``<|end|>`` stands between the messages of one reply."""
_BEGINS_NEXT_TURN = ("<|observation|>", "<|user|>")
"""GLM has no token that ends a turn: the next one's first does. The first of the two is in no other vocabulary."""
_PLAIN: dict[GGMLQuantizationType, type[np.number[Any]]] = {
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F64: np.float64,
    GGMLQuantizationType.I8: np.int8,
    GGMLQuantizationType.I16: np.int16,
    GGMLQuantizationType.I32: np.int32,
    GGMLQuantizationType.I64: np.int64,
}
"""Types whose tensors are plain numbers."""
_MOST_DIMS = 4
NEVER_IN_FILES = (GGMLQuantizationType.Q8_1, GGMLQuantizationType.Q8_K)
"""What llama.cpp computes activations in: no file of weights has them."""
_TOKENIZER = "tokenizer.ggml."
_TYPES: dict[str, tuple[type, type | tuple[type, ...] | None]] = {
    **dict.fromkeys(("general.architecture", "tokenizer.chat_template"), (str, None)),
    **dict.fromkeys(("general.alignment", "split.count", "split.tensors.count"), (int, None)),
    **dict.fromkeys((f"{_TOKENIZER}model", f"{_TOKENIZER}pre"), (str, None)),
    **dict.fromkeys((f"{_TOKENIZER}tokens", f"{_TOKENIZER}merges"), (list, str)),
    f"{_TOKENIZER}token_type": (list, int),
    f"{_TOKENIZER}scores": (list, (int, float)),
    **{f"{_TOKENIZER}{name}": (int, None) for name in (*_END_TOKEN_KEYS, "bos_token_id", "unknown_token_id")},
}
"""Types of values by key; of lists also that of their items."""
_CONTROL = 3
"""Token type of control tokens (1 normal, 2 unknown, 4 user-defined, 5 unused, 6 byte)."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: ``shape`` in rows-first order, ``offset`` and ``num_bytes`` in the file of the model that has it."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    num_bytes: int
    file: Path


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file's metadata and tensors (of several parts, all together); data are read when asked for."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @property
    def architecture(self) -> str:
        """``general.architecture``: llama, qwen2, …"""
        return str(self.metadata.get("general.architecture", ""))

    def blocks(self, name: str) -> npt.NDArray[Any]:
        """A tensor's raw blocks ``[..., bytes per row]`` (of plain numbers their values), mapped from the file."""
        info = self.tensors[name]
        dtype = _PLAIN.get(info.type)
        shape = tuple(quant_shape_to_byte_shape(info.shape, info.type)) if dtype is None else info.shape
        blocks: npt.NDArray[Any] = np.memmap(info.file, dtype or np.uint8, "r", info.offset, shape)
        return blocks

    def values(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor's exact values as float32 (of F64 and integers, the nearest)."""
        return dequantized(self.blocks(name), self.tensors[name].type, f"{self.path.name}: {name}")

    def end_token_ids(self) -> frozenset[int]:
        """Ids that end a reply: the file's end tokens, and control tokens with a turn-ending name."""
        named = (self.metadata.get(_TOKENIZER + key) for key in _END_TOKEN_KEYS)
        tokens = self.metadata.get(_TOKENIZER + "tokens") or []
        types = self.metadata.get(_TOKENIZER + "token_type") or []
        control = {
            token: index for index, (token, kind) in enumerate(zip(tokens, types, strict=False)) if kind == _CONTROL
        }
        ids = frozenset(one for one in named if isinstance(one, int)) | _turn_ends(control)
        separates = any(control.keys() >= {*marks} for marks in _SEPARATED_BY_END)
        return ids - {control.get("<|end|>", -1)} if separates else ids


def _turn_ends(control: Mapping[str, int]) -> set[int]:
    """Ids of ``control`` tokens that end a turn by their names."""
    names = _END_TOKENS.union(_BEGINS_NEXT_TURN if _BEGINS_NEXT_TURN[0] in control else ())
    return {control[name] for name in control.keys() & names}


def open_gguf(path: Path) -> GGUFFile:
    """Read the header of ``path`` and of its other parts.

    Raises :class:`ModelLoadError` if one is not a GGUF file, is truncated or is missing.
    """
    parts = [path.with_name(name) for name in parts_of(path.name)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing and len(parts) > 1:
        raise ModelLoadError(f"{path}: {', '.join(missing)} is missing beside it; fetch all {len(parts)} parts")
    return _open(*((part, stat.st_mtime_ns, stat.st_size) for part in parts for stat in [part.stat()]))


@lru_cache(maxsize=1)
def _open(*parts: tuple[Path, int, int]) -> GGUFFile:
    files = [_read(path, size) for path, _changed, size in parts]
    path, first = parts[0][0], files[0].metadata
    if (count := first.get("split.count", 0) or 1) != len(files):
        raise ModelLoadError(f"{path}: the file is one of {count}; its name has to end in -00001-of-{count:05d}.gguf")
    tensors = {name: info for file in files for name, info in file.tensors.items()}
    if len(tensors) != first.get("split.tensors.count", len(tensors)):
        raise ModelLoadError(f"{path}: its parts are not of one model; fetch them again")
    return GGUFFile(path, first, tensors)


def _read(path: Path, size: int) -> GGUFFile:
    with path.open("rb") as file:
        if file.read(4) != _MAGIC:
            raise ModelLoadError(f"{path}: not a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                gguf = _Header(data).read(path)
            except (struct.error, UnicodeDecodeError, KeyError, OverflowError, MemoryError):
                raise ModelLoadError(f"{path}: the file is cut short or damaged; fetch it again") from None
    if any(info.offset + info.num_bytes > size for info in gguf.tensors.values()):
        raise ModelLoadError(f"{path}: the file is cut short; fetch it again")
    return gguf


def dequantized(blocks: npt.NDArray[Any], kind: GGMLQuantizationType, where: str) -> npt.NDArray[np.float32]:
    """The exact values of ``blocks`` as float32. Raises :class:`ModelLoadError` naming ``where`` and the type."""
    if kind in _PLAIN:
        return np.asarray(blocks, dtype=np.float32)
    if kind == GGMLQuantizationType.Q1_0:
        return _signs(blocks)
    try:
        return np.asarray(dequantize(blocks, kind), dtype=np.float32)
    except NotImplementedError:
        reason = "is not for weights" if kind in NEVER_IN_FILES else "cannot be read"
        raise ModelLoadError(f"{where}: the tensor type {kind.name} {reason}; use a Q8_0 file") from None


def _signs(blocks: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Of Q1_0, blocks of a float16 scale and a bit for each of 128 values: minus the scale, or the scale."""
    parts = blocks.reshape(-1, 18)
    scales = np.ascontiguousarray(parts[:, :2]).view(np.float16).astype(np.float32)
    bits = np.unpackbits(parts[:, 2:], axis=-1, bitorder="little")
    return np.where(bits == 1, scales, -scales).reshape(*blocks.shape[:-1], -1)


class _Header:
    """Walks a GGUF header once."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = len(_MAGIC)

    def read(self, path: Path) -> GGUFFile:
        version = self._scalar("I")
        if version not in _VERSIONS:
            raise ModelLoadError(f"{path}: GGUF version {version} (or big-endian) is not supported; convert it again")
        num_tensors, num_fields = self._scalar("Q"), self._scalar("Q")
        metadata = {self._string(): self._value(self._scalar("I")) for _ in range(num_fields)}
        headers = [self._tensor() for _ in range(num_tensors)]
        _check_values(path, metadata)
        alignment = metadata.get("general.alignment") or GGUF_DEFAULT_ALIGNMENT
        start = -(-self._at // alignment) * alignment
        tensors = {}
        for name, shape, kind, offset in headers:
            _check_shape(path, name, shape, kind)
            tensors[name] = TensorInfo(name, shape, kind, start + offset, _num_bytes(shape, kind), path)
        return GGUFFile(path, metadata, tensors)

    def _tensor(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self._string()
        shape = self._scalars("Q", self._scalar("I"))[::-1]
        number = self._scalar("I")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            known = f"tensor {shortened(name, 80)} has an unknown GGUF type {number}"
            raise ModelLoadError(f"{known}; use a Q8_0 file") from None
        return name, shape, kind, self._scalar("Q")

    def _scalar(self, code: str) -> Any:
        return self._scalars(code, 1)[0]

    def _scalars(self, code: str, count: int) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{count}{code}")
        values = layout.unpack_from(self._data, self._at)
        self._at += layout.size
        return values

    def _string(self) -> str:
        length = self._scalar("Q")
        if self._at + length > len(self._data):
            raise struct.error("string reaches past the end")
        self._at += length
        return self._data[self._at - length : self._at].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        item, count = self._scalar("I"), self._scalar("Q")
        if item in _SCALARS:
            return list(self._scalars(_SCALARS[item], count))
        return [self._value(item) for _ in range(count)]


def _check_values(path: Path, metadata: Mapping[str, Any]) -> None:
    """Refuse values of other types than their keys have by the format."""
    for key, (kind, item) in _TYPES.items():
        value = metadata.get(key)
        fits = isinstance(value, kind) and not isinstance(value, bool)
        if value is None or (fits and (item is None or all(isinstance(one, item) for one in value))):
            continue
        raise ModelLoadError(
            f"{path}: {key} = {str(value)[:40]} is not what the format has there; fetch the file again"
        )


def _check_shape(path: Path, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> None:
    """Refuse a tensor of a shape that the format has not: up to four sizes, rows of whole blocks."""
    block = int(GGML_QUANT_SIZES[kind][0])
    if len(shape) > _MOST_DIMS or 0 in shape or (block > 1 and (not shape or shape[-1] % block)):
        what = f"{' x '.join(map(str, shape[:_MOST_DIMS])) or 'no'} {kind.name} values"
        raise ModelLoadError(f"{path}: tensor {shortened(name, 80)} has {what}; fetch the file again")


def _num_bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // int(block) * int(size)
