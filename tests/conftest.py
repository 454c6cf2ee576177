"""Shared fixtures. OpenBLAS is loaded here, before anything imports MLX.

* ``smollm2``: the real SmolLM2-135M-Instruct, resolved (fetched once, 93 MB). Tests that use it, or anything
  made from it, get the marker ``weights`` here.
* ``smollm2_gguf``: the path of its file, for its vocabulary.
* ``tiny_model_dir(architecture, seed=0, **config)``: a folder with a tiny random model (llama, qwen2, qwen3,
  gemma3_text) and SmolLM2's tokenizer; made once per session for equal arguments.
* ``scripted_llm(text, ..., **options)``: an engine whose model says ``text`` (tests/scripted_model.py); options of
  ``write_scripted_model`` and of the engine mix. Closed after the test.
* ``kernel_folder``: where kernels' texts are compiled by g++, shared by all workers.
* ``no_network``: every connection attempt fails the test.

``pytest -n 2 --dist loadfile`` (``make test`` does so) runs files side by side: each worker then keeps to one BLAS
thread, and the files that take longest are handed out first. A new tests module begins with what came before it
frozen for the garbage collector, since engines and sessions collect whenever they close.
"""

import asyncio
import gc
import inspect
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER is not None:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from engine.runner.device.devices import choose_blas  # noqa: E402

choose_blas()

from engine.models.local import ResolvedModel  # noqa: E402
from engine.models.resolve import resolve  # noqa: E402
from tests import scripted_model, tiny_models  # noqa: E402

if TYPE_CHECKING:
    from engine.llm import LLM

TinyModelDir = Callable[..., Path]
ScriptedLLM = Callable[..., "LLM"]
LONGEST_FIRST = (
    "tests/engine/parity/",
    "tests/browser/",
    "tests/load/",
    "notebooks/",
    "tests/sweep/",
    "tests/vm_magic/test_",
    "tests/engine/runner/kernels/test_routed_",
    "tests/engine/test_constrained",
    "tests/engine/openai/test_fuzz",
    "tests/test_",
)
"""Files by their path's beginning: a long one that came last would leave the other workers idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that need the real weights or their tokenizer, so that ``-m 'not weights'`` skips them."""
    for item in items:
        if "smollm2_gguf" in getattr(item, "fixturenames", ()):
            item.add_marker("weights")
    if WORKER is not None:
        items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    """Where an item's file stands in the order; the sort is stable, so a file's tests keep theirs."""
    found = (place for place, begin in enumerate(LONGEST_FIRST) if item.nodeid.startswith(begin))
    return next(found, len(LONGEST_FIRST))


@pytest.fixture(autouse=True, scope="session")
def _alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Models that other test processes hold are not seen by these, nor by their kernels."""
    os.environ["XDG_RUNTIME_DIR"] = str(tmp_path_factory.mktemp("runtime"))


@pytest.fixture(autouse=True, scope="session")
def _quick_ports() -> Iterator[None]:
    """uvicorn looks ten times a second whether it is to stop, and hundreds of tests stop one: here it looks often."""
    import uvicorn.server

    async def sleep(seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.005))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn.server, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": sleep}))
        yield


@pytest.fixture(autouse=True, scope="module")
def _frozen_heap() -> None:
    """Modules and caches of earlier tests are looked through no more: 0.4 s less for each engine that closes."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def kernel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where GPU kernels are compiled for this machine: each text once, whichever worker comes first."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if WORKER else folder) / "kernels"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    return resolve("smollm2").path


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> ResolvedModel:
    return ResolvedModel("smollm2", smollm2_gguf, "gguf")


@pytest.fixture(scope="session")
def tiny_model_dir(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyModelDir:
    made: dict[tuple[object, ...], Path] = {}

    def make(architecture: str = "llama", seed: int = 0, **changes: Any) -> Path:
        key = (architecture, seed, repr(sorted(changes.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"tiny-{architecture}")
            made[key] = tiny_models.write_model(folder, architecture, smollm2_gguf, seed, **changes)
        return made[key]

    return make


@pytest.fixture
def scripted_llm(smollm2_gguf: Path, tmp_path: Path) -> Iterator[ScriptedLLM]:
    from engine.llm import LLM

    made: list[LLM] = []
    own = set(inspect.signature(scripted_model.write_scripted_model).parameters)

    def make(*scripts: str, **options: Any) -> LLM:
        scripted_model.install()
        written = {name: options.pop(name) for name in list(options) if name in own}
        folder = scripted_model.write_scripted_model(tmp_path / f"script-{len(made)}", smollm2_gguf, scripts, **written)
        options = {"max_model_len": 1024, "gpu_memory_utilization": 0.2, "served_model_name": "scripted", **options}
        made.append(LLM(str(folder), **options))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise AssertionError(f"the network was asked: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
