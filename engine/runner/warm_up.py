"""First steps of a loaded model: that paging changes nothing, and what a step needs besides weights and pages."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from numpy.typing import NDArray

from engine.core.request import Request
from engine.core.step import ScheduledRequest
from engine.errors import error_line
from engine.memory.step_cost import StepCost
from engine.params.sampling_params import SamplingParams
from engine.runner.backends import Backend, ContiguousBackend
from engine.runner.device.devices import DeviceKind
from engine.runner.device.host import floats
from engine.runner.device.memory import (
    active_memory,
    clear_cache,
    is_out_of_memory,
    peak_memory,
    reset_peak_memory,
)
from engine.runner.kernels.self_check import AttentionKernels
from engine.runner.kernels.swapped_modules import SwappedModules
from engine.runner.kv.attention_calls import KernelChoice, choose_kernels
from engine.runner.kv.attention_metadata import MAX_VIEWS
from engine.runner.kv.input_batch import InputBatch
from engine.runner.kv.kv_pages import rounded
from engine.runner.kv.kv_spec import CacheTree, UnsupportedCacheError, flatten, group_leaves, probe_caches
from engine.runner.paged_backend import Calls, PagedBackend

_CHECK_LENGTHS = (21, 34, 21, 34, 3)
"""Tokens of each sequence; every length of its own takes a plan on CUDA, see :mod:`engine.runner.kv.attention_grid`."""
_TOLERANCE = 1e-3
_LOOSE_TOLERANCE = 0.3
"""Of the logits' spread: rounding in half precision, or in TF32 on GPUs, stays below (0.11 was the most seen), and so
does an element of a quantized page that falls to the other side of a step; a wrong mask or position does not (it
gave 4)."""
_ROUNDINGS = 4.0
"""Times the difference that rounding once makes: kernels round elsewhere than mlx-lm's code, in every layer. With
weights that nobody trained a Qwen3.5-35B-A3B differs by 4.5, since each router that turns turns others."""
_MAX_ROWS_ON_CUDA = 96
"""MLX 0.32.4's CUDA RoPE with an offset per row fails from 128 rows on."""
_LONGEST_SAMPLE: dict[DeviceKind, int] = {"cpu": 1024, "metal": 2048, "cuda": 4096}
"""Tokens of context of the longest measured step. A GPU's first steps are small change beside its kernels' own memory,
and few rows go other ways than many: what is measured there is nearer to the largest step."""


@dataclass(frozen=True, slots=True)
class _Way:
    """One way to run a model over pages."""

    calls: Calls
    kernels: KernelChoice | None = None
    compiled: bool = False


def choose_backend(
    model: nn.Module, *, paged: bool, block_size: int, kv_cache_dtype: str = "auto", device: DeviceKind,
    vocab_size: int, kernels: AttentionKernels | None = None, no_kernels: str = "",
) -> tuple[Backend, str | None]:  # fmt: skip
    """The first way to run this model that gives its own logits, and a line for the user where that is not paged.

    Pages read by ``kernels`` where they serve any layer; else one flat call per step over pages; else rectangular
    calls over pages and state slots; else mlx-lm's own contiguous caches. Each is tried on a few short sequences.
    ``no_kernels``: why there are none, for people.
    """
    exact = device == "cpu"
    if not paged:
        line = "VLLM_METAL_USE_PAGED_ATTENTION=0: contiguous KV caches, no prefix cache"
        return _contiguous(model, vocab_size, line, exact=exact)
    try:
        tree = probe_caches(model)
    except UnsupportedCacheError as error:
        return _contiguous(model, vocab_size, _fallback_line(f"its cache is {error}"), exact=exact)
    reason, choice = "", None
    rounding = cache(partial(sensitivity, model, vocab_size))  # the same for every way
    groups = group_leaves(flatten(tree))
    if kernels is not None:
        choice = choose_kernels(model, tree, groups, kernels, block_size=block_size, kv_cache_dtype=kv_cache_dtype)
    why = choice.reasons if choice is not None else (no_kernels,) * len(groups)
    for way in _ways(tree, choice, compiles=device != "cpu"):
        backend = PagedBackend(
            model, tree, block_size, calls=way.calls, kv_cache_dtype=kv_cache_dtype, max_views=MAX_VIEWS[device],
            max_rows=_MAX_ROWS_ON_CUDA if device == "cuda" else None, kernels=way.kernels, compiled=way.compiled,
            why_reference=why,
        )  # fmt: skip
        problem = _problem(backend, model, vocab_size, rounding, exact=exact)
        if problem is None:
            return backend, None
        backend.close()
        reason = problem
        if way.kernels is not None:
            why = tuple(said or f"with kernels {problem}" for said in way.kernels.reasons)
    return _contiguous(model, vocab_size, _fallback_line(reason), exact=exact)


