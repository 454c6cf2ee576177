"""A GGUF file in its parts, so that each can be another than the format allows."""

import struct
from dataclasses import dataclass, field
from typing import Any

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass
class Tensor:
    """A tensor's entry and data; ``offset`` None: where its data are."""

    name: str
    dims: list[int]
    kind: int
    data: bytes
    offset: int | None = None


@dataclass
class GGUFParts:
    """Metadata as key -> (type, value), of arrays (item type, items); the counts that the header states."""

    metadata: dict[str, tuple[int, Any]]
    tensors: list[Tensor]
    version: int = 3
    num_tensors: int | None = None
    num_fields: int | None = None
    lengths: dict[str, int] = field(default_factory=dict)
    """Of keys, the length that the file states of their text or array, in place of the real one."""

    def to_bytes(self) -> bytes:
        """The file."""
        tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        fields = len(self.metadata) if self.num_fields is None else self.num_fields
        head = [b"GGUF", struct.pack("<IQQ", self.version, tensors, fields)]
        for key, (kind, value) in self.metadata.items():
            head += [_string(key), struct.pack("<I", kind), _value(kind, value, self.lengths.get(key))]
        data, at = [], 0
        for tensor in self.tensors:
            offset = at if tensor.offset is None else tensor.offset
            dims = struct.pack(f"<I{len(tensor.dims)}Q", len(tensor.dims), *tensor.dims)
            head += [_string(tensor.name), dims, struct.pack("<IQ", tensor.kind & 0xFFFFFFFF, offset)]
            padded = tensor.data + bytes(-len(tensor.data) % 32)
            data.append(padded)
            at += len(padded)
        start = b"".join(head)
        return start + bytes(-len(start) % 32) + b"".join(data)


def _string(text: str | bytes, length: int | None = None) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def _value(kind: int, value: Any, length: int | None = None) -> bytes:
    if kind == _STRING:
        return _string(value, length)
    if kind != _ARRAY:
        return struct.pack(f"<{_SCALARS[kind]}", value)
    item, items = value
    head = struct.pack("<IQ", item, len(items) if length is None else length)
    return head + b"".join(_value(item, one) for one in items)
