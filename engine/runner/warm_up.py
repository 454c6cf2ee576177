"""First steps of a loaded model: that paging changes nothing, and what a step needs besides weights and pages."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from engine.request import Request
from engine.runner.backends import Backend, ContiguousBackend, PagedBackend
from engine.runner.kv_spec import UnsupportedCacheError, probe_layers
from engine.runner.step_batch import StepBatch
from engine.sampling_params import SamplingParams
from engine.step import ScheduledRequest

_CHECK_LENGTHS = (21, 34)
_TOLERANCE = {mx.float32: 1e-3}
_LOOSE_TOLERANCE = 0.1
"""Of the logits' spread: rounding in half precision stays below, a wrong mask or position does not."""
_NUM_SAMPLES = ((16, 16), (64, 64), (64, 1024))
"""(rows, context) of the measured steps."""


def choose_backend(
    model: nn.Module, *, paged: bool, block_size: int, kv_dtype: mx.Dtype | None, prefer_views: bool, vocab_size: int
) -> tuple[Backend, str | None]:
    """Pages where this model can use them, else mlx-lm's contiguous caches and one line that says why."""
    if not paged:
        return ContiguousBackend(model), "VLLM_METAL_USE_PAGED_ATTENTION=0: contiguous KV caches, no prefix cache"
    try:
        layers = probe_layers(model)
        backend = PagedBackend(model, layers, block_size, kv_dtype=kv_dtype, prefer_views=prefer_views)
    except UnsupportedCacheError as error:
        return ContiguousBackend(model), _fallback_line(f"its cache is {error}")
    try:
        difference = paging_difference(backend, model, vocab_size)
    except Exception as error:  # noqa: BLE001  (an architecture may object in any way; it still runs contiguously)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    else:
        if difference <= _TOLERANCE.get(layers[0].dtype if kv_dtype is None else kv_dtype, _LOOSE_TOLERANCE):
            return backend, None
        reason = f"its logits differ by {difference:.2g}"
    backend.close()
    return ContiguousBackend(model), _fallback_line(reason)


def _fallback_line(reason: str) -> str:
    return f"contiguous KV caches for this architecture, no prefix cache ({reason})"


def paging_difference(backend: PagedBackend, model: nn.Module, vocab_size: int) -> float:
    """Largest difference between paged and contiguous logits, relative to their spread.

    Two sequences prefill together and then decode together, so that positions, masks, scattered
    writes and gathered reads all take part.
    """
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, vocab_size, size).tolist() for size in _CHECK_LENGTHS]
    expected = mx.stack([model(mx.array([p]), cache=make_prompt_cache(model))[0, -1] for p in prompts])
    found = _run_paged(backend, prompts)
    difference = mx.abs(found.astype(mx.float32) - expected.astype(mx.float32)).max()
    spread = mx.maximum(mx.std(expected.astype(mx.float32)), 1e-6)
    return float(np.array(difference / spread))


def _run_paged(backend: PagedBackend, prompts: Sequence[list[int]]) -> mx.array:
    """Last logits of ``prompts``: all but the last token in one step, the last ones in another."""
    size = backend.pool.block_size
    backend.pool.grow(sum(-(-len(prompt) // size) for prompt in prompts))
    shares, first = [], 0
    for prompt in prompts:
        blocks = list(range(first, first + -(-len(prompt) // size)))
        shares.append((_request(prompt), blocks))
        first += len(blocks)
    for single in (False, True):
        step = [
            _share(request, blocks, request.num_prompt_tokens - 1 if single else 0, single)
            for request, blocks in shares
        ]
        batch = StepBatch.build(step)
        wanted = [np.array([share.num_tokens - 1], dtype=np.int32) for share in batch.shares]
        logits = backend.forward(batch, mx.array(batch.token_ids), wanted)
        mx.eval(logits)
    order = [request for request, _ in shares]
    rows = [next(i for i, share in enumerate(batch.shares) if share.request is request) for request in order]
    return logits[mx.array(rows)]


def _request(tokens: list[int]) -> Request:
    return Request("warm-up", tokens, SamplingParams(temperature=0))


def _share(request: Request, blocks: list[int], start: int, single: bool) -> ScheduledRequest:
    count = 1 if single else request.num_prompt_tokens - 1
    return ScheduledRequest(request, start, count, (blocks,), samples=single, pending=False)


@dataclass(frozen=True, slots=True)
class Overhead:
    """Bytes of a step beyond weights and pages: ``base + per_row x rows + per_pair x rows x context``."""

    base: float
    per_row: float
    per_pair: float

    def bytes(self, rows: int, context: int) -> int:
        """What a step of ``rows`` tokens attending over ``context`` tokens needs."""
        return round(max(0.0, self.base + self.per_row * rows + self.per_pair * rows * context))


def measure_overhead(backend: Backend, vocab_size: int) -> Overhead:
    """Run three small steps and read MLX's peak memory; larger steps follow by proportion."""
    peaks = [_peak(backend, rows, context, vocab_size) for rows, context in _NUM_SAMPLES]
    matrix = np.array([[1.0, rows, rows * context] for rows, context in _NUM_SAMPLES])
    base, per_row, per_pair = np.linalg.solve(matrix, np.array(peaks, dtype=float))
    return Overhead(max(0.0, base), max(0.0, per_row), max(0.0, per_pair))


def _peak(backend: Backend, rows: int, context: int, vocab_size: int) -> int:
    request = _request(np.random.default_rng(1).integers(0, vocab_size, context).tolist())
    start = context - rows
    blocks: list[int] = []
    if isinstance(backend, PagedBackend):
        blocks = list(range(-(-context // backend.pool.block_size)))
        backend.pool.grow(len(blocks))
    elif start:
        _compute(backend, ScheduledRequest(request, 0, start, (blocks,), samples=False, pending=False))
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    _compute(backend, ScheduledRequest(request, start, rows, (blocks,), samples=True, pending=False))
    peak = mx.get_peak_memory() - before
    backend.forget(request)
    return int(peak)


def _compute(backend: Backend, share: ScheduledRequest) -> None:
    batch = StepBatch.build([share])
    wanted = [np.array([share.num_tokens - 1], dtype=np.int32)]
    logits = backend.forward(batch, mx.array(batch.token_ids), wanted)
    backend.settle()
    mx.eval(logits)
