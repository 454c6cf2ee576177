"""What a load shows of its stages."""

from types import SimpleNamespace
from typing import Any

from IPython.core.displaypub import DisplayPublisher

from tests.vm_magic.helpers import shown
from vm_magic.show.progress import LoadProgress


def test_bytes_are_shown_as_sizes_and_kernels_are_counted(shell: Any) -> None:
    progress = LoadProgress(shell, "smollm2")
    texts = []
    for stage, done, total in [("load", 2_000_000, 8_000_000_000), ("kernels", 3, 12), ("warm-up", 0, 0)]:
        progress(stage, done, total)
        texts.append(shown(shell)["text/plain"].rpartition(" (")[0])
    assert texts == ["smollm2: load 2.0MB of 8.00GB", "smollm2: kernels 3 of 12", "smollm2: warm-up "]


def test_a_terminals_bar_counts_kernels_without_a_unit_of_bytes(capsys: Any) -> None:
    terminal = SimpleNamespace(display_pub=DisplayPublisher())
    progress = LoadProgress(terminal, "smollm2")
    for stage, done, total in [("load", 10**9, 4 * 10**9), ("kernels", 3, 12), ("warm-up", 0, 0)]:
        progress(stage, done, total)
    progress.finish("loaded")
    printed = capsys.readouterr()
    assert "1.00G/4.00G" in printed.err
    assert "3/12" in printed.err
    assert "smollm2: warm-up (00:00)" in printed.err
    assert printed.out == "loaded\n"
