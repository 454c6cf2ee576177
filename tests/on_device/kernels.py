"""``python3 -m tests.on_device.kernels``: the attention kernels on this machine's GPU. Under 80 seconds.

Needs mlx and numpy alone. Prints a line for each check and a table of times; exits 1 where a kernel is wrong.
"""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np

from engine.runner.kernels.bench import CHUNK, DECODES, KernelRow, bytes_per_second, kernel_report, seconds_of
from engine.runner.kernels.dialect import kernels_available
from engine.runner.kernels.paged_attention import arrival_counters, blocks_at_once, collect, paged_attention
from engine.runner.kernels.reference import attention
from engine.runner.kernels.self_check import GPU_KERNELS, TOLERANCE, AttentionShape, attention_problem

RAGGED = (513, 0, 17, 255, 16, 1030)
LONG = (20000, 0, 5)


def shape(dtype: mx.Dtype, dims: int | tuple[int, int], group: int, kv_heads: int = 2, **more: Any) -> AttentionShape:
    """Layers of ``group`` query heads to each of ``kv_heads``."""
    key_dim, value_dim = (dims, dims) if isinstance(dims, int) else dims
    return AttentionShape(
        dtype=dtype, heads=group * kv_heads, kv_heads=kv_heads, key_dim=key_dim, value_dim=value_dim,
        **{"block_size": 16, **more},
    )  # fmt: skip


BF16, F16, F32 = mx.bfloat16, mx.float16, mx.float32
SHAPES: dict[str, tuple[AttentionShape, tuple[int, ...]]] = {
    "llama, qwen3": (shape(BF16, 128, 4), RAGGED),
    "llama, qwen3, 20000 tokens": (shape(BF16, 128, 4), LONG),
    "llama, qwen3, 64 rows": (shape(BF16, 128, 4), (700, 0, *range(3, 65 * 9, 9))),
    "window 100": (shape(BF16, 128, 4, window=100), RAGGED),
    "window 4096, longer than rows": (shape(BF16, 128, 4, window=4096), RAGGED),
    "gpt-oss, sliding": (shape(BF16, 64, 8, window=128, sinks=True), RAGGED),
    "gpt-oss, full": (shape(BF16, 64, 8, sinks=True), RAGGED),
    "gemma 2": (shape(BF16, 256, 2, softcap=50.0, window=200, scale=224**-0.5), RAGGED),
    "gemma 3": (shape(BF16, 256, 2, window=1024), ()),
    "gemma 4, full": (shape(BF16, 512, 8), RAGGED),
    "qwen3.5": (shape(BF16, 256, 8), RAGGED),
    "16 heads of 512": (shape(BF16, 512, 16), ()),
    "phi 3": (shape(BF16, 96, 1), RAGGED),
    "keys of 192, values of 128": (shape(BF16, (192, 128), 1), RAGGED),
    **{f"{group} heads of 128 each": (shape(BF16, 128, group), ()) for group in (1, 2, 3, 5, 7, 8, 12, 16)},
    "float16": (shape(F16, 128, 4), RAGGED),
    "float16, 64": (shape(F16, 64, 1, 3), ()),
    "float32": (shape(F32, 128, 4), RAGGED),
    "smollm2 in float32": (shape(F32, 64, 3), RAGGED),
    "float32, 256, cap": (shape(F32, 256, 8, softcap=30.0), ()),
    "float32, 512": (shape(F32, 512, 2), ()),
    "float32, 96, window": (shape(F32, 96, 2, window=64), ()),
    "float32, 16": (shape(F32, 16, 2), ()),
    "blocks of 8": (shape(BF16, 128, 4, block_size=8), ()),
    "blocks of 32": (shape(BF16, 128, 4, block_size=32), ()),
}
SPLIT = {"8 x 4 heads of 128": (8, 4, 128), "2 x 8 heads of 256": (2, 8, 256), "2 x 8 heads of 512": (2, 8, 512)}
TIMED = {"128 of 4, bf16": shape(BF16, 128, 4, 8), "128 of 8, bf16": shape(BF16, 128, 8, 8)}


