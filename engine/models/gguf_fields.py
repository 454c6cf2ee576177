"""An architecture's own metadata in a GGUF file, with an account of what was read: what was not may change tokens."""

import math
import re
from functools import cached_property
from typing import Any

from engine.errors import ModelLoadError
from engine.format.text import shortened
from engine.models.gguf_file import GGUFFile

_WITHOUT_EFFECT = frozenset(
    (
        "vocab_size",  # the embedding's rows tell it
        "rope.dimension_sections",  # of text, all sections count the same positions
        "rope.scaling.finetuned",
        "tensor_data_layout",
        "attention.recurrent_layers",  # the tensors of a layer tell it
    )
)
_SAYS_NOTHING = (0, False, "", "none")
_BLOCK = re.compile(r"blk\.(\d+)\.")
_COUNTS = ("_count", "_length", "_count_kv", "_length_swa", "_length_mla")
"""Ends of the keys that count something."""
_MOST = (1 << 31) - 1


class Fields:
    """Values under the architecture's prefix, such as ``llama.block_count`` for ``block_count``.

    Errors are :class:`ModelLoadError` naming the file and the key.
    """

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self._read: set[str] = set()

    def error(self, problem: str) -> ModelLoadError:
        """A refusal in the words of all of them."""
        return ModelLoadError(f"{self.file.path.name}: {problem}; load the model's safetensors folder instead")

    def get(self, key: str, default: Any = None) -> Any:
        """A value, ``default`` where the file has none. A list is refused unless all layers have one value."""
        value = self._value(key, default)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise self.error(f"{self.name(key)} differs between layers")
        return value[0]

    def need(self, key: str) -> Any:
        """A value that must be there."""
        value = self.get(key)
        if value is None:
            raise self.error(f"{self.name(key)} is missing")
        return value

    def layers(self, key: str, num_layers: int) -> list[Any]:
        """A value for each layer, of which files hold one for all, a list, or nothing (an empty list)."""
        value = self._value(key, None)
        if value is None:
            return []
        if isinstance(value, list) and len(value) < num_layers:
            raise self.error(f"{self.name(key)} has {len(value)} values for {num_layers} layers")
        return value[:num_layers] if isinstance(value, list) else [value] * num_layers

    def expect(self, key: str, *allowed: Any) -> None:
        """Refuse a value (where there is one) other than ``allowed``."""
        value = self.get(key)
        if value is not None and value not in allowed:
            raise self.error(f"{self.name(key)} = {value} is not supported")

    def rows(self, tensor: str) -> int | None:
        """Rows of a tensor's matrices, None where the file has no such tensor."""
        info = self.file.tensors.get(tensor)
        return None if info is None else info.shape[max(0, len(info.shape) - 2)]

    @cached_property
    def num_blocks(self) -> int:
        """Layers that the file has tensors of."""
        numbers = (_BLOCK.match(name) for name in self.file.tensors)
        return len({found[1] for found in numbers if found})

    def name(self, key: str) -> str:
        """The key as the file has it."""
        return f"{self.file.architecture}.{key}"

    def refuse_unread(self) -> None:
        """Refuse what the file says about its architecture and nobody asked for."""
        prefix = f"{self.file.architecture}."
        for key, value in self.file.metadata.items():
            own = key.removeprefix(prefix)
            if own == key or own in self._read | _WITHOUT_EFFECT or value in _SAYS_NOTHING:
                continue
            raise self.error(f"{shortened(key, 80)} = {shortened(str(value), 40)} is not understood")

    def _value(self, key: str, default: Any) -> Any:
        self._read.add(key)
        value = self.file.metadata.get(self.name(key))
        if value is None:
            return default
        for one in value if isinstance(value, list) else [value]:
            if not _fits(key, one):
                meant = "a whole number" if key.endswith(_COUNTS) else "a number"
                raise self.error(f"{self.name(key)} = {shortened(str(one), 40)} is not {meant}")
        return value


def _fits(key: str, value: Any) -> bool:
    """Whether a value can be one of ``key``: what counts something is whole and within reason, a number is finite."""
    if key.endswith(_COUNTS):
        return isinstance(value, int) and 0 <= value <= _MOST
    return not isinstance(value, float) or math.isfinite(value)
