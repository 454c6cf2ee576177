"""Whether the kernels that sample are right on this GPU, asked at load."""

import mlx.core as mx
import mlx.nn as nn

from engine.runner.kernels.best_rows import BestRows, best_rows
from engine.runner.kernels.dialect import kernels_available
from engine.runner.kernels.draw_check import best_problem, draw_problem
from engine.runner.kernels.draw_rows import DrawRows, draw_rows, takes
from engine.runner.kv.kv_spec import logits_dtype
from engine.runner.sampling.sampler import Sampler

_right: set[tuple[DrawRows, mx.Dtype]] = set()
"""What was right in this process: a load rehearses, and then asks for the same."""
_best_right: set[tuple[BestRows, mx.Dtype]] = set()


def choose_sampler(
    model: nn.Module, vocab_size: int, kernel: DrawRows = draw_rows, best: BestRows = best_rows
) -> tuple[Sampler, str | None]:
    """The sampler in one launch where ``kernel`` is right for the model's logits, and a line for the user else.

    Steps of greedy rows alone take ``best`` where that is right; what is drawn covers them too.
    """
    dtype = logits_dtype(model)
    if not takes(dtype, vocab_size):
        return Sampler(), None
    # Logits that something else has changed before are in float32.
    asked = [one for one in dict.fromkeys((dtype, mx.float32)) if (kernel, one) not in _right]
    problem = draw_problem(asked, kernel) if asked else None
    if problem:
        return Sampler(), f"sampling: MLX's own operations ({problem})"
    _right.update((kernel, one) for one in asked)
    problem = None if (best, dtype) in _best_right else best_problem(dtype, best)
    if problem:
        return Sampler(kernel), f"sampling: likeliest tokens by the kernel that draws, not by their own ({problem})"
    _best_right.add((best, dtype))
    # Sampling a row greedily took a GPU's host 0.13 ms, with two launches from Python; MLX repeats them without it.
    return Sampler(kernel, mx.compile(best) if kernels_available() else best), None
