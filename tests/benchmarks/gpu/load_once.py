"""``python -m tests.benchmarks.gpu.load_once ours|theirs FOLDER OPTIONS``: one load in a process of its own, as JSON.

Timed from after the imports to a first token: a load alone could leave to the first request what it saves.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

PROMPT = list(range(10, 26))


def _ours(folder: Path, options: dict[str, Any]) -> tuple[float, float]:
    from engine.llm import LLM
    from engine.runner.device.devices import prepare_backend
    from tests.benchmarks.gpu import ours

    prepare_backend()
    begin = time.perf_counter()
    with LLM(str(folder), **options) as llm:
        ready = time.perf_counter() - begin
        return ready, ready + ours.first_token(llm, PROMPT) / 1000


def _theirs(folder: Path, options: dict[str, Any]) -> tuple[float, float]:
    from tests.benchmarks.gpu import theirs

    begin = time.perf_counter()
    model = theirs.load(folder)
    ready = time.perf_counter() - begin
    return ready, ready + theirs.first_token(model, PROMPT) / 1000


def main() -> None:
    """Print seconds until ready and until the first token."""
    who, folder, options = sys.argv[1:]
    ready, first = {"ours": _ours, "theirs": _theirs}[who](Path(folder), json.loads(options))
    print(json.dumps({"ready": ready, "first_token": first}), flush=True)


if __name__ == "__main__":
    main()
