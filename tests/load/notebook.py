"""A real kernel with the model, its port and the panel, driven by cells; and what its process holds."""

import asyncio
import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from jupyter_client.manager import start_new_async_kernel

from tests.benchmarks.machine import ROOT
from tests.load.questions import MAX_MODEL_LEN

NUM_BLOCKS = 160
"""Of 16 tokens: too few for all that 64 sequences may want, so that some give way."""
NUM_SEQS = 64
_SETTLE_SECONDS = 30
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class CellFailedError(Exception):
    """A cell raised."""


@dataclass(frozen=True)
class Held:
    """What the kernel's process holds while nothing is under way.

    ``rss`` is in bytes, ``in_use`` what glibc's heaps have in use of it without the buffers that MLX
    keeps for reuse (None without glibc).
    """

    rss: int
    in_use: int | None
    threads: int
    files: int
    pooled: int
    """Threads of event loops' pools, which have at most four more than there are processors; not in ``threads``."""
    objects: Mapping[str, int]
    python_blocks: int
    traced: int | None
    num_blocks: int
    preemptions: int

    @property
    def num_objects(self) -> int:
        """Objects of this project's classes."""
        return sum(self.objects.values())


class Notebook:
    """``await Notebook.start(…)``; cells are run one at a time, and leave nothing in ``In`` and ``Out``."""

    def __init__(self, manager: Any, client: Any) -> None:
        self._manager, self._client = manager, client
        self.base_url = ""
        self.key = ""
        self._process = psutil.Process()

    @classmethod
    async def start(cls, model: Path, *, panel: bool = True, more: str = "") -> "Notebook":
        """Load ``model``, open its port and the panel."""
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        manager, client = await start_new_async_kernel(
            kernel_name="python3", startup_timeout=120, env={**os.environ, "PYTHONPATH": paths}
        )
        self = cls(manager, client)
        try:
            await self._open(model, panel, more)
        except BaseException:
            await self.close()
            raise
        return self

    async def _open(self, model: Path, panel: bool, more: str) -> None:
        await self.run("%load_ext vm_magic")
        options = f"--max-model-len {MAX_MODEL_LEN} --max-num-seqs {NUM_SEQS} {more}"
        await self.run(f"%vllm_metal load {model} --gpu-memory-utilization 0.2 --served-model-name tiny {options}")
        await self.run("import vm_magic; from tests.load import inside; llm = vm_magic.current()")
        await self.run(f"inside.change_plan(llm, {NUM_BLOCKS}, {NUM_SEQS}); server = llm.serve()")
        self.base_url, self.key, pid = json.loads(
            await self.run("import json, os; print(json.dumps([server.base_url, server.api_key, os.getpid()]))")
        )
        self.base_url = self.base_url.removesuffix("/v1")
        self._process = psutil.Process(pid)
        if panel:
            await self.run("%vllm_metal panel")

    async def run(self, code: str, timeout: float = 300) -> str:
        """What the cell prints. Raises CellFailedError."""
        printed: list[str] = []

        def note(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream":
                printed.append(message["content"]["text"])

        reply = await self._client.execute_interactive(
            code, timeout=timeout, output_hook=note, store_history=False, allow_stdin=False
        )
        content = reply["content"]
        if content["status"] != "ok":
            trace = _COLOURS.sub("", "\n".join(content.get("traceback", [])[-2:]))
            raise CellFailedError(f"{code[:200]!r}: {content.get('ename')}: {content.get('evalue')} {trace}")
        return "".join(printed)

    async def held(self, first: Held | None = None) -> Held:
        """What is held once nothing is under way; waits a while for as few threads and files as at ``first``."""
        deadline = time.monotonic() + _SETTLE_SECONDS
        while True:
            under_way, pooled = json.loads(await self.run("inside.under_way(llm)"))
            threads, files = self._process.num_threads() - pooled, self._process.num_fds()
            if not under_way and (first is None or (threads <= first.threads and files <= first.files)):
                break
            if time.monotonic() > deadline:
                if under_way:
                    raise CellFailedError("requests are still under way long after the last client left")
                break
            await asyncio.sleep(0.05)
        rss = self.rss()
        told = json.loads(await self.run("inside.probe(llm)"))
        return Held(
            rss, told["in_use"], threads, files, pooled,
            told["objects"], told["python_blocks"], told["traced"], told["num_blocks"], told["preemptions"],
        )  # fmt: skip

    def rss(self) -> int:
        """Bytes that the process holds now."""
        return int(self._process.memory_info().rss)

    async def close(self) -> None:
        """Stop the kernel."""
        self._client.stop_channels()
        with suppress(Exception):
            await self._manager.shutdown_kernel(now=True)


def cells(chat: list[dict[str, Any]], num_tokens: int, said: str) -> list[str]:
    """Cells of a user while clients are served, the first of them checked against what the model says alone."""
    return [
        f"inside.check_chat(llm, {chat!r}, {num_tokens}, {said!r})",
        "%vllm_metal set temperature=0.4 top_p=0.8",
        "%%vllm_metal chat --new -t 0 --max-tokens 12\nHow many roads?",
        f"inside.change_plan(llm, {NUM_BLOCKS}, {NUM_SEQS})",
        f"inside.leave_stream(llm, {chat!r})",
        "llm.settings.update(temperature=1.3, top_k=40, min_p=0.01)",
        "inside.check_blocks(llm)",
        "llm.activity(); llm.block_map(); None",
        f"inside.change_plan(llm, {NUM_BLOCKS}, {NUM_SEQS})",
        "llm.settings.reset()",
        "%vllm_metal status",
    ]
