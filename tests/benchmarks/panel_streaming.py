"""``python -m tests.benchmarks.panel_streaming``: streaming chats with the panel open and closed, in alternation.

Says what the panel costs the engine (tokens per second), whether the kernel's memory stays flat, and what is
sent. Not part of ``make bench``: ten minutes are its point.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from tests.benchmarks.harness import save
from tests.benchmarks.machine import describe
from tests.benchmarks.notebook_cases import Kernel

_COUNT = """
from ipykernel.kernelbase import Kernel as _Kernel
_session, _sent = _Kernel.instance().session, [0, 0]
_send = _session.send
def _counting(stream, msg_or_type, content=None, *args, **kwargs):
    if msg_or_type == "comm_msg":
        _sent[0] += 1
        _sent[1] += len(repr(content))
    return _send(stream, msg_or_type, content, *args, **kwargs)
_session.send = _counting
"""
_CHAT = "%%chat --new -t 0 --max-tokens {tokens}\nTell a long story about a lighthouse, a fox and the sea."


@dataclass(frozen=True)
class Segment:
    """A while of streaming. ``tokens_per_second`` is the median of its replies."""

    panel: bool
    seconds: float
    replies: int
    tokens_per_second: float
    most_outputs: int
    memory: int
    widget_messages: int
    widget_bytes: int


def run_segment(kernel: Kernel, *, panel: bool, seconds: float, tokens: int) -> Segment:
    """Stream replies one after another for ``seconds``."""
    kernel.run("%vllm_metal panel" if panel else "%vllm_metal panel --close")
    kernel.run("_sent[:] = [0, 0]")
    begin, rates, most_outputs = time.monotonic(), [], 0
    while time.monotonic() - begin < seconds:
        messages = kernel.run(_CHAT.format(tokens=tokens), timeout=600)
        most_outputs = max(most_outputs, sum(message["msg_type"] == "display_data" for _, message in messages))
        rates.append(float(text_of(kernel, "print(_.metrics.decode_rate(_.usage.completion_tokens))")))
    sent = json.loads(text_of(kernel, "print(_sent)"))
    memory = psutil.Process(int(text_of(kernel, "import os; print(os.getpid())"))).memory_info().rss
    return Segment(
        panel, time.monotonic() - begin, len(rates), statistics.median(rates), most_outputs, memory, sent[0], sent[1]
    )


def text_of(kernel: Kernel, code: str) -> str:
    """What ``code`` prints."""
    return "".join(message["content"]["text"] for _, message in kernel.run(code) if message["msg_type"] == "stream")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.panel_streaming", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="in all (10)")
    parser.add_argument("--segments", type=int, default=10, help="half of them with the panel (10)")
    parser.add_argument("--tokens", type=int, default=200, help="per reply (200)")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--output", type=Path, default=Path("bench-results"), metavar="DIR", help="folder of the JSON")
    args = parser.parse_args()
    machine, kernel = describe(), Kernel(args.model)
    try:
        kernel.run(_COUNT)
        run_segment(kernel, panel=True, seconds=1, tokens=args.tokens)
        seconds = 60 * args.minutes / args.segments
        segments = []
        for number in range(args.segments):
            segments.append(run_segment(kernel, panel=number % 2 == 0, seconds=seconds, tokens=args.tokens))
            print(segments[-1], file=sys.stderr, flush=True)
    finally:
        kernel.close()
    speed = {
        panel: statistics.median(one.tokens_per_second for one in segments if one.panel is panel)
        for panel in (True, False)
    }
    print(f"{machine['processor']}, {machine['cores']} cores, {machine['system']}, commit {machine['commit'][:12]}")
    print(f"tokens/s: panel open {speed[True]:.2f}, closed {speed[False]:.2f}, ratio {speed[True] / speed[False]:.3f}")
    print(f"memory: {segments[0].memory / 1e6:.1f} MB, then {segments[-1].memory / 1e6:.1f} MB")
    text = json.dumps({"machine": machine, "segments": [asdict(segment) for segment in segments]}, indent=2)
    print(f"Samples: {save(text, args.output, machine['date'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
