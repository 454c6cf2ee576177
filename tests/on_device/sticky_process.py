"""The process of :mod:`tests.on_device.sticky`: faults on purpose.

Prints what everybody is told, what the port answers, what a variable still holds, then ``closed``.
"""

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

from engine.errors import DeviceFailedError
from engine.llm import LLM
from engine.openai.server import ServerHandle
from engine.params.sampling_params import SamplingParams
from engine.runtime.llm_engine import LLMEngine

_PARAMS = SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True)
_FAR = """
    auto elem = cooperative_groups::this_grid().thread_rank();
    y[elem + (1ull << 44)] = x[elem];
"""


def _write_far_away(_engine: LLMEngine) -> None:
    """Launch a kernel that writes where no memory is, without waiting for it."""
    import mlx.core as mx

    kernel: Any = mx.fast.cuda_kernel(name="far_away", input_names=["x"], output_names=["y"], source=_FAR)
    (array,) = kernel(
        inputs=[mx.ones(64)], grid=(64, 1, 1), threadgroup=(64, 1, 1), output_shapes=[(64,)], output_dtypes=[mx.float32]
    )
    mx.async_eval(array)  # type: ignore[no-untyped-call]


def _pretend(engine: LLMEngine) -> None:
    def execute(*_: object) -> None:
        raise RuntimeError("cudaGraphLaunch(graph_exec, stream_) failed: an illegal memory access was encountered")

    engine.runner.execute = execute  # type: ignore[assignment,method-assign]


def _tell(function: Callable[[], object]) -> None:
    try:
        function()
    except DeviceFailedError as error:
        print(error, flush=True)
    except Exception as error:  # noqa: BLE001  (what it should not be; the parent reads it)
        print(f"{type(error).__name__}: {error}", flush=True)
    else:
        print("no error", flush=True)


def _answer(server: ServerHandle, path: str, body: dict[str, Any] | None = None) -> str:
    """The status of the port for ``path``, and the message of its error."""
    headers = {"Authorization": f"Bearer {server.api_key}", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    root = server.base_url.removesuffix("/v1")
    try:
        with urllib.request.urlopen(urllib.request.Request(root + path, data, headers), timeout=20) as response:
            return f"{response.status}"
    except urllib.error.HTTPError as error:
        text = error.read().decode()
        return f"{error.code} {json.loads(text)['error']['message']}" if text else f"{error.code}"


def main(folder: str, how: str) -> int:
    """Run into the fault with three requests under way, try to go on, and end."""
    kept = list(range(1000))
    llm = LLM(folder, max_model_len=4096)
    server = llm.serve(port=0)
    print(f"port: {_answer(server, '/health')}", flush=True)
    streams = [llm.submit_prompt([5 + number, 6, 7] * 50, _PARAMS) for number in range(3)]
    for stream in streams:
        next(stream)
    llm._thread.post(_pretend if how == "pretend" else _write_far_away)
    for stream in streams:
        _tell(stream.result)
    _tell(lambda: llm.submit_prompt([5, 6, 7], _PARAMS))
    asked = {"model": server.model, "prompt": "a", "max_tokens": 2}
    print(f"port: {_answer(server, '/health')}; {_answer(server, '/v1/completions', asked)}", flush=True)
    begin = time.monotonic()
    llm.close()
    if time.monotonic() - begin > 2:
        print("closing took long", flush=True)
    _tell(lambda: LLM(folder))
    print(f"kept: {sum(kept)}", flush=True)
    print("closed", flush=True)
    return 3


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
