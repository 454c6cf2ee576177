"""What one kind of cache costs: layers that keep a page for every token, a window of them, one state, or nothing."""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

from engine.errors import ConfigError
from engine.params.kv_dtype import vector_bytes

GroupKind = Literal["full", "sliding", "state", "shared", "latent"]


class KVVectors(NamedTuple):
    """``number`` key or value vectors of ``length`` elements, each of ``element_bytes`` in the model's own type."""

    number: int
    length: int
    element_bytes: int

    def num_bytes(self, kv_cache_dtype: str) -> int:
        """Bytes of these vectors in pages of ``kv_cache_dtype``; ``auto`` is the model's own type."""
        return self.number * vector_bytes(self.length, self.element_bytes, kv_cache_dtype)


@dataclass(frozen=True, slots=True)
class KVCacheSpec:
    """Layers whose cache has one kind.

    ``bytes_per_token``: keys and values of one token over all the group's layers. ``window``
    (sliding): tokens that a sequence attends to; ``ahead``: those of a step that run ahead of all the
    sequences' windows together. ``state_bytes`` (state): one sequence's slot over all the group's layers.
    ``vectors``: what a token adds, whatever the pages' element type; empty where that cannot be chosen.
    """

    kind: GroupKind
    layers: tuple[int, ...]
    bytes_per_token: int = 0
    window: int | None = None
    ahead: int = 0
    state_bytes: int = 0
    block_size: int = 16
    vectors: tuple[KVVectors, ...] = ()

    def __post_init__(self) -> None:
        assert self.kind != "sliding" or self.window, "a sliding group needs its window"
        assert self.bytes_per_token or not self.grows, f"a {self.kind} group needs its bytes per token"

    @property
    def grows(self) -> bool:
        """Whether each further token of a sequence needs memory."""
        return self.kind in ("full", "latent")

    def with_kv_cache_dtype(self, kv_cache_dtype: str) -> Self:
        """The same layers with pages of another element type. Raises ConfigError where there is no choice."""
        if not self.bytes_per_token:
            return self
        if not self.vectors:
            raise ConfigError(
                f"--kv-cache-dtype {kv_cache_dtype}: this model runs on mlx-lm's contiguous caches, "
                "which keep the model's own element type; leave the flag out",
                flag="kv_cache_dtype",
                value=kv_cache_dtype,
                allowed="auto",
            )
        return replace(self, bytes_per_token=sum(some.num_bytes(kv_cache_dtype) for some in self.vectors))

    def bytes_per_sequence(self, num_tokens: int) -> int:
        """What a sequence of ``num_tokens`` needs in this group between two steps, in whole blocks."""
        return self.blocks_per_sequence(num_tokens) * self.bytes_per_block

    def blocks_per_sequence(self, num_tokens: int) -> int:
        """Blocks (of a state: slots) that a sequence of ``num_tokens`` holds at most between two steps."""
        if self.kind in ("state", "shared"):
            return 1 if self.kind == "state" else 0
        num_blocks = ceil_div(num_tokens, self.block_size)
        if self.window is None:
            return num_blocks
        # A window that begins inside a block touches one block more.
        return min(num_blocks, ceil_div(self.window, self.block_size) + 1)

    def blocks_of(self, num_seqs: int, num_tokens: int) -> int:
        """Blocks that ``num_seqs`` sequences of ``num_tokens`` hold at most, while a step runs ahead of windows."""
        blocks = num_seqs * self.blocks_per_sequence(num_tokens)
        if self.window is None:
            return blocks
        # Each sequence's part of a step may begin and end inside a block, and so touch one more.
        ahead = ceil_div(self.ahead, self.block_size) + min(num_seqs, self.ahead // 2)
        return min(blocks + ahead, num_seqs * ceil_div(num_tokens, self.block_size))

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all the group's layers; of a state, of one slot."""
        return self.state_bytes if self.kind == "state" else self.block_size * self.bytes_per_token


def ceil_div(value: int, divisor: int) -> int:
    """``value / divisor``, rounded up."""
    return -(-value // divisor)
