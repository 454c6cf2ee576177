"""A GPU that failed for good: one line for everybody, nothing that waits, and a process that ends with its status."""

import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import DeviceFailedError, RequestError
from engine.runner.device import faults

ROOT = Path(__file__).parents[3]
FAULT = "cudaGraphLaunch(graph_exec, stream_) failed: an illegal memory access was encountered"
LINE = f"the GPU failed ({FAULT}): restart the kernel"
PRELUDE = f"""
import ctypes, logging, sys, threading, time
import mlx.core
libc = ctypes.CDLL(None)
libc.__cxa_atexit(ctypes.cast(libc.abort, ctypes.c_void_p), None, None)  # as MLX's destructors do on a failed device
from engine import LLM, DeviceFailedError, SamplingParams
from engine.runner.device import faults
from engine.runtime import engine_thread
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
logging.basicConfig(format="LOG %(message)s")

def fault(*_, **__):
    raise RuntimeError({FAULT!r})

def line_of(function):
    try:
        function()
    except DeviceFailedError as error:
        print(error, flush=True)

def load():
    return LLM(sys.argv[1], max_model_len=512)
"""


def run(body: str, model: Path, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """A Python of its own that ends, by itself."""
    command = [sys.executable, "-c", PRELUDE + body, str(model)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout, check=False)


def test_requests_under_way_and_later_ones_are_told_in_one_line_and_the_process_ends_with_its_status(tiny_model_dir):
    done = run(
        """
llm = load()
streams = [llm.submit_prompt([5 + i, 6], LONG) for i in range(3)]
next(streams[0])
llm._thread.post(lambda engine: setattr(engine.runner, "execute", fault))
for stream in streams:
    line_of(stream.result)
line_of(lambda: llm.submit_prompt([5, 6], LONG))
line_of(llm.stats)
assert llm.closed
began = time.monotonic()
llm.close()
assert time.monotonic() - began < 2
line_of(load)
assert any(thread.name == "vm-engine" for thread in threading.enumerate()), "its streams of MLX would be freed"
sys.exit(3)
""",
        tiny_model_dir("llama"),
    )
    assert done.stdout.splitlines() == [LINE] * 6, done.stderr
    assert done.stderr.splitlines().count(f"LOG {LINE}") == 1
    assert "Traceback" not in done.stderr
    assert done.returncode == 3


def test_nobody_waits_for_a_step_that_never_comes_back_from_a_failed_device(tiny_model_dir):
    """After CUDA's error no callback runs any more, and MLX waits for one: the driver is asked from outside."""
    done = run(
        """
engine_thread.LONG_STEP = 0.2
engine_thread.has_driver = lambda: True
engine_thread.driver_failure = lambda: faults.device_failure(RuntimeError("an illegal memory access was encountered"))
llm = load()
stream = llm.submit_prompt([5, 6], LONG)
next(stream)
llm._thread.post(lambda engine: setattr(engine.runner, "execute", lambda *_: threading.Event().wait()))
line_of(stream.result)
line_of(lambda: llm.submit_prompt([5, 6], LONG))
llm.close()
""",
        tiny_model_dir("llama"),
    )
    line = "the GPU failed (an illegal memory access was encountered): restart the kernel"
    assert done.stdout.splitlines() == [line] * 2, done.stderr
    assert done.returncode == 0


def test_a_device_that_fails_while_a_model_loads(tiny_model_dir):
    done = run(
        """
from engine.runtime import builder
builder.measure_step_cost = fault
line_of(load)
line_of(load)
""",
        tiny_model_dir("llama"),
    )
    assert done.stdout.splitlines() == [LINE] * 2, done.stderr
    assert done.returncode == 0


def test_a_failure_between_steps_and_one_of_giving_memory_back(tiny_model_dir):
    for where in ("llm._thread.call(fault)", "llm._thread.call(lambda engine: setattr(engine.runner, 'close', fault))"):
        done = run(f"llm = load()\nline_of(lambda: {where})\nllm.close()\nline_of(load)\n", tiny_model_dir("llama"))
        assert set(done.stdout.splitlines()) == {LINE}, done.stderr
        assert done.returncode == 0


@pytest.mark.parametrize(
    "text",
    [
        "cudaStreamSynchronize(stream_) failed: unspecified launch failure",
        "cuLaunchKernelEx(&config, func, params, nullptr) failed: misaligned address",
        "[METAL] Command buffer execution failed: Ignored (for causing prior/excessive GPU errors) "
        "(00000004:kIOGPUCommandBufferCallbackErrorSubmissionsIgnored).",
    ],
)
def test_errors_that_last_are_known_by_what_cuda_and_metal_call_them(text):
    assert str(faults.device_failure(RuntimeError(text))) == f"the GPU failed ({text[:200]}): restart the kernel"


def test_other_errors_do_not_count_unless_the_device_says_so(monkeypatch):
    monkeypatch.setattr(faults, "has_driver", lambda: False)
    for error in (
        RuntimeError("[malloc] Unable to allocate 5 bytes."),
        RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory."),
        ValueError("an illegal memory access was encountered"),
        RequestError("no"),
    ):
        assert faults.device_failure(error) is None
    monkeypatch.setattr(faults, "_error_of_device", lambda: RuntimeError(FAULT))
    assert str(faults.device_failure(RuntimeError("cublasLtMatmul failed with code: 13."))) == LINE
    assert faults.device_failure(RequestError("no")) is None
    with pytest.raises(DeviceFailedError, match="illegal"):
        raise faults.device_failure(RuntimeError(FAULT))
