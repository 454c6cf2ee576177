"""Ctrl-C before each call of a function of ours, one after the other, in everything that a caller waits for.

And behind each call with which Python's own functions take or give back a lock.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from engine.llm import LLM
from tests.engine.faults.calls import Interrupts
from tests.engine.faults.scenes import GREEDY, LIMIT, assert_goes_on, is_idle, nothing_leaks
from tests.nightly import size

pytestmark = [
    pytest.mark.nightly,
    # Python loses an interrupt that comes while it clears away a generator.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
LONG = GREEDY.replace(max_tokens=30)
MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]


def load(folder: str) -> LLM:
    options = {"max_model_len": 256, "max_num_batched_tokens": 32, "gpu_memory_utilization": 0.5}
    return LLM(folder, **options)


@pytest.fixture(scope="module")
def folder(tiny_model_dir: Any) -> str:
    return str(tiny_model_dir("llama", num_hidden_layers=2))


@pytest.fixture(scope="module")
def llm(folder: str) -> Iterator[LLM]:
    with load(folder) as llm:
        yield llm


def moments(total: int, brief: int) -> range:
    """Every moment in the long form, some of them else."""
    return range(0, total, size(max(1, total // brief), 1))


PHASES: dict[str, Callable[[LLM], Any]] = {
    "generate": lambda llm: llm.generate([[5, 6], [7, 8]], LONG, use_tqdm=False),
    "chat": lambda llm: llm.chat(MESSAGES, LONG, use_tqdm=False),
    "stream": lambda llm: list(llm.stream(MESSAGES, LONG)),
    "map": lambda llm: llm.map(["a", "b"], "Say {{ text }}", max_tokens=30, use_tqdm=False),
    "achat": lambda llm: asyncio.run(llm.achat(MESSAGES, LONG)),
    "score": lambda llm: llm.score("Once upon a time"),
    "replan": lambda llm: llm.replan(fraction=0.4),
    "settings": lambda llm: llm.settings.update(temperature=0.5),
    "activity": lambda llm: (llm.activity(), llm.block_map(), llm.stats()),
}


IN_LOCKS = pytest.mark.parametrize("in_locks", [False, True], ids=["of_ours", "in_locks"])


@IN_LOCKS
@pytest.mark.parametrize("phase", PHASES)
def test_an_interrupted_call_leaves_no_request_and_the_next_one_works(
    llm: LLM, folder: str, phase: str, *, in_locks: bool
) -> None:
    interrupts, action = Interrupts(in_locks=in_locks), PHASES[phase]
    action(llm)
    llm.replan(fraction=0.5)
    for number in moments(interrupts.count(lambda: action(llm)), 3 if in_locks else 6):
        interrupts.interrupt(lambda: action(llm), number)
        assert is_idle(llm), f"a request goes on: {interrupts.at}"
        assert not llm._thread._handed_over, interrupts.at
        llm.replan(fraction=0.5)
        assert_goes_on(llm, folder)
    llm.settings.reset()


@IN_LOCKS
def test_an_interrupted_serve_or_stop_leaves_a_port_that_opens_again(llm: LLM, *, in_locks: bool) -> None:
    interrupts = Interrupts(in_locks=in_locks)

    def serve() -> None:
        llm.serve(port=0, no_api_key=True)

    def stop() -> None:
        server = llm.server
        if server is not None:
            server.stop()

    serve()
    stop()
    with nothing_leaks(bytes_more=1 << 20):
        for action, before in ((serve, stop), (stop, serve), (serve, serve)):
            before()
            for number in moments(interrupts.count(action), 3):
                before()
                interrupts.interrupt(action, number)
                again = llm.serve(port=0, no_api_key=True)
                assert httpx.get(f"{again.base_url}/models", timeout=LIMIT).status_code == 200
                again.stop()
                names = [thread.name for thread in threading.enumerate()]
                assert "openai-port" not in names, interrupts.at
        stop()


@IN_LOCKS
def test_an_interrupted_load_leaves_nothing(folder: str, *, in_locks: bool) -> None:
    interrupts = Interrupts(in_locks=in_locks)
    load(folder).close()
    made: list[LLM] = []
    for number in moments(interrupts.count(lambda: load(folder).close()), 3):
        with nothing_leaks():
            reached = interrupts.interrupt(lambda: made.append(load(folder)), number)
            assert reached != bool(made), interrupts.at
            while made:
                made.pop().close()


@IN_LOCKS
def test_an_interrupted_close_can_be_repeated(folder: str, *, in_locks: bool) -> None:
    interrupts = Interrupts(in_locks=in_locks)

    def served() -> LLM:
        llm = load(folder)
        llm.serve(port=0, no_api_key=True)
        return llm

    total = interrupts.count(served().close)
    for number in moments(total, 2):
        with nothing_leaks():
            llm = served()
            interrupts.interrupt(llm.close, number)
            llm.close()
            assert llm.closed
            assert llm.server is None
            del llm
