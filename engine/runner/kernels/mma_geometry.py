"""How decode attention on tensor cores divides its work, and where it is used."""

import math
from dataclasses import dataclass

import mlx.core as mx

from engine.runner.kernels.page_format import PLAIN, PageFormat

_TYPES = (mx.bfloat16, mx.float16)
_MOST_HEADS = 16
"""Query heads of a block: the rows of a product."""
_FEWEST_HEADS = 8
"""Per kv head, over plain pages. Of four, 128 wide, tensor cores took 127 us for 148 at 32 rows of 4096 tokens on an
H200, but 8.9 for 6.3 at one of 512; of eight 127 for 398 and 7.2 for 8.7."""
_TOKENS = 16
_MOST_SHARED_BYTES = 47 << 10
_WIDEST_PART = 128
"""Elements of a key or value that a warp has registers for."""


@dataclass(frozen=True, slots=True)
class MmaGeometry:
    """The text's template arguments; see :mod:`engine.runner.kernels.paged_attention_mma_text`."""

    key_dim: int
    value_dim: int
    group: int
    bits: int
    key_step: int
    value_step: int
    rope_dim: int
    heads: int
    warps: int
    parts: int
    stages: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.warps

    @property
    def blocks(self) -> int:
        """Blocks for the query heads of one kv head."""
        return math.ceil(self.group / self.heads)

    @property
    def tokens_per_pass(self) -> int:
        """Tokens that a block reads at a time."""
        return self.warps // self.parts * _TOKENS

    @property
    def template(self) -> list[tuple[str, int]]:
        """The numbers as the text's template arguments."""
        return [
            ("KEY_DIM", self.key_dim),
            ("VALUE_DIM", self.value_dim),
            ("GROUP", self.group),
            ("BITS", self.bits),
            ("KEY_STEP", self.key_step),
            ("VALUE_STEP", self.value_step),
            ("ROPE_DIM", self.rope_dim),
            ("HEADS", self.heads),
            ("WARPS", self.warps),
            ("PARTS", self.parts),
            ("STAGES", self.stages),
        ]

    def fits(self) -> bool:
        """Whether the work is divided without a rest, and memory suffices."""
        keys, values = self.key_step * self.parts, self.value_step * self.parts
        if self.key_dim % keys or self.value_dim % values or self.rope_dim % 32 or self.warps % self.parts:
            return False
        rows = self.heads * (self.key_dim + self.rope_dim + 8)
        staged = 2 * (rows + self.key_dim + (self.rope_dim or self.value_dim))
        tiles = 2 if self.heads > 8 else 1
        exchanged = 2 * self.threads * tiles * 16 if self.parts > 1 else 4
        memory = max(staged + 15, self.heads * (self.value_dim + 4) * 4)
        return memory + exchanged + self.tokens_per_pass * 8 <= _MOST_SHARED_BYTES


def mma_geometry(
    dtype: mx.Dtype, key_dim: int, value_dim: int, group: int, block_size: int, *,
    keys: PageFormat = PLAIN, values: PageFormat = PLAIN, rope_dim: int = 0,
) -> MmaGeometry | None:  # fmt: skip
    """For ``group`` query heads per kv head over rows of these formats; None where tensor cores are not used.

    Measured on an H200 for 128, 256 and 512 wide heads, packed pages and latent ones.
    """
    if dtype not in _TYPES or block_size % _TOKENS or keys.bits != values.bits:
        return None
    if not (keys.bits or rope_dim) and group < _FEWEST_HEADS:
        return None
    key_step = keys.group_size or 32
    value_step = values.group_size or (64 if value_dim % 64 == 0 else 32)
    heads = math.ceil(group / math.ceil(group / _MOST_HEADS))
    parts = 1
    while max(key_dim, value_dim) // parts > _WIDEST_PART and parts < 4:
        parts *= 2
    made = MmaGeometry(
        key_dim, value_dim, group, keys.bits, key_step, value_step, rope_dim, heads, 4, parts, 1 if rope_dim else 2
    )
    return made if made.fits() else None
