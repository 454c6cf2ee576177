"""The arithmetic of step times: what counts as a step in which all rows run, and what the hardware would need."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

RAMP = 3
"""Steps left out at the beginning: the one that ends the last prompt is still among them."""


def gaps(times: Sequence[float]) -> list[float]:
    """Milliseconds between neighbours of ``times``, which are in seconds."""
    return [1000 * (late - early) for early, late in pairwise(times)]


@dataclass(frozen=True)
class Step:
    """A step of this engine, as it measures it: its ``end`` and the ``seconds`` since the one before, ``num_rows``
    being the rows that got a token in both."""

    end: float
    seconds: float
    num_rows: int


def full_steps(steps: Sequence[Step], num_rows: int, ramp: int = RAMP) -> list[float]:
    """Milliseconds of the steps in which all ``num_rows`` rows get a token, as in the step before."""
    return [1000 * step.seconds for step in steps if step.num_rows == num_rows][ramp:]


@dataclass(frozen=True)
class Call:
    """One call of mlx-lm's ``BatchGenerator.next``: when it came back (seconds), and with what."""

    end: float
    num_rows: int
    num_prompts: int


def full_gaps(calls: Sequence[Call], num_rows: int, ramp: int = RAMP) -> list[float]:
    """Milliseconds from call to call while all ``num_rows`` rows get a token and no prompt is worked on."""
    full = [
        1000 * (late.end - early.end)
        for early, late in pairwise(calls)
        if all(call.num_rows == num_rows and not call.num_prompts for call in (early, late))
    ]
    return full[ramp:]


@dataclass(frozen=True)
class Machine:
    """What was measured of the device: bytes read and floating-point operations per second."""

    bytes_per_second: float
    flops_per_second: float
    how: str

    def step_floor(self, weight_bytes: int, kv_bytes: int) -> float:
        """Milliseconds that reading all weights and the keys and values once would take."""
        return 1000 * (weight_bytes + kv_bytes) / self.bytes_per_second

    def prompt_floor(self, weight_bytes: int, num_tokens: int, width: int, num_layers: int) -> float:
        """Milliseconds that a prompt's products would take at the rate of a large one, weights being bfloat16.

        ``width``: query heads times head size. Causal attention counts half of all pairs.
        """
        products = weight_bytes * num_tokens
        attention = 2 * width * num_layers * num_tokens**2
        return 1000 * (products + attention) / self.flops_per_second
