"""``RequestStream``: the hand-over between the engine's thread and whoever waits."""

import asyncio
import threading
import time

from engine.outputs import CompletionDelta
from engine.params.sampling_params import SamplingParams
from engine.runtime import stream as stream_module
from engine.runtime.stream import RequestStream, wake_all


def test_news_for_an_event_loop_that_closed_meanwhile_do_not_fail_the_engine(monkeypatch):
    stream = RequestStream("a", None, [1], SamplingParams(), lambda: None)
    loop = asyncio.new_event_loop()

    async def wait_a_moment():
        try:
            await asyncio.wait_for(anext(stream), 0.01)
        except TimeoutError:
            return

    loop.run_until_complete(wait_a_moment())
    loop.close()
    monkeypatch.setattr(loop, "is_closed", lambda: False)  # it closed between the question and the call
    stream.put(CompletionDelta(0, "x", [1]))
    assert [delta.text for delta in stream.drain()] == ["x"]


def test_an_event_loop_is_woken_once_for_the_news_of_many_streams(monkeypatch):
    async def main() -> None:
        streams = [RequestStream(str(i), None, [1], SamplingParams(), lambda: None) for i in range(5)]
        waiting = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await asyncio.sleep(0)  # all of them wait
        loop, calls = asyncio.get_running_loop(), []
        call_soon = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: calls.append(args) or call_soon(*args))
        for stream in streams:
            stream.append(CompletionDelta(0, "x", [1]))
        wake_all([*streams, streams[0]])
        deltas = await asyncio.wait_for(asyncio.gather(*waiting), 5)
        assert [delta.text for delta in deltas] == ["x"] * 5
        assert len(calls) == 1

    asyncio.run(main())


def test_a_thread_that_waits_is_woken_long_before_it_would_look_again(monkeypatch):
    monkeypatch.setattr(stream_module, "_WAIT_SLICE", 30.0)
    stream = RequestStream("a", None, [1], SamplingParams(), lambda: None)
    found: list[list[CompletionDelta]] = []
    thread = threading.Thread(target=lambda: found.append(stream.drain(30)))
    thread.start()
    while not stream._num_waiting:
        time.sleep(0.001)
    stream.append(CompletionDelta(0, "x", [1]))
    wake_all([stream])
    thread.join(10)
    assert [delta.text for delta in found[0]] == ["x"]
    assert stream._num_waiting == 0
