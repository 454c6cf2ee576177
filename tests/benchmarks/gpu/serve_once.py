"""``python -m tests.benchmarks.gpu.serve_once FOLDER PORT OPTIONS``: this engine's port in a process of its own.

Each line of standard input is a load for the same engine without the port: ``{"prompts": [...], "num_tokens": N}``. Its
answer is one line, ``{"seconds": S, "tokens": N}``.
"""

import json
import sys
import time

from engine.llm import LLM
from engine.params.sampling_params import SamplingParams


def main() -> None:
    """Serve until standard input ends."""
    folder, port, options = sys.argv[1:]
    with LLM(folder, **json.loads(options)) as llm:
        llm.serve(int(port), no_api_key=True)
        for line in sys.stdin:
            load = json.loads(line)
            params = SamplingParams(temperature=0, max_tokens=load["num_tokens"], ignore_eos=True)
            begin = time.perf_counter()
            outputs = llm.generate(load["prompts"], params, use_tqdm=False)
            seconds = time.perf_counter() - begin
            count = sum(len(output.outputs[0].token_ids) for output in outputs)
            print(json.dumps({"seconds": seconds, "tokens": count}), flush=True)


if __name__ == "__main__":
    main()
