"""What a step costs on the way out: one call of the event loop, one write for each stream, whatever piled up."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn

from engine.chat.request import PreparedRequest
from engine.errors import GenerationError
from engine.openai.app import create_app
from engine.openai.http.connection import Connection, PortProtocol
from engine.openai.http.options import ServerOptions
from engine.openai.http.sse import EventStream, StreamForm, TextEvent, event, named_event
from engine.outputs import CompletionDelta
from engine.runtime.stream import RequestStream, wake_all
from tests.engine.openai.fakes import FakeLLM

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 64},
}


class SilentLLM(FakeLLM):
    """Generates nothing by itself; ``over_at_once``: its replies are empty, and over when they begin."""

    over_at_once = False

    def submit(self, request: PreparedRequest, **options: Any) -> RequestStream:
        stream = super().submit(request, **options)
        if self.over_at_once:
            put(stream, "", finish_reason="stop")
            stream.end()
        return stream

    def _generate(self, stream: RequestStream, gone: Any) -> None:
        return


class Client(asyncio.Transport):
    """A client's side of a connection that is none: it keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closing = False

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def pause_reading(self) -> None:
        return

    def resume_reading(self) -> None:
        return

    @property
    def body(self) -> bytes:
        """What chunks brought, out of their frames."""
        head, _, rest = b"".join(self.writes).partition(b"\r\n\r\n")
        assert b"transfer-encoding: chunked" in head.lower()
        found = b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            found, rest = found + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        return found


