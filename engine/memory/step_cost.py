"""What a step costs beyond weights and pages, and whether it fits, asked before it is built.

A process that runs out of memory is killed, or aborts.
"""

from collections.abc import Callable
from dataclasses import dataclass

from engine.params.sizes import exact_size

SMALLEST_CHUNK = 16
"""Tokens; a prompt is not cut into smaller chunks to save memory."""


@dataclass(frozen=True, slots=True)
class StepCost:
    """Bytes of a step beyond weights and pages: measured, estimated, or given (``base`` alone).

    ``base + per_row x rows + per_pair x rows x context + per_position x context``
    """

    base: float
    per_row: float = 0.0
    per_pair: float = 0.0
    per_position: float = 0.0

    def bytes(self, rows: int, context: int) -> int:
        """What a step of ``rows`` tokens attending over ``context`` tokens needs."""
        by_context = (self.per_pair * rows + self.per_position) * context
        return round(max(0.0, self.base + self.per_row * rows + by_context))


class AdmissionControl:
    """Chunk sizes that fit into what is free now. Decodes are not asked about, and cost nothing here.

    ``step_cost`` was measured when the model was loaded; ``bytes_per_token`` is what pages grow by;
    ``free`` reads what is left, at most once for each step.
    """

    def __init__(self, step_cost: StepCost, bytes_per_token: int, free: Callable[[], int]) -> None:
        self.step_cost = step_cost
        self.bytes_per_token = bytes_per_token
        self.free = free
        self._left: int | None = None

    def begin(self) -> None:
        """A step is being put together."""
        self._left = None

    def affordable(self, num_tokens: int, start: int) -> int:
        """How many of ``num_tokens`` prompt tokens, from position ``start``, the step may compute; 0 for none.

        Halved until they fit together with the step's other chunks.
        """
        if self._left is None:
            self._left = self.free()
        while (need := self.need(num_tokens, start)) > self._left:
            if num_tokens <= SMALLEST_CHUNK:
                return 0
            num_tokens = max(SMALLEST_CHUNK, num_tokens // 2)
        self._left -= need
        return num_tokens

    def need(self, num_tokens: int, start: int) -> int:
        """Bytes of a chunk of ``num_tokens`` tokens from ``start``: activations, buffers and new pages."""
        return self.step_cost.bytes(num_tokens, start + num_tokens) + num_tokens * self.bytes_per_token

    def shortage(self, num_tokens: int, start: int) -> str:
        """What a chunk lacks, in words."""
        rows = min(num_tokens, SMALLEST_CHUNK)
        return (
            f"the next {rows} tokens of this prompt need {exact_size(self.need(rows, start))} of memory, "
            f"{exact_size(self.free())} are free"
        )
