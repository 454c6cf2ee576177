"""What ends a request that a coroutine waits for: a cancelled task, a time-out, a loop that is left, Ctrl-C."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from engine import LLM, SamplingParams
from tests import scripted_model

MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]
PARAMS = SamplingParams(temperature=0, max_tokens=400)


@pytest.fixture(scope="module")
def llm(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    scripted_model.install()
    folder = tmp_path_factory.mktemp("scripted")
    scripted_model.write_scripted_model(folder, smollm2_gguf, "word " * 400, step_seconds=0.02)
    with LLM(str(folder), max_model_len=1024, gpu_memory_utilization=0.2) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left(llm: LLM) -> Iterator[None]:
    yield
    deadline = time.monotonic() + 3  # a request takes 8 s
    while llm.activity().requests:
        assert time.monotonic() < deadline, "a request goes on"
        time.sleep(0.01)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


async def begun(llm: LLM, count: int = 1) -> None:
    while sum(request.num_output_tokens > 0 for request in llm.activity().requests) < count:
        await asyncio.sleep(0.01)


async def streamed(llm: LLM) -> None:
    async for _ in llm.astream(MESSAGES, PARAMS):
        pass


DOORS: dict[str, Callable[[LLM], Coroutine[Any, Any, Any]]] = {
    "achat": lambda llm: llm.achat(MESSAGES, PARAMS),
    "astream": streamed,
    "gathered": lambda llm: _gathered(llm),
}


async def _gathered(llm: LLM) -> None:
    await asyncio.gather(llm.achat(MESSAGES, PARAMS), streamed(llm))


@pytest.mark.parametrize("door", DOORS)
def test_a_cancelled_task_ends_its_requests(llm: LLM, door: str) -> None:
    async def main() -> None:
        task = asyncio.create_task(DOORS[door](llm))
        await begun(llm)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


@pytest.mark.parametrize("door", DOORS)
def test_a_time_out_ends_its_requests(llm: LLM, door: str) -> None:
    async def main() -> None:
        async with asyncio.timeout(0.3):
            await DOORS[door](llm)

    with pytest.raises(TimeoutError):
        asyncio.run(main())


def test_a_task_group_ends_the_others_where_one_fails(llm: LLM) -> None:
    async def fail() -> None:
        await begun(llm)
        raise LookupError("no")

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            for made in (llm.achat(MESSAGES, PARAMS), streamed(llm), fail()):
                group.create_task(made)

    with pytest.raises(ExceptionGroup):
        asyncio.run(main())


def test_leaving_the_loop_ends_the_request_before_anything_else_runs(llm: LLM) -> None:
    async def failing() -> None:
        async for _ in llm.astream(MESSAGES, PARAMS):
            raise LookupError("in the body")

    async def main() -> None:
        async for _ in llm.astream(MESSAGES, PARAMS):
            break
        with pytest.raises(LookupError):
            await failing()
        while llm.activity().requests:
            time.sleep(0.01)  # the event loop stands still: nothing of it is needed

    asyncio.run(asyncio.wait_for(main(), 3))


def test_a_closed_stream_is_over(llm: LLM) -> None:
    async def main() -> None:
        deltas: Any = llm.astream(MESSAGES, PARAMS)
        async with aclosing(deltas):
            await anext(deltas)
        assert [delta async for delta in deltas] == []

    asyncio.run(main())


def test_a_stream_that_nobody_reads_asks_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(llm, "submit", asked.append)
    llm.astream(MESSAGES, PARAMS)
    assert not asked


@pytest.mark.parametrize("door", DOORS)
def test_ctrl_c_ends_what_a_loop_waits_for_that_cancels_nothing_by_itself(llm: LLM, door: str) -> None:
    """As IPython's terminal runs a cell."""
    loop = asyncio.new_event_loop()
    went_on: list[str] = []

    async def main() -> None:
        await DOORS[door](llm)
        went_on.append("the next line of the cell")

    def interrupt() -> None:
        while not any(request.num_output_tokens for request in llm.activity().requests):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        loop.run_until_complete(main())
    while llm.activity().requests:  # though the loop stands still
        time.sleep(0.01)
    loop.run_until_complete(asyncio.sleep(0.1))  # IPython's next prompt
    assert went_on == []
    assert not asyncio.all_tasks(loop)
    loop.close()


def test_ctrl_c_under_asyncio_run_ends_the_request(llm: LLM) -> None:
    def interrupt() -> None:
        while not any(request.num_output_tokens for request in llm.activity().requests):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(llm.achat(MESSAGES, PARAMS))


def test_ctrl_c_leaves_what_a_standing_loop_has_under_way(llm: LLM) -> None:
    loop = asyncio.new_event_loop()

    async def main() -> "asyncio.Task[Any]":
        task = asyncio.create_task(llm.achat(MESSAGES, SamplingParams(temperature=0, max_tokens=20)))
        await begun(llm)
        return task

    task = loop.run_until_complete(main())
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    output = loop.run_until_complete(task)
    assert output.outputs[0].finish_reason == "length"
    loop.close()
