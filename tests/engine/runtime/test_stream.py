"""``RequestStream``: the hand-over between the engine's thread and whoever waits."""

import asyncio
import threading
import time

import pytest

from engine.outputs import CompletionDelta
from engine.params.sampling_params import SamplingParams
from engine.runtime import stream as stream_module
from engine.runtime.stream import RequestStream, take_all, wake_all


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
    while not stream._changed.waiting:
        time.sleep(0.001)
    stream.append(CompletionDelta(0, "x", [1]))
    wake_all([stream])
    thread.join(10)
    assert [delta.text for delta in found[0]] == ["x"]
    assert not stream._changed.waiting


def test_a_loop_that_lags_is_called_once_for_all_that_came_and_again_for_what_comes_meanwhile(monkeypatch):
    async def main() -> None:
        stream = RequestStream("a", None, [1], SamplingParams(), lambda: None)
        loop, rings, taken = asyncio.get_running_loop(), [], []
        call_soon = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: rings.append(args) or call_soon(*args))

        def listener() -> None:
            taken.append([delta.text for delta in stream.take()])
            if len(taken) == 1:  # the engine's next step, while the loop is at work
                stream.put(CompletionDelta(0, "d", [1]))

        stream.listen(listener)
        for text in "abc":  # three steps, and the loop has no turn
            stream.put(CompletionDelta(0, text, [1]))
        assert len(rings) == 1
        while len(taken) < 2:
            await asyncio.sleep(0)
        assert taken == [["a", "b", "c"], ["d"]]
        assert len(rings) == 2

    asyncio.run(asyncio.wait_for(main(), 10))


def test_who_takes_deltas_holds_no_lock_that_the_engine_needs():
    stream = RequestStream("a", None, [1], SamplingParams(), lambda: None)
    stream.put(CompletionDelta(0, "x", [1]))
    found: list[object] = []
    with stream._lock:  # as the engine's thread while it adds
        taker = threading.Thread(target=lambda: found.append(take_all([stream])), daemon=True)
        taker.start()
        taker.join(10)
        assert not taker.is_alive()
    assert found == [([(0, CompletionDelta(0, "x", [1]))], None)]


def test_an_error_comes_with_the_last_deltas_and_the_end_once_they_are_taken():
    good, bad = (RequestStream(name, None, [1], SamplingParams(), lambda: None) for name in "ab")
    error = ValueError("out of luck")
    for stream in (good, bad):
        stream.put(CompletionDelta(0, "x", [1]))
    bad.end(error)
    delta = CompletionDelta(0, "x", [1])
    assert take_all([good, bad]) == ([(0, delta), (1, delta)], error)
    good.end()
    assert take_all([good]) is None
    assert take_all([good, bad]) == ([], error)


def test_a_listener_that_fails_is_told_to_the_loop_and_the_others_are_called():
    async def main() -> None:
        streams = [RequestStream(name, None, [1], SamplingParams(), lambda: None) for name in "ab"]
        told: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context["exception"]))
        error, called = ValueError("out of luck"), asyncio.Event()

        def fail() -> None:
            raise error

        streams[0].listen(fail)
        streams[1].listen(called.set)
        for stream in streams:
            stream.append(CompletionDelta(0, "x", [1]))
        wake_all(streams)
        await called.wait()
        assert told == [error]

    asyncio.run(asyncio.wait_for(main(), 10))


def test_a_loop_that_stops_before_its_turn_calls_when_it_runs_again():
    stream = RequestStream("a", None, [1], SamplingParams(), lambda: None)
    loop, found = asyncio.new_event_loop(), []

    async def listen() -> None:
        stream.listen(lambda: found.extend(delta.text for delta in stream.take()))

    loop.run_until_complete(listen())
    stream.put(CompletionDelta(0, "x", [1]))
    stream.put(CompletionDelta(0, "y", [1]))
    assert found == []
    loop.run_until_complete(asyncio.sleep(0))
    assert found == ["x", "y"]
    stream.put(CompletionDelta(0, "z", [1]))
    loop.close()
    stream.put(CompletionDelta(0, "nobody is left to tell", [1]))


def test_listeners_behind_one_that_an_interrupt_leaves_are_called_once_the_loop_runs_again():
    streams = [RequestStream(name, None, [1], SamplingParams(), lambda: None) for name in "abc"]
    loop, called = asyncio.new_event_loop(), []

    def interrupted() -> None:
        raise KeyboardInterrupt

    async def listen() -> None:
        streams[0].listen(interrupted)
        streams[1].listen(lambda: called.append("b"))
        streams[2].listen(lambda: called.append("c"))

    loop.run_until_complete(listen())
    for stream in streams:
        stream.append(CompletionDelta(0, "x", [1]))
    wake_all(streams)
    with pytest.raises(KeyboardInterrupt):
        loop.run_forever()
    assert called == []
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    assert called == ["b", "c"]


def test_a_loop_that_closed_before_its_turn_piles_up_no_listeners():
    stream = RequestStream("a", None, [1], SamplingParams(), lambda: None)
    loop = asyncio.new_event_loop()

    async def listen() -> None:
        stream.listen(lambda: None)

    loop.run_until_complete(listen())
    stream.put(CompletionDelta(0, "x", [1]))
    loop.close()
    for _ in range(50):
        stream.put(CompletionDelta(0, "x", [1]))
    news, _ = stream._listener
    assert not news._due
