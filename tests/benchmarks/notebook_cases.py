"""What a notebook adds: a chat cell's first token in a real kernel, beside the same request to ``engine.LLM``."""

import itertools
import time
from collections.abc import Iterator
from typing import Any

from jupyter_client.manager import start_new_kernel

from tests.benchmarks.harness import Case

_WORDS = "The quick brown fox jumps over the lazy dog while it rains in the mountains and nobody is there to see it. "
_NUMBERS = itertools.count(1000)
_MEASURE = """
import time, vm_magic
llm = vm_magic.current()
prompt = llm.tokenize(llm.render_chat([{{"role": "user", "content": {text!r}}}]), False)
begin = time.perf_counter()
stream = llm.submit_prompt(prompt, llm.sampling_params(temperature=0, max_tokens=4))
next(stream)
print(time.perf_counter() - begin)
stream.result()
del llm, stream
"""


class Kernel:
    """A real kernel with the extension and the model loaded."""

    def __init__(self, model: str) -> None:
        self._manager, self._client = start_new_kernel(startup_timeout=120)
        self.run("%load_ext vm_magic")
        self.run(f"%vllm_metal load {model}", timeout=300)

    def run(self, code: str, timeout: float = 120) -> list[tuple[float, dict[str, Any]]]:
        """The cell's messages with the time since it was sent. Raises RuntimeError where it fails."""
        messages: list[tuple[float, dict[str, Any]]] = []
        begin = time.perf_counter()
        reply = self._client.execute_interactive(
            code, timeout=timeout, output_hook=lambda message: messages.append((time.perf_counter() - begin, message))
        )
        if reply["content"]["status"] != "ok":
            raise RuntimeError(str(reply["content"]))
        return messages

    def close(self) -> None:
        """Stop the kernel."""
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)


def notebook_cases(model: str) -> Iterator[Case]:
    """One case; the kernel lives while it is measured."""
    kernel = Kernel(model)
    yield Case(
        "first token of a chat, prompt of 150 tokens",
        "s",
        "lower",
        {"cell": lambda: _cell(kernel), "engine.LLM": lambda: _direct(kernel)},
        {"model": model},
        target=0.9,
    )
    kernel.close()


def _message() -> str:
    return f"Text number {next(_NUMBERS)}. {5 * _WORDS}"


def _cell(kernel: Kernel) -> float:
    """Until the display holds a beginning of the reply: what stood there before is a placeholder."""
    shown = [
        (seconds, message["content"]["data"].get("text/plain", "").strip())
        for seconds, message in kernel.run(f"%%vllm_metal chat --new -t 0 --max-tokens 4\n{_message()}")
        if message["msg_type"] in ("display_data", "update_display_data")
    ]
    reply = shown[-1][1]
    return next(seconds for seconds, text in shown if text and text[:3] == reply[:3])


def _direct(kernel: Kernel) -> float:
    for _, message in kernel.run(_MEASURE.format(text=_message())):
        if message["msg_type"] == "stream":
            return float(message["content"]["text"])
    raise RuntimeError("the cell printed nothing")