def main() -> int:
    """Every check; 1 if one failed."""
    if not kernels_available():
        say("no GPU: MLX computes on the CPU here")
        return 1
    info = mx.device_info()
    say(f"{info['device_name']} {info['architecture']}, MLX {version('mlx')}, {blocks_at_once()} blocks at once")
    failed = [*timed("compile", compile_kernels), *timed("shapes", check_shapes)]
    failed += timed("chunks", check_chunks) + timed("order", check_order) + timed("splits", check_splits)
    failed += timed("times", times)
    say(f"{'FAILED: ' + ', '.join(failed) if failed else 'all right'}")
    return int(bool(failed))


def say(line: str) -> None:
    """Print at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def timed(name: str, check: Callable[[], list[str]]) -> list[str]:
    """What failed of ``check``."""
    started = time.perf_counter()
    failed = check()
    say(f"     {name}: {time.perf_counter() - started:.1f} s")
    return failed


def verdict(name: str, problem: str | None) -> list[str]:
    """Say how a check went; its name if it failed."""
    say(f"{'FAIL' if problem else 'ok  '} {name}{': ' + problem if problem else ''}")
    return [name] if problem else []


def compile_kernels() -> list[str]:
    """All of them, several at a time."""
    GPU_KERNELS.compile_all({one for one, _ in SHAPES.values()})
    return []


def check_shapes() -> list[str]:
    """The self-check, over more lengths than at load."""
    failed = []
    for name, (one, lengths) in SHAPES.items():
        failed += verdict(f"{name}: {one.dtype} {one.key_dim}/{one.value_dim}", attention_problem(one, lengths=lengths))
    return failed


def check_chunks() -> list[str]:
    """``collect`` of a long chunk over shuffled blocks."""
    failed = []
    for begin, start, num_new in ((0, 6000, 2048), (2999, 7000, 513), (0, 0, 4096)):
        problem = chunk_problem(begin, start, num_new)
        failed += verdict(f"collect {num_new} tokens from {start}, seen from {begin}", problem)
    return failed


def chunk_problem(begin: int, start: int, num_new: int) -> str | None:
    """Compared bit for bit, in all slots."""
    rng, end = np.random.default_rng(begin + start), start + num_new
    blocks = rng.permutation(math.ceil(end / 16) + 5)[: math.ceil(end / 16)]
    slots = (blocks[np.arange(end) // 16] * 16 + np.arange(end) % 16)[begin:]
    table = np.where(np.arange(len(blocks)) < begin // 16, 0, blocks).astype(np.int32)
    rows: list[mx.array] = []
    pages: list[mx.array] = []
    expected: list[np.ndarray[Any, Any]] = []
    for dim in (128, 64):
        new, known = random(rng, 1, 8, num_new, dim)
        _, old = random(rng, 1, 8, math.ceil(end / 16) * 16 + 80, dim)
        page = mx.array(old).astype(BF16)
        mx.eval(page)
        old[:, :, slots[start - begin :]] = known
        rows, pages, expected = [*rows, new], [*pages, page], [*expected, old]
    span = mx.array([begin, start, 0, 0], mx.int32) + 0
    got = collect(
        rows[0], rows[1], pages[0], pages[1], mx.array(table) + 0, span, block_size=16, length=end - begin
    )  # fmt: skip
    mx.eval(got)
    for name, one, page, wanted in zip(("keys", "values"), got, pages, expected, strict=True):
        if not np.array_equal(floats(one), wanted[:, :, slots]):
            return f"{name} are wrong"
        if not np.array_equal(floats(page + after(got[0]).astype(BF16)), wanted):
            return f"pages of the {name} are wrong"
    return None


def random(rng: np.random.Generator, *sizes: int) -> tuple[mx.array, np.ndarray[Any, Any]]:
    """Rows in bfloat16, and the same in float32."""
    array = mx.array(rng.standard_normal(sizes, dtype=np.float32)).astype(BF16)
    return array, floats(array)


def floats(array: mx.array) -> np.ndarray[Any, Any]:
    """In numpy, as float32."""
    return np.array(array.astype(mx.float32))


def after(earlier: mx.array) -> mx.array:
    """Zero, once ``earlier`` is there."""
    first = earlier.reshape(-1)[:1]
    return (first != first).astype(mx.int32) * 0


def check_order() -> list[str]:
    """Many launches at a time over blocks that are freed and taken at once: right where data orders them."""
    failed = []
    chained = partial(ordered, arrivals=arrival_counters())
    for name, launch in (("ordered by data", chained), ("ordered by data and compiled", mx.compile(chained))):
        wrong, number = Steps(launch).run()
        failed += verdict(f"{number} launches, 24 at a time, {name}", f"{wrong} wrong" if wrong else None)
    wrong, number = Steps(unordered).run()
    say(f"info {number} launches, 24 at a time, NOT ordered by data: {wrong} wrong (shows that order matters)")
    return failed


def ordered(
    newest: mx.array, queries: mx.array, keys: mx.array, *others: mx.array, arrivals: mx.array | None
) -> mx.array:
    """A launch that takes its keys once ``newest`` is there."""
    keys = mx.where(newest.reshape(-1)[:1] == 0, keys, keys)
    return paged_attention(queries, keys, *others, scale=128**-0.5, block_size=16, arrivals=arrivals)


def unordered(_newest: mx.array, *arrays: mx.array) -> mx.array:
    """A launch that waits for none."""
    return paged_attention(*arrays, scale=128**-0.5, block_size=16)


@dataclass
class Steps:
    """Sequences that grow token by token over three layers' pages, end, and hand their blocks to the next."""

    launch: Callable[..., mx.array]
    rows: int = 4
    heads: int = 16
    kv_heads: int = 4
    dim: int = 128
    layers: int = 3
    width: int = 12
    blocks: int = 40
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(3))

    def run(self, steps: int = 160, per_eval: int = 8) -> tuple[int, int]:
        """Wrong launches, and launches."""
        sizes = (1, self.kv_heads, self.blocks * 16, self.dim)
        pages = [[mx.full(sizes, math.nan, BF16) for _ in range(2)] for _ in range(self.layers)]
        mx.eval(pages)
        self.free = self.rng.permutation(self.blocks).tolist()
        self.tables: list[list[int]] = [[] for _ in range(self.rows)]
        self.lengths, self.ends = [0] * self.rows, [self._end() for _ in range(self.rows)]
        self.seen: list[list[list[np.ndarray[Any, Any]]]] = [[[] for _ in range(self.rows)] for _ in range(self.layers)]
        newest, wrong = mx.zeros((8,), BF16), 0
        waiting: list[tuple[mx.array, np.ndarray[Any, Any]]] = []
        for step in range(1, steps + 1):
            tables, positions = self._advance()
            for layer in range(self.layers):
                newest, wanted = self._launch(layer, pages[layer], tables, positions, newest)
                waiting.append((newest, wanted))
            if step % per_eval == 0:
                mx.eval([out for out, _ in waiting])
                wrong += sum(not close(floats(out)[:, :, 0], wanted) for out, wanted in waiting)
                waiting = []
        return wrong, steps * self.layers

    def _end(self) -> int:
        return int(self.rng.integers(5, self.width * 16))

    def _advance(self) -> tuple[mx.array, mx.array]:
        """One token more in each row; one that has ended gives its blocks back, and they are taken first."""
        for row in range(self.rows):
            if self.lengths[row] >= self.ends[row]:
                self.free[:0], self.tables[row] = self.tables[row], []
                self.lengths[row], self.ends[row] = 0, self._end()
                for layer in self.seen:
                    layer[row] = []
            if self.lengths[row] % 16 == 0:
                self.tables[row].append(self.free.pop(0))
            self.lengths[row] += 1
        padded = [table + [0] * (self.width - len(table)) for table in self.tables]
        return mx.array(padded, mx.int32) + 0, mx.array([length - 1 for length in self.lengths], mx.int32) + 0

    def _launch(
        self, layer: int, pages: list[mx.array], tables: mx.array, positions: mx.array, newest: mx.array
    ) -> tuple[mx.array, np.ndarray[Any, Any]]:
        """A layer's output, not yet computed, and what it should be."""
        queries, known_queries = random(self.rng, self.rows, self.heads, 1, self.dim)
        (keys, known_keys), (values, known_values) = (
            random(self.rng, self.rows, self.kv_heads, 1, self.dim) for _ in range(2)
        )
        out = self.launch(newest, queries, keys, values, pages[0], pages[1], tables, positions)
        wanted = []
        for row in range(self.rows):
            self.seen[layer][row].append(np.stack([known_keys[row], known_values[row]]))
            history = np.concatenate(self.seen[layer][row], axis=2)
            wanted.append(attention(known_queries[row, :, 0], history[0], history[1], scale=self.dim**-0.5))
        return out, np.stack(wanted)


