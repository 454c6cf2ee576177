"""``python -m tests.mutation``: does a test of ``tests/engine/core`` fail for every small change to ``engine/core``?

Each mutant runs in a fork of a process that has collected the tests: the changed function takes the place of the
original, and the tests that reach its line run until one fails. One process at a time, at low priority.
"""

import argparse
import gc
import os
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any

import pytest
from _pytest.runner import runtestprotocol
from hypothesis import Phase, settings

from tests.mutation.mutants import Mutant, mutants_of

ROOT = Path(__file__).parents[2]
CORE = ROOT / "engine" / "core"
SECONDS = 10
"""Of processor time: a mutant that takes longer hangs, and was noticed."""
MEMORY = 3 << 30
Line = tuple[str, int]


class Mutation:
    """A plugin of pytest that runs mutants instead of tests."""

    def __init__(self, only: str, skip: int) -> None:
        self.only, self.skip = only, skip
        self.survivors: list[Mutant] = []
        self.counts: Counter[str] = Counter()

    def pytest_collection_finish(self) -> None:
        """A history that fails need not become the shortest one."""
        test_histories = sys.modules["tests.engine.core.test_histories"]
        test_histories.LEAST = 0
        test_histories.BRIEF_OR_LONG = settings(test_histories.BRIEF_OR_LONG, phases=[Phase.generate], max_examples=30)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Which tests reach which lines; then one fork for each mutant."""
        reached, taken = {}, {}
        for item in session.items:
            began = time.process_time()
            reached[item] = self._lines_of(item)
            taken[item] = time.process_time() - began
            if not _run(item):
                raise pytest.UsageError(f"{item.nodeid} fails as it is: no mutant can be told from the original")
        session.items.sort(key=lambda item: taken[item])  # most mutants die in the quick ones
        mutants = [one for file in sorted(CORE.glob(self.only)) for one in mutants_of(file)][:: self.skip]
        gc.unfreeze()  # what is frozen is not among the objects
        functions = [one for one in gc.get_objects() if isinstance(one, FunctionType)]
        gc.freeze()
        for number, mutant in enumerate(mutants):
            place = (str(mutant.file), mutant.line)
            items = [item for item in session.items if place in reached[item]]
            outcome = "survived" if not items else self._try(mutant, functions, items)
            self.counts[outcome] += 1
            if outcome == "survived":
                self.survivors.append(mutant)
                print(f"[{number + 1}/{len(mutants)}] {mutant}" + ("    (no test comes here)" if not items else ""),
                      flush=True)  # fmt: skip
            if not (number + 1) % 50:
                print(f"[{number + 1}/{len(mutants)}] {dict(self.counts)}", flush=True)
        return True

    @staticmethod
    def _lines_of(item: pytest.Item) -> set[Line]:
        lines: set[Line] = set()
        core = str(CORE)

        def trace(frame: FrameType, event: str, _: object) -> Any:
            if not frame.f_code.co_filename.startswith(core):
                return None
            if event in ("line", "call"):
                lines.add((frame.f_code.co_filename, frame.f_lineno))
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            _run(item)
        finally:
            sys.settrace(before)
        return lines

    @staticmethod
    def _try(mutant: Mutant, functions: Sequence[FunctionType], items: Sequence[pytest.Item]) -> str:
        child = os.fork()
        if not child:
            _child(mutant, functions, items)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            return "hangs"
        return {0: "survived", 1: "killed", 3: "left out"}[os.WEXITSTATUS(status)]


def _child(mutant: Mutant, functions: Sequence[FunctionType], items: Sequence[pytest.Item]) -> None:
    """Never returns: ends this fork with 1 where a test failed."""
    code = 2
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.alarm(20 * SECONDS)
        found = 0
        for function in functions:
            original = function.__code__
            where = (original.co_filename, original.co_name, original.co_firstlineno)
            if where == (str(mutant.file), mutant.code.co_name, mutant.first_line):
                if len(original.co_freevars) != len(mutant.code.co_freevars):
                    code = 3  # a function does not take the code of one that sees other names
                    return
                function.__code__ = mutant.code
                found += 1
        assert found, f"nobody has {mutant.function}"
        code = int(not all(map(_run, items)))
    except BaseException:  # noqa: BLE001 - the fork ends here
        traceback.print_exc()  # of this runner
    finally:
        os._exit(code)


def _run(item: pytest.Item) -> bool:
    """Whether a test passes."""
    return all(report.outcome != "failed" for report in runtestprotocol(item, log=False, nextitem=None))


def main() -> int:
    """Run the mutants; 1 where fewer than the wanted share of them die."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--only", default="*.py", help="files of engine/core, as a pattern")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="every Nth mutant")
    parser.add_argument("--least", type=float, default=0.95, help="the share that must die")
    given = parser.parse_args()
    os.nice(10)
    plugin, began = Mutation(given.only, given.every), time.monotonic()
    asked = ["-q", "-n0", "-p", "no:cacheprovider", "-W", "ignore", str(ROOT / "tests/engine/core")]
    pytest.main(asked, plugins=[plugin])
    total = sum(plugin.counts.values()) - plugin.counts["left out"]
    died = total - plugin.counts["survived"]
    print(f"{died} of {total} mutants died ({died / max(total, 1):.1%}), {dict(plugin.counts)}, "
          f"in {time.monotonic() - began:.0f} s")  # fmt: skip
    return int(died < given.least * total)


if __name__ == "__main__":
    sys.exit(main())
