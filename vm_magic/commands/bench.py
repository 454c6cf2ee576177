"""``bench``: the speed of the loaded model."""

import argparse
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vm_magic.commands.base import Context, LineCommand
from vm_magic.commands.parser import CommandParser
from vm_magic.show.errors import Interrupted
from vm_magic.show.progress import bar_for
from vm_magic.show.tables import Table

if TYPE_CHECKING:
    from engine.batch.bench import BenchResult, BenchRow
    from engine.llm import LLM

HEADER = ("case", "prompt", "batch", "first token", "tokens/s", "per request")


class Bench(LineCommand):
    """Measures the loaded model."""

    help = "speed of the loaded model, as one table"
    needs_kernel = "measures the model in this kernel (vllm bench serve measures a server)"

    def add_arguments(self, parser: CommandParser) -> None:
        """How long, and which batch sizes."""
        from engine.batch.bench import DEFAULT_BATCHES, DEFAULT_SECONDS

        sizes = ",".join(map(str, DEFAULT_BATCHES))
        parser.add_argument(
            "--seconds", type=float, default=DEFAULT_SECONDS, metavar="N", help=f"about how long ({DEFAULT_SECONDS:g})"
        )
        parser.add_argument(
            "--batch", type=_sizes, default=DEFAULT_BATCHES, metavar="N,N", help=f"batch sizes to decode at ({sizes})"
        )
        parser.epilog = (
            "Random prompts, which reuse nothing, fill no prefix cache and are not remembered by explain; they count "
            "in\nmetrics. The stop button shows what is measured so far. The result has .result.to_dict() for a file."
        )

    def execute(self, context: Context, parsed: argparse.Namespace) -> "BenchTable":
        """Measure and give the table; ■ shows the table so far and raises Interrupted."""
        return run_bench(context.session.require(), parsed, context.shell)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 1,4,16") from None


@dataclass(frozen=True, repr=False)
class BenchTable(Table):
    """The table, and the numbers behind it in ``result``."""

    result: "BenchResult | None" = None

    @classmethod
    def of(cls, result: "BenchResult") -> "BenchTable":
        """The table of ``result``."""
        facts = [f"{name}: {value}" for name, value in result.facts.items()]
        note = "\n".join([*([] if result.complete else ["not complete"]), *result.notes, *facts])
        return cls(HEADER, tuple(map(_cells, result.rows)), note, result)

    def _repr_html_(self) -> str:
        return super()._repr_html_().replace("\n", "<br>")


def _cells(row: "BenchRow") -> tuple[str, ...]:
    first = row.seconds_to_first_token
    shown = f"{first:.2f} s" if first >= 1 else f"{first * 1000:.0f} ms"
    per_request = f"{row.per_request:.1f}" if row.case == "decode" else ""
    return (row.case, f"{row.prompt_tokens} tokens", str(row.batch), shown, f"{row.tokens_per_second:.1f}", per_request)


def run_bench(llm: "LLM", parsed: argparse.Namespace, shell: Any) -> BenchTable:
    """Measure and give the table; ■ shows the table so far and raises Interrupted."""
    bench = llm.bench(seconds=parsed.seconds, batch_sizes=parsed.batch)
    bar, began = bar_for(shell, "bench"), time.monotonic()
    try:
        for row in bench.run():
            if bar is not None:
                bar.set_postfix_str(" ".join(_cells(row)[:3]), refresh=False)
                bar.update()
    except KeyboardInterrupt:
        table = BenchTable.of(bench.result)
        if bar is None:
            print(table)
        else:
            bar.replace({"text/plain": repr(table), "text/html": table._repr_html_()})
        raise Interrupted("stopped; the table has what was measured") from None
    if bar is not None:
        bar.replace({"text/plain": f"bench: {len(bench.result.rows)} cases in {time.monotonic() - began:.1f} s"})
    return BenchTable.of(bench.result)
