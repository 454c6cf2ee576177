"""``python -m tests.benchmarks.gpu.serve_once FOLDER PORT OPTIONS``: this engine's port in a process of its own."""

import json
import sys

from engine.llm import LLM


def main() -> None:
    """Serve until standard input ends."""
    folder, port, options = sys.argv[1:]
    with LLM(folder, **json.loads(options)) as llm:
        llm.serve(int(port), no_api_key=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
