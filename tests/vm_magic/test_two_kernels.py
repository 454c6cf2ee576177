"""Two notebooks on one machine: each is told what the other holds, and goes on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jupyter_client.manager import start_new_kernel

from tests.vm_magic.conftest import ROOT, Kernel
from tests.vm_magic.test_kernel import of_type, show_as_a_notebook


@contextmanager
def kernel_of(notebook: str, runtime: Path) -> Iterator[Kernel]:
    variables = {"PYTHONPATH": str(ROOT), "XDG_RUNTIME_DIR": str(runtime), "JPY_SESSION_NAME": f"/notes/{notebook}"}
    manager, client = start_new_kernel(kernel_name="python3", startup_timeout=60, env={**os.environ, **variables})
    running = Kernel(manager, client)
    running.run("%load_ext vm_magic")
    yield running
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def shown(kernel: Kernel, code: str) -> str:
    """All texts that ``code`` shows: prints, displays and the result."""
    reply, messages = kernel.run(code)
    assert reply["status"] == "ok", reply
    results = [content["data"]["text/plain"] for content in of_type(messages, "execute_result")]
    printed = [content["text"] for content in of_type(messages, "stream") if content["name"] == "stdout"]
    return "\n".join([*show_as_a_notebook(messages), *printed, *results])


def test_a_second_notebook_is_told_of_the_first(tiny_model_dir: Any, tmp_path: Path) -> None:
    model = f"{tiny_model_dir('llama')} --served-model-name tiny --max-model-len 512"
    with kernel_of("chat.ipynb", tmp_path) as first, kernel_of("other.ipynb", tmp_path) as second:
        alone = shown(first, f"h = %vllm_metal serve {model} --port 0")
        assert "Another" not in alone
        assert "Room for" in alone
        port = shown(first, "h.port")
        who = f"Another notebook (chat.ipynb, tiny, port {port}) plans up to"
        for code in (f"%vllm_metal plan {model}", f"%vllm_metal load {model}", "h = %vllm_metal serve --port 0"):
            told = shown(second, code)
            assert who in told
            assert "together more than there is; --gpu-memory-utilization 0.45 in each shares it" in told
        assert "together" not in shown(second, f"%vllm_metal load {model} --gpu-memory-utilization 0.01")
        assert "Another" not in shown(second, f"%vllm_metal plan {model} --device-memory 10GB")
        assert "Another notebook (other.ipynb, tiny)" in shown(first, "%vllm_metal")
        shown(second, "%vllm_metal unload")
        assert "Another" not in shown(first, "%vllm_metal")
        second.run(f"%vllm_metal load {model}")
        second.manager.shutdown_kernel(now=True)
        assert "Another" not in shown(first, "%vllm_metal")
