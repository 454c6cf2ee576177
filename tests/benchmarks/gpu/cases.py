"""The cases of the GPU suite: what is compared with what, and the ratio to reach."""

import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from tests.benchmarks.gpu import ours, theirs
from tests.benchmarks.gpu.engines import Engines
from tests.benchmarks.gpu.http_cases import http_results
from tests.benchmarks.gpu.replica_cases import replica_results
from tests.benchmarks.gpu.shapes import kv_bytes_per_token
from tests.benchmarks.gpu.sizes import Sizes
from tests.benchmarks.gpu.wide_cases import equal_results, wide_results
from tests.benchmarks.harness import Case, Result, run_case, take_turns
from tests.benchmarks.host_cases import host_cases
from tests.benchmarks.load_time import in_a_process

OURS, SLOW, BATCH, SINGLE = "LLM", "LLM, reference attention", "mlx-lm BatchGenerator", "mlx-lm generate_step"
Samples = Callable[[], Sequence[float]]

_DECODE = {1: 2.3, 8: 2.6, 32: 2.8, 64: 3.3}
_SHARE = {1: 0.55, 64: 0.5}
"""Of the speed at which weights and pages could be read."""
_DECODE_SLOW = {1: 1.7, 8: 3.0, 32: 8.0, 64: 10.0}
_PACKED = {1: 4.0, 8: 6.0, 32: 11.0}
_INT8 = {(32, 4096): 1.3}
_LONG = {(8, 8192): 2.5, (32, 4096): 3.5}
_SAMPLED = 0.9
_PROMPT = 1.0
_FIRST_WITHIN, _GAP_WITHIN = 2.0, 1.5
"""Chunks, behind a long prompt."""
_LOAD = {"empty": 1 / 2, "filled": 1 / 1.2}
_LOADED = {"ours": "LLM, until its first token", "theirs": "mlx-lm, until its first token"}
_MUCH = 2.5
"""Times their size, mlx-lm's caches need while rows are put together."""
_SALTS = itertools.count()


@dataclass(frozen=True)
class GpuCase:
    """Its name says what ``--only`` finds; ``run`` gives one result or several that share samples."""

    name: str
    run: Callable[[Engines], Iterator[Result]]


def gpu_cases(sizes: Sizes) -> Iterator[GpuCase]:
    """All cases, in the order in which the fewest weights are loaded twice."""
    yield GpuCase("load", _load)
    yield GpuCase("host work per step", _host)
    for rows in sizes.batches:
        yield GpuCase(f"decode, context {sizes.context}, batch {rows}", partial(_decode, rows))
    yield GpuCase(f"sampled beside greedy, batch {sizes.sampled_batch}", _sampled)
    yield GpuCase(f"prefill of {sizes.prompt} tokens", _prefill)
    yield GpuCase(f"behind a prompt of {sizes.long_prompt} tokens", _behind_long)
    yield GpuCase("shared prefix, {} requests of {} tokens".format(*sizes.shared), _shared)
    for rows, length in sizes.long:
        yield GpuCase(f"long, {rows} rows of {length}", partial(_long, rows, length))
        yield GpuCase(f"int8 pages, {rows} rows of {length}", partial(_int8, rows, length))
    yield GpuCase("replicas, two devices", replica_results)
    yield GpuCase(f"http, {sizes.clients} clients", http_results)
    for rows in sizes.packed_batches:
        yield GpuCase(f"4bit decode, context {sizes.context}, batch {rows}", partial(_packed, rows))
    for shape in sizes.wide:
        yield GpuCase(f"{shape}, tokens as mlx-lm's", partial(equal_results, shape))
        yield GpuCase(f"{shape} in 4 bits", partial(wide_results, shape))


def _steps_result(
    name: str, samples: Mapping[str, Sequence[float]], target: float | None, floor: float | None, **settings: Any
) -> Result:
    return Result(Case(name, "ms", "lower", {}, settings, target, floor), samples)


