"""How the attention kernels without tensor cores divide their work."""

import math
from dataclasses import dataclass
from functools import cache

from engine.runner.kernels.page_format import VECTOR_BYTES

_MOST_THREADS = 1024
_MOST_SHARED_BYTES = 32 << 10
"""Of a threadgroup on Metal; CUDA has 48 KB."""
_MOST_WARP_BYTES = 28_000
"""Of them for joining warps."""
_PACKED_VECTOR = 16
"""Elements of a load over packed pages."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """How a block of the attention kernel divides its work; the text says what each number means."""

    key_dim: int
    value_dim: int
    group: int
    element_size: int
    lanes: int
    heads: int
    warps: int
    tokens: int
    packed: bool = False

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps * math.ceil(self.group / self.heads)

    @property
    def tokens_per_pass(self) -> int:
        """Tokens that a block reads at a time."""
        return self.warps * (32 // self.lanes) * self.tokens

    @property
    def shared_bytes(self) -> int:
        """Memory that the threads of a block share."""
        # Packed, the row is there as it came, as integers, and as scales and biases.
        newest = (self.key_dim + self.value_dim) * (4 * self.element_size + 5 * self.packed) // 4
        return newest + (_warp_bytes(self.warps, self.group, self.value_dim) if self.warps > 1 else 8)

    @property
    def template(self) -> list[tuple[str, int]]:
        """The numbers as the text's template arguments."""
        return [
            ("KEY_DIM", self.key_dim),
            ("VALUE_DIM", self.value_dim),
            ("GROUP", self.group),
            ("LANES", self.lanes),
            ("HEADS", self.heads),
            ("WARPS", self.warps),
            ("TOKENS", self.tokens),
        ]

    def check(self, block_size: int) -> None:
        """ValueError for what no block can do."""
        if block_size % self.tokens:
            raise ValueError(f"a block size of {block_size} is not a multiple of {self.tokens}")
        if self.shared_bytes > _MOST_SHARED_BYTES:
            raise ValueError(f"{self.shared_bytes} bytes of shared memory are needed, {_MOST_SHARED_BYTES} are there")
        if max(self.threads, self.value_dim) > _MOST_THREADS:
            raise ValueError(f"{self.group} query heads of {self.value_dim} are more than {_MOST_THREADS} threads")


@cache
def attention_geometry(
    key_dim: int, value_dim: int, group: int, element_size: int, *, rotates: bool = False, packed: bool = False
) -> Geometry:
    """The geometry for ``group`` query heads per kv head; measured on an H200 for 128/4, 128/8 and 256/8.

    ``rotates``: a lane holds both halves of the pairs that a rotation turns, so an even number of vectors.
    """
    vector = _PACKED_VECTOR if packed else VECTOR_BYTES // element_size

    def fits(lanes: int) -> bool:
        even = not rotates or key_dim // (lanes * vector) % 2 == 0
        return lanes <= 32 and key_dim % (lanes * vector) == 0 and value_dim % (lanes * vector) == 0 and even

    lanes = 1
    while key_dim // lanes > 16 and fits(2 * lanes):
        lanes *= 2
    if group >= 8 and element_size == 2 and fits(2 * lanes):
        lanes *= 2  # half the registers per head: more blocks at once
    registers = (key_dim + value_dim) // lanes  # of one query head: itself and its output
    heads = max(1, min(group, 4, 128 // registers))
    heads = math.ceil(group / math.ceil(group / heads))  # as even as the number of warps allows
    warps = max(1, 4 // math.ceil(group / heads))
    while warps > 1 and _warp_bytes(warps, group, value_dim) > _MOST_WARP_BYTES:
        warps //= 2
    tokens = 4 if element_size == 2 and key_dim // (lanes * vector) <= 2 else 2
    return Geometry(key_dim, value_dim, group, element_size, lanes, heads, warps, tokens, packed)


def _warp_bytes(warps: int, group: int, value_dim: int) -> int:
    return warps * group * (value_dim + 2) * 4
