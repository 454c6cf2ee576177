"""``python -m tests.checkpoints``: write the table of checkpoints that load."""

from engine.runner.device.devices import choose_blas

choose_blas()

from tests.checkpoints.table import TABLE, render  # noqa: E402

TABLE.write_text(render(), encoding="utf-8")
print(f"written: {TABLE.name}")
