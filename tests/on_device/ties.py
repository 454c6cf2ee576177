"""Greedy tokens against mlx-lm's own logits: equal, a tie of the top logits, or wrong.

On a GPU rounding differs with the shape of a product, so a greedy token may differ where the top logits tie.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from numpy.typing import NDArray

TIE = 0.05
"""Of the logits' spread. Rounding alone stays well below it; where it turns a router of experts, 0.024 was the most
seen. A wrong mask or position gives more than 1."""
WRONG = "WRONG"
_LENGTHS = 256
"""Sequences are judged in multiples of so many tokens."""


def compare(model: Any, prompt: list[int], theirs: list[int], ours: list[int]) -> str:
    """What becomes of mlx-lm's tokens ``theirs`` in ``ours``, judged at the first difference."""
    if ours == theirs:
        return "equal"
    at = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), None)
    if at is None:
        return f"{WRONG} ({len(ours)} tokens for {len(theirs)})"
    logits = np.array(model(mx.array([[*prompt, *theirs[:at]]]))[0, -1].astype(mx.float32))
    gap = float(logits[theirs[at]] - logits[ours[at]]) / float(logits.std())
    return "tie" if gap < TIE else f"{WRONG} ({gap:.3f} of the spread)"


@dataclass(frozen=True)
class Oracle:
    """mlx-lm's model with the same weights in float32, and up to which part of the logits' spread a gap is a tie."""

    model: Any
    tie: float = TIE

    @classmethod
    def of(cls, module: Any, copy: Any, prompt: Sequence[int]) -> Self:
        """For ``module``, and ``copy``, another of the same weights, which becomes float32.

        In half precision a tie is as wide as six times what mlx-lm's own logits for ``prompt`` differ by from those
        in float32 (standard deviation).
        """
        copy.update(tree_map(_widened, copy.parameters()))
        ours, exact = (_logits(one, prompt) for one in (module, copy))
        noise = float(((ours - exact) / exact.std(axis=1, keepdims=True)).std())
        return cls(copy, max(TIE, 6 * noise))

    def judge(self, prompt: Sequence[int], ours: Sequence[int]) -> tuple[Counter[str], float]:
        """How many of the tokens ``ours`` are mlx-lm's choice after those before them, and the largest gap to it.

        The gap is the part of the logits' spread by which another token was likelier; what is not a number is wrong.
        """
        if not ours:
            return Counter(), 0.0
        found = _logits(self.model, [*prompt, *ours[:-1]])[-len(ours) :]
        chosen = np.take_along_axis(found, np.array(ours)[:, None], axis=1)[:, 0]
        gaps = (found.max(axis=1) - chosen) / found.std(axis=1)
        kinds = Counter(
            "equal" if best == token else "tie" if gap < self.tie else WRONG
            for best, token, gap in zip(found.argmax(axis=1).tolist(), ours, gaps.tolist(), strict=True)
        )
        return kinds, float(gaps.max())


def _widened(weight: Any) -> Any:
    floating = isinstance(weight, mx.array) and mx.issubdtype(weight.dtype, mx.floating)
    return weight.astype(mx.float32) if floating else weight


def _logits(model: Any, tokens: Sequence[int]) -> NDArray[np.float32]:
    """Of each token. Padded to few lengths behind, where nobody looks: a GPU sets up each length anew."""
    length = -(-len(tokens) // _LENGTHS) * _LENGTHS
    padded = mx.array([[*tokens, *[0] * (length - len(tokens))]])
    return np.array(model(padded)[0, : len(tokens)].astype(mx.float32))
