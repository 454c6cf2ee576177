"""What one kind of cache costs: a class for each kind, which knows its arithmetic and its words in a plan.

Found by these classes: the bookkeeping (:func:`engine.core.cache_groups.make_cache_group`) and the memory on the
device (:func:`engine.runner.kv.paged_cache.make_group_cache`); :mod:`engine.runner.kv.kv_spec` recognises them.
"""

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple, Self

from engine.errors import ConfigError
from engine.format.text import count_text
from engine.params.kv_dtype import vector_bytes

SetAside = Literal["windows", "states"]
"""The parts of a plan that are set aside for ``max_num_seqs`` sequences, however short they are."""


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

    ``bytes_per_token``: what a token adds over all the layers. ``vectors``: the same, whatever the pages'
    element type; empty where that cannot be chosen.
    """

    layers: tuple[int, ...]
    bytes_per_token: int = 0
    block_size: int = 16
    vectors: tuple[KVVectors, ...] = ()

    kind: ClassVar[str]
    """Its name in a plan."""
    order: ClassVar[int]
    """Its place in a plan; the first group is the one that grows."""
    grows: ClassVar[bool] = False
    """Whether each further token of a sequence needs memory."""
    paged: ClassVar[bool] = True
    """Whether blocks are pages of ``block_size`` tokens; else one is a sequence's slot."""
    recurrent: ClassVar[bool] = False
    """Whether layers carry a state from token to token: prefixes are reused from checkpoints of it only."""
    part: ClassVar[SetAside | None] = None
    """The part of the device's memory that it belongs to; None: the KV cache's blocks."""
    block_name: ClassVar[str] = "KV blocks"
    unit: ClassVar[str] = ""
    """What follows a number of blocks in a plan's table."""
    added: ClassVar[tuple[str, ...]] = ("layers", "bytes_per_token", "vectors")
    """Fields that add up where layers form a group."""

    def __post_init__(self) -> None:
        assert self.bytes_per_token or not self.grows, f"a {self.kind} group needs its bytes per token"

    @property
    def group_key(self) -> tuple[int, int]:
        """Layers with the same key form one group; a plan's groups are in the order of their keys."""
        return self.order, 0

    @property
    def reach(self) -> str:
        """The tokens that a sequence attends to, in words."""
        return "all" if self.grows else "–"

    def for_steps(self, block_size: int, _chunk: int, /) -> Self:
        """The same layers with blocks of ``block_size`` tokens, in steps of at most ``_chunk`` tokens."""
        return replace(self, block_size=block_size)

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

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all the group's layers."""
        return self.block_size * self.bytes_per_token

    def blocks_per_sequence(self, num_tokens: int, /) -> int:
        """Blocks that a sequence of ``num_tokens`` holds at most between two steps."""
        return ceil_div(num_tokens, self.block_size)

    def blocks_of(self, num_seqs: int, num_tokens: int) -> int:
        """Blocks that ``num_seqs`` sequences of ``num_tokens`` hold at most, also while a step runs."""
        return num_seqs * self.blocks_per_sequence(num_tokens)

    def bytes_per_sequence(self, num_tokens: int) -> int:
        """What a sequence of ``num_tokens`` needs in this group between two steps, in whole blocks."""
        return self.blocks_per_sequence(num_tokens) * self.bytes_per_block


@dataclass(frozen=True, slots=True)
class FullAttentionSpec(KVCacheSpec):
    """A page for every token."""

    kind = "full"
    order = 0
    grows = True


@dataclass(frozen=True, slots=True)
class MLAAttentionSpec(FullAttentionSpec):
    """A page for every token, with one latent vector for all heads: multi-head latent attention, as in DeepSeek."""

    kind = "latent"


@dataclass(frozen=True, slots=True)
class SlidingWindowSpec(KVCacheSpec):
    """Pages of the last ``window`` tokens; ``ahead`` tokens of a step run ahead of all sequences' windows together."""

    window: int = field(kw_only=True)
    ahead: int = 0

    kind = "sliding"
    order = 1
    part = "windows"
    block_name = "window blocks"

    def __post_init__(self) -> None:
        assert self.window, "a sliding group needs its window"

    @property
    def group_key(self) -> tuple[int, int]:
        """A group for each length of window."""
        return self.order, self.window

    @property
    def reach(self) -> str:
        """The window, in words."""
        return f"{count_text(self.window)} tokens"

    def for_steps(self, block_size: int, chunk: int, /) -> Self:
        """The tokens of a step run ahead of the windows."""
        return replace(self, block_size=block_size, ahead=chunk)

    def blocks_per_sequence(self, num_tokens: int, /) -> int:
        """A window that begins inside a block touches one block more."""
        return min(ceil_div(num_tokens, self.block_size), ceil_div(self.window, self.block_size) + 1)

    def blocks_of(self, num_seqs: int, num_tokens: int) -> int:
        """Each sequence's part of a step may begin and end inside a block, and so touch one more."""
        ahead = ceil_div(self.ahead, self.block_size) + min(num_seqs, self.ahead // 2)
        longest = num_seqs * ceil_div(num_tokens, self.block_size)
        return min(num_seqs * self.blocks_per_sequence(num_tokens) + ahead, longest)


@dataclass(frozen=True, slots=True)
class StateSpec(KVCacheSpec):
    """One slot of ``state_bytes`` for each sequence, over all layers: recurrent layers (vLLM's MambaSpec)."""

    state_bytes: int = field(kw_only=True)

    kind = "state"
    order = 2
    paged = False
    recurrent = True
    part = "states"
    block_name = "state slots"
    unit = " slots"
    added = (*KVCacheSpec.added, "state_bytes")

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one slot."""
        return self.state_bytes

    def blocks_per_sequence(self, _num_tokens: int, /) -> int:
        """One slot, however long the sequence is."""
        return 1


@dataclass(frozen=True, slots=True)
class SharedSpec(KVCacheSpec):
    """Nothing: layers that read the pages of layers before them (Gemma 3n, Gemma 4)."""

    kind = "shared"
    order = 3
    paged = False

    def blocks_per_sequence(self, _num_tokens: int, /) -> int:
        """No blocks of its own."""
        return 0


def merge_specs(specs: Sequence[KVCacheSpec]) -> KVCacheSpec:
    """One spec for the layers of ``specs``, which have the same :attr:`KVCacheSpec.group_key`."""
    general = min(specs, key=lambda spec: len(type(spec).__mro__))  # latent layers beside full ones count as full
    sums = {name: functools.reduce(operator.add, (getattr(spec, name) for spec in specs)) for name in general.added}
    return replace(general, **sums)


def ceil_div(value: int, divisor: int) -> int:
    """``value / divisor``, rounded up."""
    return -(-value // divisor)
