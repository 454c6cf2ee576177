"""Maps, grids and a remote server in a real kernel: the server is a real engine in this process."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine import LLM
from tests import scripted_model
from tests.vm_magic.conftest import ROOT, Kernel
from tests.vm_magic.test_kernel import drain, idle, of_type, show_as_a_notebook, shows


@pytest.fixture(scope="module")
def folder(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    scripted_model.install()
    path = tmp_path_factory.mktemp("scripted")
    return scripted_model.write_scripted_model(path, smollm2_gguf, "word " * 200, step_seconds=0.02)


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[LLM]:
    """The model in this process, behind a port."""
    with LLM(str(folder), max_model_len=1024, gpu_memory_utilization=0.1, served_model_name="there") as llm:
        llm.serve(port=0, api_key=["k3y"])
        yield llm


@pytest.fixture(scope="module")
def kernel(folder: Path) -> Iterator[Kernel]:
    from jupyter_client.manager import start_new_kernel

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_API_KEY": "k3y"}
    manager, client = start_new_kernel(kernel_name="python3", startup_timeout=60, env=environment)
    running = Kernel(manager, client)
    reply, _ = running.run("from tests import scripted_model; scripted_model.install()\n%load_ext vm_magic")
    assert reply["status"] == "ok", reply
    yield running
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def interrupted(kernel: Kernel, code: str, when: Callable[[Any], bool]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run ``code`` and press ■ once ``when`` accepts a message."""
    cell = kernel.client.execute(code)
    messages = drain(kernel, cell, lambda message: idle(message) or when(message))
    assert not idle(messages[-1]), messages
    kernel.manager.interrupt_kernel()
    reply = kernel.client.get_shell_msg(timeout=60)["content"]
    return reply, [*messages, *drain(kernel, cell)]


def several_done(message: Any) -> bool:
    """Whether the bar shows that at least four prompts are done."""
    found = re.match(r"prompts: (\d+) of 40", str(message["content"].get("data", {}).get("text/plain", "")))
    return found is not None and int(found[1]) >= 4


def test_a_grid_shows_a_bar_that_becomes_its_table_and_stopping_keeps_what_is_done(
    kernel: Kernel, folder: Path
) -> None:
    reply, _ = kernel.run(f"%vllm_metal load {folder} --max-model-len 512 --max-num-seqs 2", timeout=120)
    assert reply["status"] == "ok", reply
    kernel.run("n = list(range(40))")
    reply, messages = interrupted(
        kernel, "%%vllm_metal grid --over n -t 0 --max-tokens 5\nNumber {{ n }}", several_done
    )
    assert reply["ename"] == "Interrupted"
    assert len(reply["traceback"]) == 1
    assert "of 40 prompts done; _ has what there is, and --resume goes on" in reply["evalue"]
    (shown,) = show_as_a_notebook(messages)
    assert "prompts done" in shown
    assert kernel.text("print(3 < len(_) < 40, set(_.finish_reason) <= {'length', 'abort'})") == "True True\n"
    _, messages = kernel.run("%%vllm_metal grid --over n -t 0 --max-tokens 5 --resume\nNumber {{ n }}", timeout=120)
    (shown,) = show_as_a_notebook(messages)
    assert "40 prompts done" in shown
    assert of_type(messages, "execute_result") == []


def test_a_remote_chat_streams_and_stopping_it_ends_it_on_the_server(kernel: Kernel, served: LLM) -> None:
    assert served.server is not None
    out = kernel.text(f"%vllm_metal connect {served.server.base_url}")
    assert "there (1,024 tokens" in out
    assert "k3y" not in out
    reply, messages = interrupted(kernel, "%%chat -t 0\nGo", shows("word word word"))
    assert reply["ename"] == "Interrupted"
    assert show_as_a_notebook(messages)[0].endswith("■ interrupted")
    assert kernel.text("import vm_magic; print(vm_magic.current())").startswith("<RemoteLLM there at http")
    reply, messages = kernel.run("%%chat -n -t 0 --max-tokens 3 --stats\nGo")
    assert reply["status"] == "ok"
    assert show_as_a_notebook(messages)[0].startswith("word word word")
    assert kernel.text("print(_.finish_reason, _.usage.completion_tokens)") == "length 3\n"
    kernel.run("%vllm_metal connect --close\n%vllm_metal unload")
    assert served.stats().num_running == 0
