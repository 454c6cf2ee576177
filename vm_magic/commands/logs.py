"""``logs`` and ``metrics``: what the engine and the port said and counted."""

import argparse
from typing import Any

from vm_magic.commands.base import Context, LineCommand
from vm_magic.commands.parser import CommandParser
from vm_magic.show.tables import Table
from vm_magic.show.terminal import say


class Logs(LineCommand):
    """Prints the end of the log."""

    help = "the latest lines of the engine's and server's log"

    def add_arguments(self, parser: CommandParser) -> None:
        """How many lines."""
        parser.add_argument("count", nargs="?", type=int, default=50, metavar="N", help="how many lines (50)")

    def execute(self, context: Context, parsed: argparse.Namespace) -> None:
        """Print the lines."""
        say("\n".join(context.logs.lines[-parsed.count :]) or "no log lines yet")


class Metrics(LineCommand):
    """Shows the Prometheus metrics of this kernel's engine, or of the server."""

    help = "the engine's Prometheus metrics as a table"

    def execute(self, context: Context, parsed: argparse.Namespace) -> Table:  # noqa: ARG002
        """A table of the samples."""
        session = context.session
        if session.remote is None:
            return metrics_table(session.require().metrics.registry)
        from vm_magic.remote.metrics import RemoteMetrics

        return metrics_table(RemoteMetrics(session.remote.metrics_text()))


def metrics_table(registry: Any) -> Table:
    """Samples of a Prometheus ``registry``; histograms as count and sum."""
    rows = []
    for family in registry.collect():
        for sample in family.samples:
            if sample.name.endswith(("_bucket", "_created")):
                continue
            labels = ", ".join(f"{k}={v}" for k, v in sample.labels.items() if k not in ("model_name", "engine"))
            rows.append((sample.name, labels, f"{sample.value:g}"))
    return Table(("metric", "labels", "value"), tuple(rows), "" if rows else "no metrics yet")
