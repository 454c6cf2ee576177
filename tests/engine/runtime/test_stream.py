"""``RequestStream``: the hand-over between the engine's thread and whoever waits."""

import asyncio

from engine.outputs import CompletionDelta
from engine.params.sampling_params import SamplingParams
from engine.runtime.stream import RequestStream


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