def _ways(tree: CacheTree, choice: KernelChoice | None, *, compiles: bool) -> list[_Way]:
    """Ways to try, the fastest first."""
    recurrent = any(leaf.spec.recurrent for leaf in flatten(tree))
    plain: tuple[Calls, ...] = ("rectangles", "sequences") if recurrent else ("flat", "rectangles", "sequences")
    ways = [_Way(calls) for calls in plain]
    if choice is None or not choice.serves_any:
        return ways
    by_kernels = [_Way("rectangles", choice)]
    if compiles and choice.serves_all:
        by_kernels.insert(0, _Way("rectangles", choice, compiled=True))
    return [*by_kernels, *ways]


def _contiguous(model: nn.Module, vocab_size: int, line: str, *, exact: bool) -> tuple[Backend, str]:
    """mlx-lm's own caches; a call for each request where the model gives other logits to a batch."""
    backend = ContiguousBackend(model, line)
    problem = _problem(backend, model, vocab_size, partial(sensitivity, model, vocab_size), exact=exact)
    backend.reset()
    if problem is None:
        return backend, line
    backend.batches = False
    return backend, f"{line}; a call for each request (in a batch: {problem})"


def _problem(
    backend: PagedBackend | ContiguousBackend, model: nn.Module, vocab_size: int, rounding: Callable[[], float], *,
    exact: bool,
) -> str | None:  # fmt: skip
    """Why this backend does not give the model's own logits, or None. ``rounding``: see :func:`sensitivity`."""
    exact = exact and _in_float32(backend, model)
    try:
        difference = paging_difference(backend, model, vocab_size)
        if difference <= (_TOLERANCE if exact else _LOOSE_TOLERANCE):
            return None
        if not exact and difference <= _ROUNDINGS * rounding():
            return None
    except Exception as error:  # (an architecture may object in any way; it still runs contiguously)
        if is_out_of_memory(error):  # which says nothing of the architecture, and a slower way would stay for good
            raise
        return error_line(error, 80)
    return f"its logits differ by {difference:.2g}"


def _in_float32(backend: PagedBackend | ContiguousBackend, model: nn.Module) -> bool:
    """Whether nothing that is kept is coarser: of pages and of states, or of what contiguous caches are made from."""
    if isinstance(backend, PagedBackend):
        leaves = [leaf for group in backend.groups for leaf in group]
        kinds = [leaf.shape.dtype for leaf in leaves if leaf.shape is not None]
        kinds += [dtype for leaf in leaves for _, dtype in leaf.states]
        return set(kinds) <= {mx.float32} and backend.kv_cache_dtype in ("auto", "float32")
    weights = [value.dtype for _, value in tree_flatten(model.parameters())]
    return all(kind == mx.float32 for kind in weights if mx.issubdtype(kind, mx.floating))


def _fallback_line(reason: str) -> str:
    return f"contiguous KV caches for this architecture, no prefix cache ({reason})"


def paging_difference(backend: PagedBackend | ContiguousBackend, model: nn.Module, vocab_size: int) -> float:
    """Largest difference between a backend's logits and those of single sequences, relative to their spread.

    Several sequences prefill together and then decode together, so that positions, masks, scattered
    writes and gathered reads all take part. Where pages round what they keep, the contiguous caches hold
    the same rounded values, so that only what paging itself changes is seen.
    """
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, vocab_size, size).tolist() for size in _CHECK_LENGTHS]
    kv_cache_dtype = backend.kv_cache_dtype if isinstance(backend, PagedBackend) else "auto"
    caches = [rounded(make_prompt_cache(model), kv_cache_dtype) for _ in prompts]
    wanted = np.stack([_last_logits(model, prompt, cache) for prompt, cache in zip(prompts, caches, strict=True)])
    found = floats(_run_batched(backend, prompts))
    finite = np.isfinite(wanted)  # some models rule tokens out with -inf
    if (finite != np.isfinite(found)).any():
        return math.inf
    return float(np.abs(found[finite] - wanted[finite]).max() / max(wanted[finite].std(), 1e-6))


def sensitivity(model: nn.Module, vocab_size: int) -> float:
    """Largest difference that rounding once makes to a model's own logits, relative as :func:`paging_difference`.

    The vectors of the tokens are moved by up to half of what their element type can tell apart.
    """
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, vocab_size, size).tolist() for size in _CHECK_LENGTHS[:2]]
    usual = np.stack([_last_logits(model, prompt, make_prompt_cache(model)) for prompt in prompts])
    tables = SwappedModules()
    for _, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
            tables.swap_method(module, "__call__", _moved(type(module)))
    try:
        moved = np.stack([_last_logits(model, prompt, make_prompt_cache(model)) for prompt in prompts])
    finally:
        tables.undo()
    finite = np.isfinite(usual) & np.isfinite(moved)
    return float(np.abs(moved[finite] - usual[finite]).max() / max(usual[finite].std(), 1e-6))


