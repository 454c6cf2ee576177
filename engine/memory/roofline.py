"""What steps cannot do without: bytes that are read, products that are computed; and how near to the device they came.

Floors are for reading all weights once a step (of experts: those that its rows take), and the keys, values and states
of each row. Activations, and buffers of attention, are not in them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.memory.cache_spec import KVCacheSpec, StateSpec
from engine.outputs import StepTotals


@dataclass(frozen=True, slots=True)
class DeviceSpeed:
    """Rates that this process measured on its device, once.

    ``how`` says by what. ``flops_per_second`` is for products of large matrices of ``dtype``.
    ``row_bytes_per_second``: what a product of one row with a large matrix reads, on a CPU, where that is a matter of
    the BLAS; 0 elsewhere.
    """

    bytes_per_second: float
    flops_per_second: float
    dtype: str
    how: str
    row_bytes_per_second: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelWork:
    """Bytes and multiply-adds of a model's weights.

    ``dense_bytes`` are read by every step, whatever its rows; of ``expert_bytes``, those of the experts that its rows
    take. ``dense_products`` are a token's multiply-adds with the former, ``expert_products`` with all experts;
    ``head_products`` are those of the logits, for the rows that sample alone. ``chosen`` of ``num_experts`` are taken
    by a token (``chosen`` 0: not known). ``pair_products``: those of a layer's heads for a token and one token that it
    attends to, 0 if not known.
    """

    dense_bytes: int
    expert_bytes: int = 0
    num_experts: int = 0
    chosen: int = 0
    dense_products: int = 0
    expert_products: int = 0
    head_products: int = 0
    pair_products: int = 0
    dtype: str = "float32"
    packed: bool = False

    @property
    def expert_share(self) -> float:
        """Share of the experts that one token takes; 1 where that is not known."""
        return self.chosen / self.num_experts if self.num_experts and self.chosen else 1.0

    def weight_bytes(self, rows: float) -> float:
        """Bytes that a step of ``rows`` tokens reads: of experts, those that rows which choose evenly would take."""
        taken = 1.0 - float((1.0 - self.expert_share) ** rows)
        return self.dense_bytes + self.expert_bytes * taken

    def prompt_flops(self, num_tokens: int, num_steps: int, pairs: float) -> float:
        """Floating-point operations for ``num_tokens`` prompt tokens: of weights, and of attention over ``pairs``."""
        per_token = self.dense_products + self.expert_products * self.expert_share
        return 2.0 * (num_tokens * per_token + num_steps * self.head_products + pairs * self.pair_products)


@dataclass(frozen=True, slots=True)
class Reached:
    """How near steps came to their floor. Per step: seconds, bytes read, rows; ``share`` of the device's best.

    ``by_memory``: reading bounds them, else products do.
    """

    steps: int
    seconds: float
    floor_seconds: float
    weight_bytes: float
    cache_bytes: float
    rows: float
    flops: float
    by_memory: bool

    @property
    def num_bytes(self) -> float:
        """Read in a step."""
        return self.weight_bytes + self.cache_bytes

    @property
    def share(self) -> float:
        """Of what the device allows; above 1 where caches on the chip hold part of the bytes."""
        return self.floor_seconds / self.seconds if self.seconds > 0 else 0.0

    @property
    def bytes_per_second(self) -> float:
        """Reached."""
        return self.num_bytes / self.seconds if self.seconds > 0 else 0.0

    @property
    def flops_per_second(self) -> float:
        """Reached."""
        return self.flops / self.seconds if self.seconds > 0 else 0.0


def decode_reached(
    totals: StepTotals, work: ModelWork, groups: Sequence[KVCacheSpec], device: DeviceSpeed
) -> Reached | None:
    """How near the decodes in ``totals`` came to the floor of reading; None without any that took time."""
    if not totals.decodes or totals.decode_seconds <= 0:
        return None
    rows = totals.rows / totals.decodes
    weights = work.weight_bytes(rows)
    cache = cache_bytes(groups, totals.context, totals.rows) / totals.decodes
    seconds = totals.decode_seconds / totals.decodes
    floor = (weights + cache) / device.bytes_per_second
    return Reached(totals.decodes, seconds, floor, weights, cache, rows, 0.0, True)


def prompt_reached(
    totals: StepTotals, work: ModelWork, groups: Sequence[KVCacheSpec], device: DeviceSpeed
) -> Reached | None:
    """The same for the steps with prompts: bounded by their products, or, where they are short, by reading weights."""
    if not totals.prompts or totals.prompt_seconds <= 0:
        return None
    steps = totals.prompts
    rows = totals.prompt_tokens / steps
    weights = work.weight_bytes(rows)
    pairs = sum(count * len(group.layers) for count, group in zip(totals.pairs, groups, strict=True))
    flops = work.prompt_flops(totals.prompt_tokens, steps, pairs) / steps
    reading, computing = weights / device.bytes_per_second, flops / device.flops_per_second
    seconds = totals.prompt_seconds / steps
    return Reached(steps, seconds, max(reading, computing), weights, 0.0, rows, flops, by_memory=reading >= computing)


def cache_bytes(groups: Sequence[KVCacheSpec], context: Sequence[int], rows: int) -> float:
    """Bytes of caches that decodes of ``rows`` tokens in all move: keys and values of ``context`` tokens by group are
    read, a token's written for each row; a state is read and written."""
    found = 0.0
    for group, tokens in zip(groups, context, strict=True):
        if isinstance(group, StateSpec):
            found += 2 * rows * group.state_bytes
        else:
            found += (tokens + rows) * group.bytes_per_token
    return found
