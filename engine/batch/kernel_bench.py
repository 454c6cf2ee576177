"""Are the attention kernels right on this device, and how fast? Over a loaded model's shapes, or over common ones."""

import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from engine.batch.bench import installed_versions, processor
from engine.batch.build import build
from engine.runner.device.devices import describe_device, prepare_backend
from engine.runner.device.faults import check_device, device_failure
from engine.runner.device.memory import FreeMemory, clear_cache
from engine.runner.device.threads import MLXWorker

if TYPE_CHECKING:
    from engine.runner.kernels.bench import KernelRow
    from engine.runner.kernels.self_check import AttentionShape
    from engine.runtime.engine_thread import EngineThread

T = TypeVar("T")
NO_GPU = (
    "no GPU: MLX computes on the CPU here, attention included. On a Mac or an NVIDIA GPU this checks the kernels "
    "that read KV pages in place against a float32 reference, and times them."
)
TIMING_BYTES = 1_200_000_000
"""What timing needs beside one layer's pages: those of other layers, and what shows how fast the memory is."""
NO_ROOM = "{:.1f} GB are free on the device: {} timed; without a model there is more room"
NO_SHAPES = "no kernel is made for any layer of this model; without a model, common shapes are checked"


class OnThread(Protocol):
    """Runs functions on the thread that owns MLX."""

    def __call__(self, function: Callable[[], T], /) -> T:
        """Run ``function`` there and give its result."""


Shapes = Sequence[tuple[str, "AttentionShape"]]
"""Shapes under the names of the models that have them."""


@dataclass
class KernelBenchResult:
    """Rows as they were measured, and what they depend on. ``complete`` is False until all is measured."""

    facts: Mapping[str, str]
    rows: list["KernelRow"] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    complete: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for a file."""
        return asdict(self)


class KernelBench:
    """Checks and times the kernels at ``shapes``. Iterating :meth:`run` gives rows as they come, all in ``result``.

    ``on_thread`` runs functions on the thread that owns MLX, one for each row, so that an engine takes its steps in
    between; None: there is no engine, and a thread is made for it.
    """

    def __init__(self, model: str, shapes: Shapes, on_thread: OnThread | None = None) -> None:
        self.result = KernelBenchResult({})
        self._model = model
        self._shapes = shapes
        self._on_thread = on_thread

    def run(self) -> Iterator["KernelRow"]:
        """Check and measure; nothing where there is no GPU, of which a note tells."""
        with _worker() if self._on_thread is None else nullcontext(self._on_thread) as on_thread:
            if on_thread(kernels_here):
                self.result.facts = {"shapes of": self._model, **on_thread(describe)}
                yield from self._measure(on_thread)
            else:
                self.result.notes.append(NO_GPU)
        self.result.complete = True

    def _measure(self, on_thread: OnThread) -> Iterator["KernelRow"]:
        if not self._shapes:
            self.result.notes.append(NO_SHAPES)
        free = on_thread(free_memory)
        if any(len(parts(shape, free)) < len(parts(shape)) for _, shape in self._shapes):
            what = "kernels are checked but not" if free < TIMING_BYTES else "the largest cases are not"
            self.result.notes.append(NO_ROOM.format(free / 1e9, what))
        for name, shape in self._shapes:
            for part in parts(shape, free):
                rows = on_thread(partial(measure, name, shape, part))
                self.result.rows += rows
                yield from rows
                if any(row.problem for row in rows):
                    break  # how fast a wrong kernel is does not matter
        if any(row.microseconds for row in self.result.rows):
            self.result.facts = {**self.result.facts, "memory": on_thread(read_speed)}


def kernels_here() -> bool:
    """Whether there is a GPU that kernels can run on."""
    from engine.runner.kernels.dialect import kernels_available

    return kernels_available()


@dataclass(frozen=True, slots=True)
class Part:
    """What is timed in one go: decodes of (rows, tokens), or a chunk of (tokens, tokens with those before it)."""

    decodes: tuple[tuple[int, int], ...] = ()
    chunk: tuple[int, int] | None = None


def parts(shape: "AttentionShape", free: float = math.inf) -> list[Part]:
    """What there is to time in ``free`` bytes; one part without times where there is no room for any."""
    from engine.runner.kernels.bench import CHUNK, DECODES

    row = shape.kv_heads * (shape.key_dim + shape.value_dim) * shape.dtype.size  # of plain pages, the most
    wanted = [(rows * tokens, Part(decodes=((rows, tokens),))) for rows, tokens in DECODES]
    wanted.append((CHUNK[1], Part(chunk=CHUNK)))
    return [part for slots, part in wanted if TIMING_BYTES + 2 * slots * row <= free] or [Part()]


def measure(name: str, shape: "AttentionShape", part: Part) -> list["KernelRow"]:
    """Check the kernels at ``shape``, and time ``part``. DeviceFailedError: one of them left the device useless."""
    from engine.runner.kernels.bench import KernelRow, kernel_report

    rows = kernel_report(name, shape, part.decodes, part.chunk) or [KernelRow("attention", name, None)]
    clear_cache()
    for row in rows:
        failure = device_failure(RuntimeError(row.problem)) if row.problem else None
        if failure is not None:
            raise failure
    return rows


def read_speed() -> str:
    """What the floors were reckoned with."""
    from engine.runner.kernels.bench import bytes_per_second

    return f"{bytes_per_second() / 1e9:.0f} GB/s to a kernel that only reads"


def free_memory() -> int:
    """Bytes that this process may still take on the device."""
    return FreeMemory(describe_device())()


def describe() -> dict[str, str]:
    """What the figures depend on. On the thread that owns MLX."""
    device = describe_device()
    return {
        "device": f"{device.name} ({device.kind})",
        "machine": f"{processor()}, {platform.platform()}",
        "versions": f"vm-magic {build()}; {installed_versions()}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@contextmanager
def _worker() -> Iterator[OnThread]:
    with MLXWorker("vm-kernels") as worker:
        yield worker.call


def bench_model_kernels(name: str, thread: "EngineThread") -> KernelBench:
    """A :class:`KernelBench` over the shapes of the model that ``thread`` runs, between its steps."""
    backend = thread.call(lambda engine: engine.runner.backend)
    shapes = thread.call(lambda _: _shapes_of(backend))
    return KernelBench(name, [(name, shape) for shape in shapes], lambda function: thread.call(lambda _: function()))


def _shapes_of(backend: Any) -> list["AttentionShape"]:
    from engine.runner.kv.attention_calls import kernel_shapes

    return kernel_shapes(backend.model, backend.block_size, getattr(backend, "kv_cache_dtype", "auto"))


def bench_kernels() -> KernelBench:
    """A :class:`KernelBench` over common shapes, without a model."""
    check_device()
    prepare_backend()  # before anything imports mlx
    from engine.runner.kernels.common_shapes import common_shapes

    return KernelBench("common models", common_shapes())
