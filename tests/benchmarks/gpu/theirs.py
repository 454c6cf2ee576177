"""What is measured of mlx-lm on the same folder. Its streams belong to the thread that calls: the main one."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import BatchGenerator, generate_step

from tests.benchmarks.gpu.steps import RAMP, Call, full_gaps, gaps

_PREFILL_BATCH = 8
"""mlx-lm's own default, as is the length of a prompt's steps."""


def load(folder: Path) -> Any:
    """The module of ``folder``."""
    model, _ = mlx_lm.load(str(folder))
    return model


def batch_steps(model: Any, prompts: Sequence[Sequence[int]], num_steps: int) -> list[float]:
    """Milliseconds of steps of ``BatchGenerator`` in which all rows decode and no prompt is worked on."""
    num_rows = len(prompts)
    calls_ahead = 16 + sum(map(len, prompts)) // 256
    generator = BatchGenerator(
        model,
        max_tokens=num_steps + calls_ahead,
        completion_batch_size=num_rows,
        prefill_batch_size=min(num_rows, _PREFILL_BATCH),
    )
    generator.insert([list(prompt) for prompt in prompts])
    calls: list[Call] = []
    num_full = 0
    while num_full < num_steps + RAMP + 1:
        prompt_responses, rows = generator.next()
        calls.append(Call(time.monotonic(), len(rows), len(prompt_responses)))
        if not prompt_responses and not rows:
            break
        num_full += len(rows) == num_rows and not prompt_responses
    generator.close()
    del generator
    mx.clear_cache()
    return full_gaps(calls, num_rows)


def single_steps(model: Any, prompt: Sequence[int], num_steps: int) -> list[float]:
    """Milliseconds between tokens of ``generate_step``."""
    steps = generate_step(mx.array(list(prompt)), model, max_tokens=num_steps + RAMP + 1)
    return gaps([time.monotonic() for _ in steps])[RAMP:]


def first_token(model: Any, prompt: Sequence[int]) -> float:
    """Milliseconds that ``generate_step`` takes to a prompt's first token."""
    begin = time.monotonic()
    steps = generate_step(mx.array(list(prompt)), model, max_tokens=2)
    next(steps)
    milliseconds = 1000 * (time.monotonic() - begin)
    for _ in steps:
        pass
    mx.clear_cache()
    return milliseconds
