"""``python -m tests.benchmarks.port_speed``: tokens a second through the port beside the same load through ``LLM``.

The engine is whole but for the device: a step takes as long as is said and computes nothing, and meanwhile the
interpreter is free, as it is while a GPU works. What is lost is the port's own work. The engine and the port share a
process, the clients are in this one.
"""

import argparse
import json
import re
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import IO, Any

from tests.benchmarks.harness import Case
from tests.benchmarks.machine import ROOT

APIS = ("completions", "chat")
STREAMS = (32, 200)
STEP_MILLISECONDS = 4.0
NUM_TOKENS = 128
_PROMPT = "abcdefghijklmnopqrstuvwxyz"
_WANTED = 0.95
"""Of the rate without a port."""
_END = b"data: [DONE]"
_TAIL = 1024
"""Bytes of a stream's end, with its usage."""
_COUNT = re.compile(rb'"completion_tokens": *([0-9]+)')


@contextmanager
def stand_in(step_milliseconds: float = STEP_MILLISECONDS, profile: str = "") -> Iterator["StandIn"]:
    """A process with the engine and its port."""
    with tempfile.TemporaryDirectory(prefix="vm-magic-bench-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.port_process", folder, str(step_milliseconds), profile],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield StandIn(process.stdin, process.stdout, folder)
        finally:
            process.stdin.close()
            process.wait(timeout=60)
            process.stdout.close()


class StandIn:
    """The other process: told what to do line by line."""

    def __init__(self, orders: IO[bytes], answers: IO[bytes], model: str) -> None:
        self._orders, self._answers, self.model = orders, answers, model
        self.port = int(self._read()["port"])

    def local(self, num_streams: int, num_tokens: int) -> dict[str, float]:
        """``seconds`` for all tokens of requests through ``LLM.generate``, and how long each thread computed."""
        return self._ask({"local": num_streams, "num_tokens": num_tokens})

    def remote(self, api: str, num_streams: int, num_tokens: int) -> dict[str, float]:
        """The same through the port, from the first request sent to the last byte."""
        texts = (f"{number:04d} {_PROMPT}" for number in range(num_streams))
        requests = [request_bytes(api, self.model, text, num_tokens) for text in texts]
        before = self._ask({})
        seconds, count = stream_all(self.port, requests)
        assert count == num_streams * num_tokens, f"{count} tokens"
        return {"seconds": seconds} | {name: value - before[name] for name, value in self._ask({}).items()}

    def _ask(self, order: Mapping[str, Any]) -> dict[str, float]:
        self._orders.write(json.dumps(order).encode() + b"\n")
        self._orders.flush()
        return self._read()

    def _read(self) -> dict[str, float]:
        line = self._answers.readline()
        if not line:
            raise RuntimeError("the engine's process ended")
        found: dict[str, float] = json.loads(line)
        return found


def request_bytes(api: str, model: str, text: str, num_tokens: int) -> bytes:
    """One streaming request as it goes over the wire."""
    body: dict[str, Any] = {
        "model": model, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    if api == "chat":
        path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": text}]
    else:
        path, body["prompt"] = "/v1/completions", text
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def stream_all(port: int, requests: Sequence[bytes]) -> tuple[float, int]:
    """Send all ``requests`` at once and read their streams to the end: seconds from the first send to the last byte,
    and tokens by their usage.

    Raises RuntimeError where one is refused or breaks off.
    """
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in requests]
    by_number, tails = {client.fileno(): client for client in clients}, dict.fromkeys(clients, b"")
    with selectors.DefaultSelector() as ready:
        for client in clients:
            ready.register(client, selectors.EVENT_READ)
        begin = time.perf_counter()
        for client, request in zip(clients, requests, strict=True):
            client.sendall(request)
        while ready.get_map():
            for key, _ in ready.select():
                client = by_number[key.fd]
                part = client.recv(1 << 16)
                tail = tails[client] = (tails[client] + part)[-_TAIL:]
                if _END in tail:
                    ready.unregister(client)
                elif not part:
                    raise RuntimeError(f"a stream broke off: {tail!r}")
        seconds = time.perf_counter() - begin
    for client in clients:
        client.close()
    return seconds, sum(int(_COUNT.findall(tail)[-1]) for tail in tails.values())


def port_cases() -> Iterator[Case]:
    """Tokens a second of each load through the port and through ``LLM``, in turn."""
    with stand_in() as process:
        for api in APIS:
            for num_streams in STREAMS:
                yield Case(
                    f"{num_streams} {api} streams over HTTP, steps of {STEP_MILLISECONDS:g} ms", "tokens/s", "higher",
                    {
                        "through the port": partial(_rate, partial(process.remote, api), num_streams),
                        "through LLM": partial(_rate, process.local, num_streams),
                    },
                    {"num_tokens": NUM_TOKENS}, target=_WANTED if num_streams == min(STREAMS) else None,
                )  # fmt: skip


def _rate(action: Callable[[int, int], dict[str, float]], num_streams: int) -> float:
    return num_streams * NUM_TOKENS / action(num_streams, NUM_TOKENS)["seconds"]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.port_speed", description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS, metavar="N")
    parser.add_argument("--apis", nargs="+", default=APIS, choices=APIS)
    parser.add_argument("--step", type=float, default=STEP_MILLISECONDS, metavar="MS", help="of the device (4)")
    parser.add_argument("--turns", type=int, default=4, metavar="N", help="the best of N, taken in turn (4)")
    parser.add_argument("--profile", default="", metavar="FILE", help="write what the port's thread does to FILE")
    args = parser.parse_args()
    columns = ("port tok/s", "LLM tok/s", "ratio", "port us", "engine us", "alone us")
    print("load; us a token".ljust(24) + "".join(name.rjust(12) for name in columns))
    with stand_in(args.step, args.profile) as process:
        for num_streams in args.streams:
            for api in args.apis:
                process.remote(api, num_streams, NUM_TOKENS)
                process.local(num_streams, NUM_TOKENS)
                over, here = [], []
                for _ in range(args.turns):
                    over.append(process.remote(api, num_streams, NUM_TOKENS))
                    here.append(process.local(num_streams, NUM_TOKENS))
                total = num_streams * NUM_TOKENS
                port, local = (total / min(one["seconds"] for one in runs) for runs in (over, here))
                computed = [
                    1e6 * min(one[name] for one in runs) / total
                    for runs, name in ((over, "port"), (over, "engine"), (here, "engine"))
                ]
                numbers = (f"{port:.0f}", f"{local:.0f}", f"{port / local:.3f}", *(f"{one:.1f}" for one in computed))
                print(f"{num_streams} {api}".ljust(24) + "".join(one.rjust(12) for one in numbers), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
