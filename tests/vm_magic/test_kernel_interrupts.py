"""■ at random moments of a real kernel: it lives, the variables stay, and the next cell works."""

import os
import queue
import random
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
from jupyter_client.manager import start_new_kernel

from tests.nightly import size
from tests.vm_magic.conftest import ROOT, Kernel

Answer = TypeVar("Answer")
pytestmark = pytest.mark.nightly
LOAD = "%vllm_metal load {model} --max-model-len 256 --served-model-name tiny"
CELLS = {
    "chat": "%%chat --new -t 0 --max-tokens 40\nHi",
    "complete": "%%vllm_metal complete -t 0 --max-tokens 40\nHi",
    "grid": "%%vllm_metal grid --over n -t 0 --max-tokens 8\nNumber {{ n }}",
    "generate": "_ = vm_magic.current().generate(['a', 'b', 'c'])",
    "map": "_ = vm_magic.current().map(['a', 'b'], 'Say {{ text }}', max_tokens=8)",
    "achat": "_ = await vm_magic.current().achat([{'role': 'user', 'content': 'Hi'}])",
    "set": "%vllm_metal set memory_fraction=0.5 temperature=0.2\n%vllm_metal set memory_fraction=0.4",
    "plan": "%vllm_metal plan {model}",
    "score": "%vllm_metal score Once upon a time",
    "status": "%vllm_metal\n%vllm_metal explain",
    "serve": "h = %vllm_metal serve --port 0",
    "stop": "%vllm_metal serve --port 0\n%vllm_metal stop",
    "load": "%vllm_metal unload\n" + LOAD,
    "other": LOAD + " --max-num-seqs 3\n" + LOAD,
    "unload": "%vllm_metal unload",
}
PREPARE = """
import faulthandler, signal
stacks = open({stacks!r}, "w")
faulthandler.register(signal.SIGUSR1, file=stacks)
%load_ext vm_magic
import pandas, vm_magic  # an interrupt in the middle of an import is its library's affair
from engine import SamplingParams
mine = "kept"
n = [1, 2, 3, 4]
"""
ENDS = ("", "Interrupted", "KeyboardInterrupt", "MapInterrupted", "CancelledError", "no reply", "NoneType")
"""NoneType, no reply: the interrupt fell on code of the kernel's own, behind the cell's."""
SOUND = """
import threading, time
llm = vm_magic.current()
stats = llm.stats()
for _ in range(6000):
    if not (stats.num_running or stats.num_waiting):
        break
    time.sleep(0.01)
    stats = llm.stats()
pool = stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks
greedy = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
names = [thread.name for thread in threading.enumerate()]
tokens = llm.generate([[5, 6, 7]], greedy, use_tqdm=False)[0].outputs[0].token_ids
print(mine, pool, list(tokens), names.count("vm-engine"), names.count("openai-port") <= 1)
"""


@pytest.fixture(scope="module")
def model(tiny_model_dir: Any) -> Path:
    found: Path = tiny_model_dir("llama", num_hidden_layers=2)
    return found


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    manager, client = start_new_kernel(
        kernel_name="python3", startup_timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    running = Kernel(manager, client)
    yield running
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def interrupt_after(kernel: Kernel, code: str, seconds: float) -> tuple[str, str]:
    """Run ``code`` and press ■ so much later; gives the name and text of the error that it ended with, if any."""
    asked, probe = kernel.client.execute(code, store_history=True), None
    over = threading.Event()

    def press() -> None:
        if not over.wait(seconds):
            os.kill(kernel.manager.provisioner.pid, signal.SIGINT)  # as ■ does

    presser = threading.Thread(target=press)
    presser.start()
    while True:
        try:
            reply = kernel.client.get_shell_msg(timeout=5 if probe is None else 60)
        except queue.Empty:
            if probe is not None:
                raise
            probe = kernel.client.execute(
                "None"
            )  # is answered after it; an interrupt may fall on the kernel's own code
            continue
        if reply["parent_header"].get("msg_id") in (asked, probe):
            break
    over.set()
    presser.join()
    if reply["parent_header"].get("msg_id") == probe:
        return "no reply", ""
    return str(reply["content"].get("ename", "")), str(reply["content"].get("evalue", ""))


def answered(ask: Callable[[], Answer], stacks: Path, kernel: Kernel) -> Answer:
    """What ``ask`` gives; where it hangs, where everything stands then, or with what status the kernel ended."""
    try:
        return ask()
    except (TimeoutError, queue.Empty):
        process = kernel.manager.provisioner.process
        if process.poll() is not None:
            raise AssertionError(f"the kernel ended with status {process.returncode}") from None
        process.send_signal(signal.SIGUSR1)
        threading.Event().wait(2)
        raise AssertionError(f"it hangs:\n{stacks.read_text()}") from None


def test_an_interrupt_at_any_moment_leaves_kernel_variables_and_model(
    kernel: Kernel, model: Path, tmp_path: Path
) -> None:
    load, stacks = LOAD.format(model=model), tmp_path / "stacks"
    kernel.run(PREPARE.format(stacks=str(stacks)))
    assert kernel.run(load)[0]["status"] == "ok"
    wanted = kernel.text(SOUND)
    assert wanted.startswith("kept True [")
    rng = random.Random(size(7, 2026))
    found: dict[str, int] = {}
    for number in range(size(20, 1000)):
        name = list(CELLS)[number % len(CELLS)]
        code = CELLS[name].replace("{model}", str(model))
        after = rng.random() ** 2 * 0.6
        ended, said = answered(partial(interrupt_after, kernel, code, after), stacks, kernel)
        found[ended] = found.get(ended, 0) + 1
        assert kernel.manager.is_alive(), f"{name} killed the kernel"
        assert ended in ENDS, (name, ended, said)
        for _ in range(3):  # an interrupt that came late is the next cell's
            reply, _ = answered(partial(kernel.run, load), stacks, kernel)
            if reply["status"] == "ok":
                break
        assert reply["status"] == "ok", (name, reply)
        assert answered(partial(kernel.text, SOUND), stacks, kernel) == wanted, (number, name)
    print(found)
    assert sum(count for ended, count in found.items() if ended) > 0, "nothing was interrupted"
