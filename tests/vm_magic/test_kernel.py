"""A real kernel over the Jupyter protocol, with the scripted model installed in it."""

from collections.abc import Callable
from typing import Any

import ipykernel
import pytest

from tests.vm_magic.conftest import Kernel

WORDS = "alpha beta gamma delta epsilon zeta eta theta"
Messages = list[dict[str, Any]]


def of_type(messages: Messages, kind: str) -> list[dict[str, Any]]:
    return [message["content"] for message in messages if message["msg_type"] == kind]


def show_as_a_notebook(messages: Messages) -> list[str]:
    """The texts that a notebook's cell ends with: updates applied to their displays."""
    shown: dict[str, str] = {}
    for kind in ("display_data", "update_display_data"):
        for content in of_type(messages, kind):
            shown[content["transient"]["display_id"]] = content["data"]["text/plain"]
    return list(shown.values())


@pytest.fixture
def ready(kernel: Kernel) -> Kernel:
    """The extension with a fresh scripted model; each test starts from here."""
    kernel.run("%reset -f out")
    reply, _ = kernel.run(
        "%unload_ext vm_magic\n%load_ext vm_magic\n%vllm_metal load smollm2\nllm = fakes.MADE[-1]; llm.delay = 0.03"
    )
    assert reply["status"] == "ok"
    return kernel


def test_loading_the_extension_sends_no_output(kernel: Kernel) -> None:
    reply, messages = kernel.run("%load_ext vm_magic")
    assert reply["status"] == "ok"
    assert {m["msg_type"] for m in messages} <= {"status", "execute_input"}


def test_a_load_shows_one_bar_that_becomes_one_line(kernel: Kernel) -> None:
    reply, messages = kernel.run("%load_ext vm_magic\n%vllm_metal unload\n%vllm_metal load smollm2")
    assert reply["status"] == "ok"
    assert len(of_type(messages, "display_data")) == 1
    assert any("<progress" in c["data"].get("text/html", "") for c in of_type(messages, "update_display_data"))
    lines = show_as_a_notebook(messages)[0].splitlines()
    assert "145.0 MB loaded in" in lines[0]
    assert lines[1].startswith("log line: metal_limit=51.54GB")
    assert of_type(messages, "stream")[-1]["text"].startswith("Room for 2,048 tokens")
    page = of_type(messages, "update_display_data")[-1]["data"]["text/html"]
    assert "<details" in page.partition("metal_limit")[0]
    assert of_type(messages, "execute_result") == []
    assert not any(c["name"] == "stderr" for c in of_type(messages, "stream"))


def test_a_chat_cell_streams_into_one_handle(ready: Kernel) -> None:
    reply, messages = ready.run("%%chat\nhello")
    assert reply["status"] == "ok"
    assert len(of_type(messages, "display_data")) == 1
    assert len(of_type(messages, "update_display_data")) > 3
    assert show_as_a_notebook(messages) == [WORDS]
    assert of_type(messages, "execute_result") == []
    assert ready.text("print(_, Out[len(In) - 2])") == f"{WORDS} {WORDS}\n"


def test_cells_of_a_kernel_go_along_with_their_streams_and_results(ready: Kernel) -> None:
    ready.run("import asyncio\nawait asyncio.sleep(0)\nprint('awaited')\n6 * 7")
    ready.run("1 / 0")
    reply, messages = ready.run("%%chat --new --cells 2 --error")
    assert reply["status"] == "ok"
    title = of_type(messages, "display_data")[0]["data"]["text/plain"]
    assert title.startswith("sent with: In [")
    assert "the last error" in title
    prompt = ready.text("print(llm.prompts[-1])")
    assert "```\nawaited\n42\n```" in prompt
    assert prompt.count("ZeroDivisionError: division by zero") == 2
    assert "Why did this fail" in prompt
    hooks = "[n for p in (sys.stdout, get_ipython().display_pub, get_ipython().displayhook) for n in vars(p)]"
    ready.run("import sys\n%unload_ext vm_magic")
    left = ready.text(f"print({hooks})")
    assert "'publish'" not in left
    assert "'start_displayhook'" not in left