def close(got: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> bool:
    """Within bfloat16's rounding."""
    return float(np.linalg.norm(got - wanted)) < TOLERANCE[BF16] * float(np.linalg.norm(wanted))


def check_splits() -> list[str]:
    """Splits that the last block joins, beside a second launch that does: the same bits? And what each takes."""
    arrivals, failed = arrival_counters(), list[str]()
    if arrivals is None:
        return failed
    for name, sizes in SPLIT.items():
        for rows, tokens in ((1, 512), (1, 4096), (1, 32768), (8, 1024), (8, 8192)):
            case = SplitCase(rows, tokens, *sizes)
            wanted, *found = (floats(case.launch(given, case.splits)) for given in (None, arrivals, arrivals))
            same = all(np.array_equal(wanted, one) for one in found)
            failed += verdict(f"{name}, {rows} x {tokens}: splits joined", None if same else "other bits")
            for said, given in (("a second launch", None), ("the last block", arrivals)):
                build = partial(case.chain, given)
                on_gpu, whole = seconds_of(build) / case.CHAIN, wall_seconds(build) / case.CHAIN
                say(f"     {said}: {on_gpu * 1e6:.1f} us on the GPU, {whole * 1e6:.1f} us with the host's")
    return failed


class SplitCase:
    """Rows of one length, whose pages lie one behind the other."""

    CHAIN = 40
    """Launches that are timed together."""

    def __init__(self, rows: int, tokens: int, kv_heads: int, group: int, dim: int) -> None:
        self.splits = max(2, min(blocks_at_once() // (rows * kv_heads), tokens // 64))
        self.queries = mx.random.normal((rows, kv_heads * group, 1, dim)).astype(BF16)
        shapes = 2 * [(rows, kv_heads, 1, dim)] + 2 * [(1, kv_heads, rows * tokens, dim)]
        tables = mx.arange(rows * tokens // 16, dtype=mx.int32).reshape(rows, -1)
        positions = mx.full((max(rows, 8),), tokens - 1, mx.int32) + 0
        self.others = [*(mx.random.normal(shape).astype(BF16) for shape in shapes), tables, positions]
        mx.eval(self.queries, self.others)

    def launch(self, arrivals: mx.array | None, splits: int | None, queries: mx.array | None = None) -> mx.array:
        """Attention of ``queries``, or of the case's own."""
        given = self.queries if queries is None else queries
        return paged_attention(given, *self.others, scale=0.1, block_size=16, splits=splits, arrivals=arrivals)

    def chain(self, arrivals: mx.array | None) -> list[mx.array]:
        """Launches that follow each other, as a model's layers do."""
        queries = self.queries
        for _ in range(self.CHAIN):
            queries = self.launch(arrivals, None, queries)
        return [queries]


def wall_seconds(build: Callable[[], list[mx.array]]) -> float:
    """From asking to having, the best of some."""
    found = []
    for _ in range(7):
        started = time.perf_counter()
        mx.eval(build())
        found.append(time.perf_counter() - started)
    return min(found)


def times() -> list[str]:
    """One table: microseconds of a layer, the floor, and bytes per second."""
    say(f"     memory gives {bytes_per_second() / 1e12:.2f} TB/s to a kernel that only reads")
    failed = []
    for name, one in TIMED.items():
        for row in kernel_report(name, one, DECODES, CHUNK):
            say(time_line(row))
            failed += [row.shape] if row.problem else []
    return failed


def time_line(row: KernelRow) -> str:
    """A row of the table."""
    if row.microseconds is None or row.floor_microseconds is None:
        return f"FAIL {row.kernel} {row.shape}: {row.problem}"
    return (
        f"     {row.kernel:9} {row.shape:26} {row.microseconds:8.1f} us, floor {row.floor_microseconds:7.1f}, "
        f"{row.share:5.0%} of it, {row.gigabytes_per_second:6.0f} GB/s"
    )


if __name__ == "__main__":
    sys.exit(main())
