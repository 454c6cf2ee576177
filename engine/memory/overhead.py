"""What a step needs besides weights and pages: activations and buffers, in proportion to its rows and its context."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Overhead:
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