def test_variants_in_a_kernel_are_one_output_with_buttons_and_a_line(ready: Kernel) -> None:
    reply, messages = ready.run("%%chat --new --compare temperature=0,1\nhello")
    assert reply["status"] == "ok"
    shown = [content["data"] for content in of_type(messages, "display_data")]
    assert len(shown) == 3
    assert "application/vnd.jupyter.widget-view+json" in shown[1]
    assert shown[2]["text/plain"].startswith("No reply is part of the conversation yet")
    assert len(of_type(messages, "update_display_data")) > 1
    found = "Out[len(In) - 2]"  # IPython lets _ be after a %reset of outputs
    assert ready.text(f"found = {found}\nprint(found.keep(0).text, len(found.keep(0).messages))") == f"{WORDS} 2\n"


def test_an_error_is_one_line_on_the_error_channel_and_aborts_the_next_cell(ready: Kernel) -> None:
    # the pause lets the second request queue up, as under "Run all"
    first = ready.client.execute("import time; time.sleep(0.5)\n%vllm_metal load smollm2 --block-size 3")
    second = ready.client.execute("'not run'")
    replies = {}
    while len(replies) < 2:
        message = ready.client.get_shell_msg(timeout=60)
        replies[message["parent_header"]["msg_id"]] = message["content"]
    assert replies[first]["status"] == "error"
    assert replies[first]["ename"] == "ConfigError"
    assert len(replies[first]["traceback"]) == 1
    assert "\n" not in replies[first]["traceback"][0]
    assert replies[second]["status"] == "aborted"
    errors = drain(ready, first)
    assert [c["ename"] for c in of_type(errors, "error")] == ["ConfigError"]
    assert of_type(errors, "stream") == []


def idle(message: Any) -> bool:
    return message["msg_type"] == "status" and message["content"]["execution_state"] == "idle"


def drain(kernel: Kernel, parent: str, until: Callable[[Any], bool] = idle) -> Messages:
    """iopub messages of the request ``parent`` up to the first that ``until`` accepts."""
    messages: Messages = []
    while True:
        message = kernel.client.get_iopub_msg(timeout=60)
        if message["parent_header"].get("msg_id") != parent:
            continue
        messages.append(message)
        if until(message):
            return messages


def shows(text: str) -> Callable[[Any], bool]:
    """Accepts the message whose output contains ``text``."""
    return lambda message: text in str(message["content"].get("data", {}).get("text/plain", ""))


def test_interrupt_keeps_the_partial_text_and_stops_run_all(ready: Kernel) -> None:
    ready.run("llm.delay = 0.2\nother = llm.submit_prompt('somebody else', llm.sampling_params())")
    first = ready.client.execute("%%chat\nhello")
    second = ready.client.execute("'not run'")
    messages = drain(ready, first, shows("alpha beta"))
    ready.manager.interrupt_kernel()
    replies = {}
    while len(replies) < 2:
        message = ready.client.get_shell_msg(timeout=60)
        replies[message["parent_header"]["msg_id"]] = message["content"]
    assert replies[first]["ename"] == "Interrupted"
    assert len(replies[first]["traceback"]) == 1
    assert replies[second]["status"] == "aborted"
    shown = show_as_a_notebook([*messages, *drain(ready, first)])
    assert len(shown) == 1
    assert shown[0].startswith("alpha beta")
    assert shown[0].endswith("■ interrupted")
    assert ready.text("print(other.result().outputs[0].text)") == f"{WORDS}\n"
    assert "alpha beta" in ready.text("print(get_ipython().run_line_magic('vllm_metal', 'history'))")
    reply, _ = ready.run("%%chat\nstill there?")
    assert reply["status"] == "ok"


TOOL = """
llm.tool_call_parser, llm.delay = "hermes", 0
llm.words = ['<tool_call>\\n{"name": "wait", "arguments": {}}\\n</tool_call>']
def wait():
    "Waits for long."
    import time
    time.sleep(600)
"""


def test_interrupt_ends_a_function_that_the_model_called(ready: Kernel) -> None:
    assert ready.run(TOOL)[0]["status"] == "ok"
    asked = ready.client.execute("%%chat --tools wait\nhello")
    messages = drain(ready, asked, lambda message: "running …" in str(message["content"].get("data", "")))
    ready.manager.interrupt_kernel()
    reply = ready.client.get_shell_msg(timeout=60)["content"]
    assert (reply["ename"], reply["evalue"].split(";")[0]) == ("Interrupted", "stopped in wait")
    shown = show_as_a_notebook([*messages, *drain(ready, asked)])
    assert shown == ["wait() → × interrupted by the user ■ interrupted"]
    roles = "print([m['role'] for m in get_ipython().run_line_magic('vllm_metal', 'history').messages])"
    assert ready.text(roles) == "['user', 'assistant', 'tool']\n"


