"""Both servers over HTTP: each in a process of its own, one client, requests that stream side by side."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.benchmarks.machine import ROOT
from tests.benchmarks.port_speed import request_bytes, stream_all

_START_SECONDS = 120
_THEIRS = """
from engine.runner.device.devices import choose_blas
choose_blas()
from mlx_lm.server import main
main()
"""
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"


class Served:
    """A server that runs in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, model: Path) -> None:
        self._process, self._port, self._model = process, port, model

    @property
    def address(self) -> str:
        """Without a path."""
        return f"http://127.0.0.1:{self._port}"

    def over_http(self, prompts: Sequence[str], num_tokens: int) -> float:
        """Tokens a second of completions that stream at once, from the first send to the last byte."""
        requests = [request_bytes("completions", str(self._model), prompt, num_tokens) for prompt in prompts]
        seconds, count = stream_all(self._port, requests)
        return count / seconds

    def in_process(self, prompts: Sequence[str], num_tokens: int) -> float:
        """The same through ``LLM.generate``, in the process of our server, which has no clients meanwhile."""
        orders, answers = self._process.stdin, self._process.stdout
        assert orders is not None
        assert answers is not None
        orders.write(json.dumps({"prompts": list(prompts), "num_tokens": num_tokens}).encode() + b"\n")
        orders.flush()
        line = answers.readline()
        if not line:
            raise RuntimeError("the server ended")
        found = json.loads(line)
        return float(found["tokens"] / found["seconds"])


@contextmanager
def running(who: str, folder: Path, options: Mapping[str, Any]) -> Iterator[Served]:
    """A server that runs meanwhile: ``ours``, or ``theirs`` with ``options`` as its flags.

    Raises RuntimeError where none opens. On a CPU both have the same BLAS.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    commands = {
        "ours": ["-m", "tests.benchmarks.gpu.serve_once", str(folder), str(port), json.dumps(options)],
        "theirs": ["-c", _THEIRS, "--model", str(folder), "--port", str(port), "--log-level", "ERROR", *flags],
    }
    process = subprocess.Popen(
        [sys.executable, *commands[who]],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE if who == "ours" else subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        served = Served(process, port, folder)
        _wait(f"{served.address}/health", process)
        yield served
    finally:
        assert process.stdin is not None
        process.stdin.close()  # ours ends in order
        if who == "theirs":
            process.terminate()
        process.wait(timeout=60)
        if process.stdout is not None:
            process.stdout.close()


def text_prompts(tokens: Sequence[Sequence[int]]) -> list[str]:
    """Texts of as many tokens: without merges each letter is one."""
    return ["".join(_ALPHABET[token % len(_ALPHABET)] for token in prompt) for prompt in tokens]


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        try:
            if httpx.get(url, timeout=5).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise RuntimeError(f"no server answered within {_START_SECONDS} s")