def _moved(kind: type[nn.Module]) -> Callable[..., mx.array]:
    def call(self: nn.Module, tokens: mx.array) -> mx.array:
        rows: mx.array = kind.__call__(self, tokens)
        step = 2.0**-8 if rows.dtype == mx.bfloat16 else 2.0**-11
        moves = mx.random.uniform(-step, step, rows.shape, key=mx.random.key(0))
        return (rows.astype(mx.float32) * (1.0 + moves)).astype(rows.dtype)

    return call


def _last_logits(model: nn.Module, prompt: list[int], cache: list[Any]) -> NDArray[np.float32]:
    """Of one sequence alone, computed before anything else is built."""
    return floats(model(mx.array([prompt]), cache=cache)[0, -1])


def _run_batched(backend: Backend, prompts: Sequence[list[int]]) -> mx.array:
    """Last logits of ``prompts``: all but the last token in one step, the last ones in another."""
    sequences, first = [], 0
    for number, prompt in enumerate(prompts):
        count = -(-len(prompt) // backend.block_size)
        sequences.append((_request(prompt), _tables(backend, number, range(first, first + count))))
        first += count
    for single in (False, True):
        step = [_scheduled(request, tables, single) for request, tables in sequences]
        batch = InputBatch.build(step)
        backend.make_room(batch, [max(first, len(prompts))] * len(sequences[0][1]))
        wanted = [np.array([scheduled.num_tokens - 1], dtype=np.int32) for scheduled in batch.scheduled_requests]
        logits = backend.forward(batch, mx.array(batch.token_ids), wanted)
        backend.settle()
        mx.eval(logits)
    row_of = {scheduled.request: row for row, scheduled in enumerate(batch.scheduled_requests)}
    return logits[mx.array([row_of[request] for request, _ in sequences])]


def _tables(backend: Backend, number: int, blocks: range) -> tuple[list[int], ...]:
    """Block tables of one sequence: ``blocks`` where pages are kept, the slot ``number`` where states are."""
    if not isinstance(backend, PagedBackend):
        return ([],)
    return tuple(list(blocks) if leaves[0].spec.paged else [number] for leaves in backend.groups)


def _request(tokens: list[int]) -> Request:
    """A prompt of all tokens but the last, which counts as generated."""
    return Request("warm-up", tokens[:-1], SamplingParams(temperature=0), output_token_ids=tokens[-1:])


def _scheduled(request: Request, tables: tuple[list[int], ...], single: bool) -> ScheduledRequest:
    start, count = (request.num_prompt_tokens, 1) if single else (0, request.num_prompt_tokens)
    return ScheduledRequest(request, start, count, tables, samples=single, pending=False)


def measure_step_cost(
    backend: Backend, vocab_size: int, *, device: DeviceKind = "cpu", context_length: int | None = None
) -> StepCost:
    """Run a few steps and read MLX's peak memory; larger steps follow by proportion.

    None is longer than ``context_length``. On a GPU each runs twice: a first one also sets kernels up.
    """
    samples = _samples(device, context_length)[: 4 if isinstance(backend, PagedBackend) else 3]
    for rows, context in samples if device != "cpu" else ():
        _peak(backend, rows, context, vocab_size)
    peaks = [_peak(backend, rows, context, vocab_size) for rows, context in samples]
    terms = np.array([[1.0, rows, rows * context, context] for rows, context in samples])[:, : len(samples)]
    return StepCost(*(max(0.0, float(term)) for term in np.linalg.solve(terms, np.array(peaks, dtype=float))))


def _samples(device: DeviceKind, context_length: int | None) -> list[tuple[int, int]]:
    """(rows, context) of the measured steps; the last one over pages only, where reading may copy or unpack."""
    longest = min(_LONGEST_SAMPLE[device], context_length or _LONGEST_SAMPLE[device])
    many, few = (longest // 16, longest // 64) if device == "cpu" else (longest // 4, longest // 16)
    few, many = max(1, few), max(2, many)
    return [(few, few), (many, many), (many, max(longest, 3)), (few, max(longest, 3))]


def _peak(backend: Backend, rows: int, context: int, vocab_size: int) -> int:
    request = _request(np.random.default_rng(1).integers(0, vocab_size, context).tolist())
    start = context - rows
    tables = _tables(backend, 0, range(-(-context // backend.block_size)))
    if start and not isinstance(backend, PagedBackend):  # pages may hold anything, caches must be as long as they say
        _compute(backend, ScheduledRequest(request, 0, start, tables, samples=False, pending=False))
    scheduled = ScheduledRequest(request, start, rows, tables, samples=True, pending=False)
    backend.make_room(InputBatch.build([scheduled]), [max(1, *map(len, tables))] * len(tables))
    clear_cache()
    reset_peak_memory()
    before = active_memory()
    _compute(backend, scheduled)
    peak = peak_memory() - before
    backend.forget(request)
    return peak


def _compute(backend: Backend, scheduled: ScheduledRequest) -> None:
    batch = InputBatch.build([scheduled])
    wanted = [np.array([scheduled.num_tokens - 1], dtype=np.int32)]
    logits = backend.forward(batch, mx.array(batch.token_ids), wanted)
    backend.settle()
    mx.eval(logits)