def test_interrupting_a_load_leaves_nothing_loaded(ready: Kernel) -> None:
    ready.run("%vllm_metal unload")
    assert interrupted_load(ready) == (["slow: not loaded"], "loading stopped; nothing is loaded")
    assert "no model is loaded" in ready.text("print(get_ipython().run_line_magic('vllm_metal', 'status'))")


def test_interrupting_a_load_gives_the_model_before_back(ready: Kernel) -> None:
    shown, error = interrupted_load(ready)
    assert error == "loading stopped; smollm2 was loaded again"
    assert shown[0] == "slow: not loaded"
    assert shown[1].startswith("smollm2: loaded again in")
    assert ready.text("import vm_magic; print(vm_magic.current() is fakes.MADE[-1])") == "True\n"


def interrupted_load(ready: Kernel) -> tuple[list[str], str]:
    """What is shown of a load that is stopped in the middle, and the error's line."""
    first = ready.client.execute("%vllm_metal load slow")
    messages = drain(ready, first, lambda message: "weights" in str(message["content"].get("data")))
    ready.manager.interrupt_kernel()  # the model before is gone by then
    reply = ready.client.get_shell_msg(timeout=60)["content"]
    assert reply["ename"] == "Interrupted"
    return show_as_a_notebook([*messages, *drain(ready, first)]), reply["evalue"]


def test_a_detached_reply_fills_the_cell_that_asked_while_others_run(ready: Kernel) -> None:
    ready.run("llm.delay = 0.25")
    asked = ready.client.execute("%%chat --detach\nhello")
    others = [ready.client.execute("import time; time.sleep(0.15); print('mine')") for _ in range(6)]
    messages: Messages = []

    def mine() -> Messages:
        """What the asking cell shows: before version 7 ipykernel sends updates in the running cell's name."""
        return [
            m
            for m in messages
            if m["parent_header"].get("msg_id") == asked
            or (ipykernel.version_info < (7,) and m["msg_type"] == "update_display_data")
        ]

    while not any(m["parent_header"].get("msg_id") == others[-1] and idle(m) for m in messages):
        messages.append(ready.client.get_iopub_msg(timeout=60))
    while show_as_a_notebook(mine()) != [WORDS]:
        messages.append(ready.client.get_iopub_msg(timeout=60))
    for _ in range(7):
        ready.client.get_shell_msg(timeout=60)
    theirs = [m for m in messages if m["parent_header"].get("msg_id") in others]
    assert show_as_a_notebook(mine()) == [WORDS]
    assert next(i for i, m in enumerate(mine()) if idle(m)) < len(mine()) - 3, "the cell ended before its reply did"
    if ipykernel.version_info >= (7,):
        assert of_type(theirs, "update_display_data") == []
    assert [c["text"] for c in of_type(theirs, "stream")] == ["mine\n"] * 6


def test_serve_shows_the_address_and_never_the_key(ready: Kernel) -> None:
    reply, messages = ready.run("handle = %vllm_metal serve --port 0 --api-key s3cret\nhandle")
    assert reply["status"] == "ok"
    assert "http://127.0.0.1" in str(of_type(messages, "execute_result"))
    assert "s3cret" not in str(messages).replace("--api-key s3cret", "")
    assert ready.text("print(handle.api_key)") == "s3cret\n"


def test_completion_requests_are_answered(ready: Kernel) -> None:
    ready.client.complete("%vllm_metal lo", 14)
    content = ready.client.get_shell_msg(timeout=60)["content"]
    assert content["matches"] == ["load", "logs"]
    assert (content["cursor_start"], content["cursor_end"]) == (12, 14)


def test_reload_keeps_the_model_in_a_kernel(ready: Kernel) -> None:
    assert (
        ready.text("%reload_ext vm_magic\nimport vm_magic\nprint(vm_magic.current() is llm, llm.closed)")
        == "True False\n"
    )


def test_unload_leaves_no_magic_of_either_kind(ready: Kernel) -> None:
    ready.run("%unload_ext vm_magic")
    assert (
        ready.text("print(llm.closed, 'vllm_metal' in get_ipython().magics_manager.magics['cell'])") == "True False\n"
    )
