"""``bench``: the speed of the loaded model."""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from engine.errors import ConfigError
from engine.format.text import count_text
from vm_magic.commands.base import Context, LineCommand
from vm_magic.commands.parser import CommandParser, pick
from vm_magic.show.errors import Interrupted
from vm_magic.show.progress import bar_for
from vm_magic.show.tables import Table
from vm_magic.show.terminal import say
from vm_magic.state import session as sessions

if TYPE_CHECKING:
    from engine.batch.bench import BenchResult, BenchRow
    from engine.batch.kernel_bench import KernelBenchResult
    from engine.llm import LLM
    from engine.runner.kernels.bench import KernelRow

R = TypeVar("R")
T = TypeVar("T", bound=Table)
HEADER = ("case", "prompt", "batch", "first token", "tokens/s", "per request", "of the device")
KERNEL_HEADER = ("kernel", "shape", "right", "µs", "floor", "of floor")
_FLAGS = {"seconds": "seconds", "batch": "batch_sizes"}
"""Flags about the model's speed, and the names of :meth:`engine.llm.LLM.bench` for them."""


class Bench(LineCommand):
    """Measures the loaded model."""

    help = "speed of the loaded model, as one table; or whether GPU kernels are right here, and how fast (--kernels)"
    needs_kernel = "measures the model in this kernel (vllm bench serve measures a server)"

    def add_arguments(self, parser: CommandParser) -> None:
        """How long, and which batch sizes."""
        from engine.batch.bench import DEFAULT_BATCHES, DEFAULT_SECONDS

        sizes = ",".join(map(str, DEFAULT_BATCHES))
        absent = argparse.SUPPRESS
        parser.add_argument(
            "--seconds", type=float, default=absent, metavar="N", help=f"about how long ({DEFAULT_SECONDS:g})"
        )
        parser.add_argument(
            "--batch", type=_sizes, default=absent, metavar="N,N", help=f"batch sizes to decode at ({sizes})"
        )
        parser.add_argument(
            "--kernels",
            action="store_true",
            help="check and time the kernels that read KV pages on this device's GPU, at the loaded model's shapes, or "
            "at common ones; the table can be pasted into a report",
        )
        parser.epilog = (
            "Random prompts, which reuse nothing, fill no prefix cache and are not remembered by explain; they count "
            "in\nmetrics. Of the device: how much of its memory's speed a decode step reached, or of its products' a "
            "prompt's, both\nmeasured first. The stop button shows what is measured so far. The result has "
            ".result.to_dict() for a file."
        )

    def works_remotely(self, line: str) -> bool:
        """The kernels are this machine's, whatever the notebook is connected to."""
        return "--kernels" in line.split()

    def execute(self, context: Context, parsed: argparse.Namespace) -> "BenchTable | KernelTable":
        """Measure and give the table; ■ shows the table so far and raises Interrupted."""
        given = pick(parsed, _FLAGS)
        if not parsed.kernels:
            return run_bench(context.session.require(), given, context.shell)
        for name in given:
            raise ConfigError(f"--{name} is about the model's speed, not about --kernels: leave one out", flag=name)
        return run_kernel_bench(context.session.loaded, context.shell)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 1,4,16") from None


@dataclass(frozen=True, repr=False)
class _FactsTable(Table):
    """A table with notes and facts below it, each in a line of its own."""

    def _repr_html_(self) -> str:
        return super()._repr_html_().replace("\n", "<br>")


@dataclass(frozen=True, repr=False)
class BenchTable(_FactsTable):
    """The table, and the numbers behind it in ``result``."""

    result: "BenchResult | None" = None

    @classmethod
    def of(cls, result: "BenchResult") -> "BenchTable":
        """The table of ``result``."""
        return cls(HEADER, tuple(map(_cells, result.rows)), _note(result), result)


@dataclass(frozen=True, repr=False)
class KernelTable(_FactsTable):
    """The table of kernels, and the numbers behind it in ``result``."""

    result: "KernelBenchResult | None" = None

    @classmethod
    def of(cls, result: "KernelBenchResult") -> "KernelTable":
        """The table of ``result``; without a GPU it is a line that says so."""
        return cls(KERNEL_HEADER, tuple(map(_kernel_cells, result.rows)), _note(result), result)


def _note(result: "BenchResult | KernelBenchResult") -> str:
    facts = [f"{name}: {value}" for name, value in result.facts.items()]
    return "\n".join([*([] if result.complete else ["not complete"]), *result.notes, *facts])


def _cells(row: "BenchRow") -> tuple[str, ...]:
    first = row.seconds_to_first_token
    shown = f"{first:.2f} s" if first >= 1 else f"{first * 1000:.0f} ms"
    per_request = f"{row.per_request:.1f}" if row.case == "decode" else ""
    share = "" if row.share is None else f"{row.share:.0%}"
    prompt = f"{count_text(row.prompt_tokens)} tokens"
    return (row.case, prompt, str(row.batch), shown, f"{row.tokens_per_second:,.1f}", per_request, share)


def _kernel_cells(row: "KernelRow") -> tuple[str, ...]:
    times = (row.microseconds, row.floor_microseconds)
    shown = ("" if time is None else f"{time:.1f}" for time in times)
    share = f"{row.share:.0%}" if row.share is not None else ""
    return (row.kernel, row.shape, row.problem or "yes", *shown, share)


def run_bench(llm: "LLM", options: Mapping[str, Any], shell: Any) -> BenchTable:
    """Measure and give the table; ■ shows the table so far and raises Interrupted."""
    bench = llm.bench(**{_FLAGS[name]: value for name, value in options.items()})
    return _watched(bench.run(), lambda: BenchTable.of(bench.result), shell, lambda row: " ".join(_cells(row)[:3]))


def run_kernel_bench(llm: "LLM | None", shell: Any) -> KernelTable:
    """Check and time the kernels at the shapes of ``llm``, or of common models; ■ as in :func:`run_bench`."""
    bench = sessions.kernel_bench() if llm is None else llm.bench_kernels()
    return _watched(bench.run(), lambda: KernelTable.of(bench.result), shell, lambda row: f"{row.kernel} {row.shape}")


def _watched(rows: Iterator[R], table: Callable[[], T], shell: Any, text: Callable[[R], str]) -> T:
    """The table once all ``rows`` are there, with a bar meanwhile; ■ shows it as it is then and raises Interrupted."""
    bar, began = bar_for(shell, "bench"), time.monotonic()
    try:
        for row in rows:
            if bar is not None:
                bar.set_postfix_str(text(row), refresh=False)
                bar.update()
    except KeyboardInterrupt:
        so_far = table()
        if bar is None:
            say(so_far)
        else:
            bar.replace({"text/plain": repr(so_far), "text/html": so_far._repr_html_()})
        raise Interrupted("stopped; the table has what was measured") from None
    made = table()
    if bar is not None:
        took = f"{len(made.rows)} cases in {time.monotonic() - began:.1f} s" if made.rows else "nothing to measure"
        bar.replace({"text/plain": f"bench: {took}"})
    return made