def _decode(rows: int, engines: Engines) -> Iterator[Result]:
    sizes = engines.sizes
    variants: dict[str, Samples] = {
        OURS: lambda: ours.decode_steps(engines.ours(), engines.prompts(rows, sizes.context), sizes.steps),
        BATCH: lambda: theirs.batch_steps(engines.theirs(), engines.prompts(rows, sizes.context), sizes.steps),
    }
    if sizes.slow_steps:
        variants[SLOW] = lambda: ours.decode_steps(
            engines.ours(backend="reference"), engines.prompts(rows, sizes.context), sizes.slow_steps
        )
    if rows == 1:
        variants[SINGLE] = lambda: theirs.single_steps(
            engines.theirs(), engines.prompts(1, sizes.context)[0], sizes.steps
        )
    samples = take_turns(variants, sizes.repeats)
    floor = engines.floor([sizes.context + sizes.steps // 2] * rows)
    name, facts = f"decode, context {sizes.context}, batch {rows}", {"rows": rows, "context": sizes.context}
    theirs_too = {key: values for key, values in samples.items() if key != SLOW}
    yield _steps_result(name, theirs_too, _DECODE.get(rows), floor, kind="decode", bits=16, **facts)
    if rows in _SHARE:
        beside = {OURS: samples[OURS], "the floor": [floor]}
        yield _steps_result(f"{name}, share of the floor", beside, _SHARE[rows], floor, kind="share", **facts)
    if not sizes.slow_steps:
        return
    slow_too = {key: samples[key] for key in (OURS, SLOW)}
    yield _steps_result(f"{name}, without kernels", slow_too, _DECODE_SLOW.get(rows), floor, kind="slow", **facts)


def _packed(rows: int, engines: Engines) -> Iterator[Result]:
    sizes = engines.sizes
    variants: dict[str, Samples] = {
        OURS: lambda: ours.decode_steps(engines.ours(True), engines.prompts(rows, sizes.context), sizes.steps),
        BATCH: lambda: theirs.batch_steps(engines.theirs(True), engines.prompts(rows, sizes.context), sizes.steps),
    }
    samples = take_turns(variants, sizes.repeats)
    floor = engines.floor([sizes.context + sizes.steps // 2] * rows, packed=True)
    name, facts = f"4bit decode, context {sizes.context}, batch {rows}", {"rows": rows, "context": sizes.context}
    yield _steps_result(name, samples, _PACKED.get(rows), floor, kind="decode", bits=4, **facts)


def _long(rows: int, length: int, engines: Engines) -> Iterator[Result]:
    """In turns where both fit at once; else one engine is closed for the other, which the settings say."""
    sizes = engines.sizes
    engines.close_slow()
    kv_bytes = rows * length * kv_bytes_per_token(sizes.shape)
    closed = []

    def batch() -> list[float]:
        closed.append(engines.make_room(int(_MUCH * kv_bytes)))
        return theirs.batch_steps(engines.theirs(), engines.prompts(rows, length), sizes.steps)

    variants: dict[str, Samples] = {
        OURS: lambda: ours.decode_steps(engines.ours(), engines.prompts(rows, length), sizes.steps),
        BATCH: batch,
    }
    samples = take_turns(variants, sizes.long_repeats)
    floor = engines.floor([length + sizes.steps // 2] * rows)
    facts = {"kind": "long", "rows": rows, "context": length, "closed_for_room": any(closed)}
    yield _steps_result(f"long, {rows} rows of {length}", samples, _LONG.get((rows, length)), floor, **facts)


def _int8(rows: int, length: int, engines: Engines) -> Iterator[Result]:
    """Steps over pages in int8 beside those over pages in bfloat16, in turns."""
    sizes = engines.sizes

    def measure(kv_cache_dtype: str) -> list[float]:
        llm = engines.ours(kv_cache_dtype=kv_cache_dtype)
        return ours.decode_steps(llm, engines.prompts(rows, length), sizes.steps)

    variants: dict[str, Samples] = {
        "LLM, int8 pages": partial(measure, "int8"),
        "LLM, bfloat16 pages": partial(measure, "auto"),
    }
    samples = take_turns(variants, sizes.long_repeats)
    floor = engines.floor([length + sizes.steps // 2] * rows)
    yield _steps_result(
        f"int8 pages, {rows} rows of {length}", samples, _INT8.get((rows, length)), floor, kind="int8", rows=rows,
        context=length, floor_of="bfloat16 pages",
    )  # fmt: skip


def _sampled(engines: Engines) -> Iterator[Result]:
    sizes, rows = engines.sizes, engines.sizes.sampled_batch
    engines.close_slow()

    def measure(params: ours.Params) -> list[float]:
        return ours.decode_steps(engines.ours(), engines.prompts(rows, sizes.context), sizes.steps, params)

    measure(ours.sampled)  # the first such step compiles
    variants: dict[str, Samples] = {
        "LLM, sampled": partial(measure, ours.sampled),
        "LLM, greedy": partial(measure, ours.greedy),
    }
    samples = take_turns(variants, sizes.repeats)
    floor = engines.floor([sizes.context + sizes.steps // 2] * rows)
    yield _steps_result(
        f"sampled beside greedy, batch {rows}", samples, _SAMPLED, floor, kind="sampled", rows=rows,
        context=sizes.context, sampling="temperature 0.7, top_p 0.8, top_k 20, presence_penalty 1.5, own seeds",
    )  # fmt: skip


def _prefill(engines: Engines) -> Iterator[Result]:
    sizes = engines.sizes
    engines.close_slow()
    variants: dict[str, Samples] = {
        OURS: lambda: [ours.first_token(engines.ours(), engines.prompts(1, sizes.prompt)[0])],
        SINGLE: lambda: [theirs.first_token(engines.theirs(), engines.prompts(1, sizes.prompt)[0])],
    }
    take_turns(variants, 1)  # each one's first chunk of this length compiles
    samples = take_turns(variants, sizes.prompt_repeats)
    floor = engines.prompt_floor(sizes.prompt)
    yield _steps_result(f"prefill of {sizes.prompt} tokens", samples, _PROMPT, floor, kind="prefill")


def _behind_long(engines: Engines) -> Iterator[Result]:
    """In units of chunks, measured in the same way with nothing waiting behind the long prompt.

    The first token in middle chunks, since the short request comes when half of the long prompt is done; the
    longest gap in longest chunks, since later chunks attend to more and take longer.
    """
    sizes = engines.sizes
    engines.close_slow()
    num_chunks = -(-sizes.long_prompt // sizes.chunk)
    alone: list[ours.BesideLong] = []
    beside: list[ours.BesideLong] = []
    first: list[ours.BesideLong] = []  # MLX plans its attention for each new length: 40 ms, on CUDA
    for turn in range(1 + sizes.long_repeats):
        for found, short_length in ((alone, 0), (beside, sizes.short_prompt)):
            found = found if turn else first
            running, (long,) = engines.prompts(sizes.running, sizes.context), engines.prompts(1, sizes.long_prompt)
            short = engines.prompts(1, short_length)[0] if short_length else None
            found.append(ours.beside_long(engines.ours(), running, long, num_chunks, short))
    chunks = [gap for run in alone for gap in run.gaps[2:]]  # the first two began before the prompt did
    middle, longest = median(chunks), max(chunks)
    facts = {
        "middle_chunk_ms": middle, "longest_chunk_ms": longest, "chunk_tokens": sizes.chunk, "chunks_ms": chunks,
        "first_time_ms": [run.gaps for run in first], "first_time_short_ms": first[1].short,
        "gaps_ms": [run.gaps for run in beside], "short_ms": [run.short for run in beside],
        "running": sizes.running, "short": sizes.short_prompt,
    }  # fmt: skip
    firsts = [run.short / middle for run in beside if run.short is not None]
    worst = [max(run.gaps) / longest for run in beside]
    for name, values, limit in (("first token", firsts, _FIRST_WITHIN), ("longest gap", worst, _GAP_WITHIN)):
        case = Case(
            f"behind a prompt of {sizes.long_prompt} tokens, {name}", "chunks", "lower", {}, facts | {"kind": name}, 1.0
        )
        yield Result(case, {OURS: values, "at most": [limit]})


def _shared(engines: Engines) -> Iterator[Result]:
    """Steps of requests with one long beginning in common; and their first tokens beside the same many of their own."""
    sizes = engines.sizes
    engines.close_slow()
    rows, common, own = sizes.shared
    times: dict[str, list[float]] = {"one beginning, cached": [], "one beginning, not yet cached": []}
    steps: list[float] = []
    for _ in range(sizes.long_repeats):
        (beginning,) = engines.prompts(1, common)
        prompts = [[*beginning, *rest] for rest in engines.prompts(rows, own)]
        salt = f"shared {next(_SALTS)}"
        times["one beginning, not yet cached"].append(ours.first_tokens(engines.ours(), prompts, salt))
        again = [[*beginning, *rest] for rest in engines.prompts(rows, own)]
        times["one beginning, cached"].append(ours.first_tokens(engines.ours(), again, salt))
        steps += ours.decode_steps(engines.ours(), again, sizes.steps, salt=salt)
    name = f"shared prefix, {rows} requests of {common} tokens"
    facts = {"rows": rows, "shared": common, "own": own}
    each = own + sizes.steps // 2
    floor = engines.floor([common, *[each] * rows])
    apart = engines.floor([common + each] * rows)
    yield _steps_result(name, {OURS: steps}, None, floor, kind="shared", floor_if_each_row_reads_its_own=apart, **facts)
    yield _steps_result(f"{name}, until all have their first", times, None, None, kind="shared first", **facts)


def _host(engines: Engines) -> Iterator[Result]:
    """What Python costs on this machine, which steps of few rows wait for."""
    for case in host_cases():
        yield run_case(case, repeats=engines.sizes.repeats)


def _load(engines: Engines) -> Iterator[Result]:
    """Until a first token, each load in a process of its own: with nothing compiled yet, then with all on disk."""
    engines.release()
    folder = str(engines.folder())
    parts: dict[str, dict[str, list[dict[str, float]]]] = {caches: {"ours": [], "theirs": []} for caches in _LOAD}
    for _ in range(engines.sizes.long_repeats):
        with tempfile.TemporaryDirectory() as kept:
            for caches, who in itertools.product(_LOAD, ("ours", "theirs")):
                parts[caches][who].append(in_a_process(who, folder, Path(kept) / who))
    for caches, target in _LOAD.items():
        case = Case(f"load, kernel caches {caches}", "s", "lower", {}, {"kind": "load", "parts": parts[caches]}, target)
        samples = {
            _LOADED[who]: [one["load"] + one["first token"] for one in all_of] for who, all_of in parts[caches].items()
        }
        yield Result(case, samples)
