"""The magics over the real engine and port in a real kernel, on a tiny random model."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vm_magic.conftest import ROOT, Kernel
from tests.vm_magic.test_kernel import drain, of_type, show_as_a_notebook


@pytest.fixture(scope="module")
def model(tiny_model_dir: Any) -> Path:
    folder: Path = tiny_model_dir("llama")
    return folder


@pytest.fixture(scope="module")
def engine_kernel(model: Path) -> Iterator[Kernel]:
    from jupyter_client.manager import start_new_kernel

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    manager, client = start_new_kernel(kernel_name="python3", startup_timeout=60, env=environment)
    running = Kernel(manager, client)
    running.run("%load_ext vm_magic\nimport vm_magic, httpx, threading")
    yield running
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.fixture
def served(engine_kernel: Kernel, model: Path) -> Kernel:
    reply, _ = engine_kernel.run(
        f"handle = %vllm_metal serve {model} --port 0 --max-model-len 512 --served-model-name t"
    )
    assert reply["status"] == "ok", reply
    return engine_kernel


CLIENTS = """
def ask(i):
    with httpx.stream("POST", handle.base_url + "/completions", timeout=60,
                      headers={"Authorization": f"Bearer {handle.api_key}"},
                      json={"model": "t", "prompt": f"Once {i}", "max_tokens": 100, "temperature": 0,
                            "ignore_eos": True, "stream": i > 3}) as response:
        for number, chunk in enumerate(response.iter_lines()):
            if i in (6, 7) and number == 3:
                return  # this client leaves
            got.setdefault(i, []).append(chunk)
got = {}
threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
[t.start() for t in threads]
None
"""

WAIT_UNTIL_IDLE = """
import time
[t.join(60) for t in threads]
for attempt in range(100):
    stats = vm_magic.current().stats()
    if stats.num_running == 0:
        break
    time.sleep(0.05)
idle = stats.num_free_blocks + stats.num_cached_blocks == stats.num_blocks
print(sorted(got), stats.num_running, stats.num_used_blocks, idle)
"""


def test_an_interrupt_ends_one_cell_and_no_client_and_frees_its_blocks(served: Kernel) -> None:
    assert served.run(CLIENTS)[0]["status"] == "ok"
    cell = served.client.execute("%%chat -t 0.8\nTell me a long story")
    messages = drain(served, cell, lambda message: message["msg_type"] == "update_display_data")
    served.manager.interrupt_kernel()
    reply = served.client.get_shell_msg(timeout=30)["content"]
    shown = show_as_a_notebook([*messages, *drain(served, cell)])
    if reply["status"] == "error":  # a quick machine may have written the whole story by then
        assert reply["ename"] == "Interrupted"
        assert shown[0].endswith("■ interrupted")
    assert served.text(WAIT_UNTIL_IDLE) == "[0, 1, 2, 3, 4, 5, 6, 7] 0 0 True\n"


def test_the_cell_and_the_port_give_the_same_greedy_text(served: Kernel) -> None:
    _, messages = served.run("%%vllm_metal complete -t 0 --max-tokens 12\nOnce upon a time")
    body = "{'model': 't', 'prompt': 'Once upon a time', 'max_tokens': 12, 'temperature': 0}"
    http = served.text(
        f"print(httpx.post(handle.base_url + '/completions', timeout=60, json={body},"
        "headers={'Authorization': f'Bearer {handle.api_key}'}).json()['choices'][0]['text'] == str(_))"
    )
    assert http == "True\n"
    assert of_type(messages, "error") == []


def test_a_load_that_its_configuration_forbids_leaves_the_loaded_model_alone(
    served: Kernel, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").symlink_to(model / "model.safetensors")
    for wrong in (f"{model} --max-model-len 999999", str(tmp_path)):
        reply, _ = served.run(f"%vllm_metal load {wrong}")
        assert reply["ename"] in ("ConfigError", "ModelLoadError"), reply
        _, messages = served.run("print(vm_magic.current().closed, handle.base_url)")
        assert "False" in "".join(content["text"] for content in of_type(messages, "stream"))


def test_memory_is_flat_over_twenty_load_and_unload_cycles(served: Kernel, tiny_model_dir: Any) -> None:
    heavier = tiny_model_dir("llama", hidden_size=256)  # 50 MB of weights
    code = f"""
import psutil
from engine.llm import memory_in_use
process = psutil.Process()
used, resident, native_threads = [], [], []
for cycle in range(20):
    get_ipython().run_line_magic("vllm_metal", "load {heavier} --max-model-len 512")
    get_ipython().run_line_magic("vllm_metal", "unload")
    used.append(memory_in_use())
    resident.append(process.memory_info().rss)
    native_threads.append(process.num_threads())
threads_left = [t.name for t in threading.enumerate() if t.name.startswith(("vm-", "openai"))]
"""
    reply, _ = served.run(code, timeout=240)
    assert reply["status"] == "ok", reply
    assert served.text("print(max(used[1:]) - min(used[1:]), threads_left)") == "0 []\n"
    assert int(served.text("print(max(resident[2:]) - resident[1])")) < 40e6
    assert int(served.text("print(max(native_threads[2:]) - native_threads[1])")) <= 2


def test_a_kernel_restart_frees_the_port(served: Kernel) -> None:
    port = int(served.text("print(handle.port)"))
    served.manager.restart_kernel(now=False)
    served.client.wait_for_ready(timeout=60)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