class Port:
    """The application behind uvicorn's protocol, and the engine's streams in the hands of the test."""

    def __init__(self, **options: Any) -> None:
        self.llm = SilentLLM()
        app = create_app(self.llm, ServerOptions(**options))
        self.open_requests = app.state.port.open_requests
        self._config = uvicorn.Config(app, log_config=None, lifespan="off", http=PortProtocol, ws="none")
        self._config.load()
        self._state = uvicorn.server.ServerState()

    async def ask(self, path: str, version: str = "1.1", **more: Any) -> tuple[Client, PortProtocol, RequestStream]:
        client, protocol = await self.start(path, version, stream=True, **more)
        while not client.writes:
            await asyncio.sleep(0)
        await settle()
        return client, protocol, self.llm.submitted[-1]

    async def start(self, path: str, version: str = "1.1", **more: Any) -> tuple[Client, PortProtocol]:
        protocol, client = PortProtocol(config=self._config, server_state=self._state, app_state={}), Client()
        protocol.connection_made(client)
        content = json.dumps({"model": "fake", **BODIES[path], **more}).encode()
        head = f"POST {path} HTTP/{version}\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        count = len(self.llm.submitted)
        protocol.data_received(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        while len(self.llm.submitted) == count:
            await asyncio.sleep(0)
        await settle()
        return client, protocol


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def put(stream: RequestStream, text: str, **more: Any) -> None:
    stream.append(CompletionDelta(0, text, [7], **more))


def run(test: Callable[[Port], Awaitable[None]], **options: Any) -> None:
    async def main() -> None:
        await asyncio.wait_for(test(Port(**options)), 20)

    asyncio.run(main())


@pytest.mark.parametrize("path", BODIES)
def test_a_step_of_many_streams_is_one_call_of_the_event_loop_and_one_write_each(path: str) -> None:
    async def test(port: Port) -> None:
        asked = [await port.ask(path) for _ in range(8)]
        streams = [stream for _, _, stream in asked]
        loop = asyncio.get_running_loop()
        calls: list[Any] = []
        before = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *args, **kw: calls.append(args) or before(*args, **kw)  # type: ignore
        for word in ("one ", "two ", "three "):
            counts = [len(client.writes) for client, _, _ in asked]
            calls.clear()
            for stream in streams:
                put(stream, word)
            wake_all(streams)
            assert len(calls) == 1
            await settle()
            assert [len(client.writes) for client, _, _ in asked] == [count + 1 for count in counts]
        loop.call_soon_threadsafe = before  # type: ignore[method-assign]
        for stream in streams:
            stream.abort()
            stream.end()
        await settle()

    run(test)


def test_no_task_has_a_turn_for_a_token() -> None:
    async def test(port: Port) -> None:
        client, _, stream = await port.ask("/v1/chat/completions")
        put(stream, "first")
        wake_all([stream])
        await settle()
        count = len(client.writes)
        put(stream, "second")
        wake_all([stream])
        await asyncio.sleep(0)  # the one turn in which the loop makes the call it was told to
        assert len(client.writes) == count + 1, "a task would need another turn"
        stream.end()
        await settle()

    run(test)


@pytest.mark.parametrize("path", BODIES)
def test_what_piles_up_for_a_client_that_does_not_read_comes_in_one_write_once_it_does(path: str) -> None:
    async def test(port: Port) -> None:
        client, protocol, stream = await port.ask(path)
        put(stream, "a")
        wake_all([stream])
        await settle()
        protocol.pause_writing()
        count = len(client.writes)
        for word in "bcde":
            put(stream, word)
            wake_all([stream])
        await settle()
        assert len(client.writes) == count
        protocol.resume_writing()
        await settle()
        assert len(client.writes) == count + 1
        assert b"bcde" in client.writes[-1]
        put(stream, "f", finish_reason="stop")
        stream.end()
        await settle()
        assert client.writes[-1].endswith(b"0\r\n\r\n")

    run(test)


def test_the_end_reaches_a_client_that_did_not_read_when_it_came() -> None:
    async def test(port: Port) -> None:
        client, protocol, stream = await port.ask("/v1/completions")
        protocol.pause_writing()
        put(stream, "all of it", finish_reason="stop")
        stream.end()
        wake_all([stream])
        await settle()
        protocol.resume_writing()
        await settle()
        assert client.body.count(b"all of it") == 1
        assert client.body.endswith(b"data: [DONE]\n\n")

    run(test)


def test_the_last_text_the_counts_and_the_end_are_one_write() -> None:
    async def test(port: Port) -> None:
        client, _, stream = await port.ask("/v1/completions", stream_options={"include_usage": True})
        count = len(client.writes)
        put(stream, "all of it", finish_reason="stop")
        stream.end()
        await settle()
        last, closing = (data for data in client.writes[count:] if data)
        assert b"all of it" in last
        assert b"completion_tokens" in last
        assert last.endswith(b"data: [DONE]\n\n\r\n")
        assert closing == b"0\r\n\r\n"

    run(test)


def test_a_port_that_closes_before_the_written_end_was_read_adds_nothing_to_it() -> None:
    async def test(port: Port) -> None:
        client, protocol, stream = await port.ask("/v1/completions")
        write = client.write

        def write_and_fill(data: bytes) -> None:
            write(data)
            protocol.pause_writing()

        client.write = write_and_fill  # type: ignore[method-assign]
        put(stream, "all of it", finish_reason="stop")
        stream.end()
        await settle()
        assert len(port.open_requests) == 1, "its client has not read"
        port.open_requests.close()
        await settle()
        protocol.resume_writing()
        await settle()
        assert len(port.open_requests) == 0
        assert client.body.count(b"[DONE]") == 1
        assert client.body.endswith(b"data: [DONE]\n\n")
        assert b"error" not in client.body

    run(test)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_no_task_has_a_turn_for_a_token_of_a_reply_that_is_not_streamed(path: str) -> None:
    async def test(port: Port) -> None:
        await port.start(path, stream=False)
        stream, loop = port.llm.submitted[-1], asyncio.get_running_loop()
        turns: list[Any] = []
        call_soon = loop.call_soon
        loop.call_soon = lambda *args, **kw: turns.append(args) or call_soon(*args, **kw)  # type: ignore
        for word in ("one ", "two "):
            put(stream, word)
            wake_all([stream])
        await asyncio.sleep(0)
        assert len(turns) == 1, "only this one's own, behind the call that the loop was told to make"
        loop.call_soon = call_soon  # type: ignore[method-assign]
        put(stream, "three", finish_reason="stop")
        stream.end()
        await settle()

    run(test)


@pytest.mark.parametrize("path", BODIES)
def test_an_end_without_text_reaches_a_client_that_did_not_read_when_it_came(path: str) -> None:
    async def test(port: Port) -> None:
        client, protocol, stream = await port.ask(path)
        put(stream, "text")
        wake_all([stream])
        await settle()
        protocol.pause_writing()
        put(stream, "", finish_reason="stop")
        stream.end()
        wake_all([stream])
        await settle()
        protocol.resume_writing()
        await settle()
        assert client.writes[-1].endswith(b"0\r\n\r\n")

    run(test)


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("path", BODIES)
def test_an_empty_reply_that_was_over_before_its_stream_began_ends(path: str, version: str) -> None:
    async def test(port: Port) -> None:
        port.llm.over_at_once = True
        client, _, _ = await port.ask(path, version=version)
        assert client.closing if version == "1.0" else client.writes[-1].endswith(b"0\r\n\r\n")

    run(test)


def test_chunks_with_logprobs_that_come_together_say_the_end_once() -> None:
    async def test(port: Port) -> None:
        client, _, stream = await port.ask("/v1/chat/completions", logprobs=True)
        for text in "abc":
            put(stream, text, logprobs=port.llm.logprobs([7], 0), finish_reason="stop" if text == "c" else None)
        stream.end()
        await settle()
        chunks = [json.loads(line.removeprefix("data: ")) for line in client.body.decode().split("\n\n")[:-2]]
        choices = [chunk["choices"][0] for chunk in chunks]
        assert [choice["delta"]["content"] for choice in choices] == ["", "a", "b", "c"]
        assert [choice["finish_reason"] for choice in choices] == [None, None, None, "stop"]

    run(test)


@pytest.mark.parametrize("ending", ["failed", "aborted"])
def test_what_came_before_a_failure_reaches_the_client_whichever_prompt_it_is_of(ending: str) -> None:
    async def test(port: Port) -> None:
        client, _, _ = await port.ask("/v1/completions", prompt=["a", "b", "c"])
        for number, stream in enumerate(port.llm.submitted):
            put(stream, f"text {number}")
        bad = port.llm.submitted[1]
        if ending == "aborted":
            put(bad, "", finish_reason="abort")
        bad.end(GenerationError("out of luck") if ending == "failed" else None)
        wake_all(port.llm.submitted)
        await settle()
        chunks = [json.loads(line.removeprefix("data: ")) for line in client.body.decode().split("\n\n")[:-2]]
        assert [chunk["choices"][0]["text"] for chunk in chunks[:-1]] == ["text 0", "text 1", "text 2"]
        assert chunks[-1]["error"]["code"] == (499 if ending == "aborted" else 500)
        assert client.body.endswith(b"data: [DONE]\n\n")
        assert port.llm.aborted.is_set(), "the other prompts end too"

    run(test)


def test_a_connection_of_http_1_0_gets_the_same_without_chunks() -> None:
    async def test(port: Port) -> None:
        new, _, one = await port.ask("/v1/completions")
        old, _, other = await port.ask("/v1/completions", version="1.0")
        for stream in (one, other):
            put(stream, "hello", finish_reason="stop")
            stream.end()
        wake_all([one, other])
        await settle()
        head, _, body = b"".join(old.writes).partition(b"\r\n\r\n")
        assert b"chunked" not in head.lower()
        assert body.count(b"hello") == new.body.count(b"hello") == 1
        assert body.startswith(b"data: ")
        assert body.endswith(b"data: [DONE]\n\n")

    run(test)


def test_nothing_is_written_to_a_client_that_has_left_and_its_request_ends() -> None:
    async def test(port: Port) -> None:
        client, protocol, stream = await port.ask("/v1/chat/completions")
        client.closing = True
        count = len(client.writes)
        protocol.connection_lost(ConnectionResetError())
        await settle()
        put(stream, "late")
        wake_all([stream])
        await settle()
        assert len(client.writes) == count
        assert port.llm.aborted.is_set()

    run(test)


@pytest.mark.parametrize("encode", [event, named_event])
@pytest.mark.parametrize("text", ["plain", 'quotes " and \\', "line\nbreak\u2028", "wörld 🌍", "\x00\x1f", ""])
def test_a_prepared_event_is_the_event_that_would_be_made_anew(encode: Callable[[Any], bytes], text: str) -> None:
    def make(inner: str) -> dict[str, Any]:
        return {"type": "t", "id": 'a "quoted" id', "choices": [{"text": inner, "again": inner, "end": None}]}

    assert TextEvent(make, encode).of(text) == encode(make(text))


def test_deltas_joined_are_what_they_would_be_one_after_the_other() -> None:
    first = CompletionDelta(1, "a", [1], [{}], thinking_cut="budget")
    last = CompletionDelta(1, "b", [2, 3], [{}, {}], "stop", "x")
    assert first.joined(last) == CompletionDelta(1, "ab", [1, 2, 3], [{}, {}, {}], "stop", "x", "budget")
    assert CompletionDelta(0, "a", [1]).joined(CompletionDelta(0, "", [])) == CompletionDelta(0, "a", [1])


@pytest.mark.parametrize(
    ("path", "more"), [*((path, {}) for path in BODIES), ("/v1/responses", {"background": True, "store": True})]
)
@pytest.mark.parametrize("apart", [False, True])
def test_a_body_ends_once_also_where_the_end_comes_after_the_last_text(
    path: str, more: dict[str, Any], apart: bool
) -> None:
    """An empty chunk is the end of a body: what came behind one would be taken for the next response."""

    async def test(port: Port) -> None:
        client, _, stream = await port.ask(path, **more)
        put(stream, "word", finish_reason="stop")
        if apart:
            wake_all([stream])
            await settle()
        stream.end()
        await settle()
        written = b"".join(client.writes)
        assert written.count(b"\r\n0\r\n\r\n") == 1
        assert written.endswith(b"\r\n0\r\n\r\n")
        assert b"word" in client.body

    run(test)


@pytest.mark.parametrize("end", [b"", b"data: [DONE]\n\n"])
def test_an_end_that_comes_by_itself_writes_no_empty_chunk(end: bytes) -> None:
    class Source:
        ending = False
        listener: Callable[[], None] | None = None

        def __init__(self) -> None:
            self.left: list[Any] = [[b"data: 1\n\n"], [], []]

        def listen(self, listener: Callable[[], None] | None) -> None:
            self.listener = listener

        def take(self) -> Any:
            return self.left.pop(0) if self.left else None

    async def main() -> None:
        client, source = Client(), Source()
        stream = EventStream(source, None, keep_alive_seconds=9, form=StreamForm(end=end))  # type: ignore[arg-type]
        keeper = asyncio.create_task(asyncio.sleep(0))
        pushing = asyncio.create_task(stream._push(Connection(client), keeper))
        while source.left != [[]]:
            await asyncio.sleep(0)
        assert source.listener is not None
        source.listener()
        source.listener()
        await pushing
        assert client.writes[0] == b"9\r\ndata: 1\n\n\r\n"
        assert client.writes[1:] == ([b"e\r\ndata: [DONE]\n\n\r\n"] if end else [])

    asyncio.run(asyncio.wait_for(main(), 10))


@pytest.mark.parametrize("reads", ["not when the end comes", "not once it was written"])
@pytest.mark.parametrize("path", BODIES)
def test_nothing_that_keeps_a_connection_alive_comes_behind_the_end(path: str, reads: str) -> None:
    async def test(port: Port) -> None:
        client, protocol, stream = await port.ask(path)
        write = client.write

        def write_and_fill(data: bytes) -> None:
            write(data)
            protocol.pause_writing()

        if reads == "not when the end comes":
            protocol.pause_writing()
        else:
            client.write = write_and_fill  # type: ignore[method-assign]
        put(stream, "all of it", finish_reason="stop")
        stream.end()
        await asyncio.sleep(0.1)  # several times the silence that is allowed: something waits to be written
        client.write = write  # type: ignore[method-assign]
        protocol.resume_writing()
        await settle()
        assert client.writes[-1].endswith(b"0\r\n\r\n")
        last = client.body.removesuffix(b"\n\n").rpartition(b"\n\n")[2]
        assert b"keep-alive" not in last
        assert b"ping" not in last

    run(test, keep_alive_seconds=0.02)


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("path", BODIES)
def test_what_came_before_anybody_listened_is_sent_at_once(path: str, version: str) -> None:
    async def test(port: Port) -> None:
        submit = port.llm.submit

        def submit_and_put(request: PreparedRequest, **options: Any) -> RequestStream:
            stream = submit(request, **options)
            put(stream, "early")
            return stream

        port.llm.submit = submit_and_put  # type: ignore[method-assign]
        client, _, stream = await port.ask(path, version=version)
        assert b"early" in b"".join(client.writes), "no more comes for now"
        put(stream, "", finish_reason="stop")
        stream.end()
        await settle()

    run(test)
