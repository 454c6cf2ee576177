"""A small server that speaks vLLM's wire format, oddities included: what it says is set per test."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 2.0
vllm:num_requests_running{engine="1",model_name="tiny"} 1.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="tiny"} 4.0
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="tiny"} 0.25
"""


def chunk(finish: str | None = None, /, **delta: Any) -> dict[str, Any]:
    """A chat chunk with one choice."""
    return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


USAGE = {
    "choices": [],
    "usage": {
        "prompt_tokens": 11,
        "completion_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 8},
        "completion_tokens_details": {"reasoning_tokens": 2},
    },
}


@dataclass
class FakeVLLM:
    """``events`` is the stream of each reply: objects become data lines, text is sent as it is."""

    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": "tiny", "max_model_len": 4096}])
    key: str | None = None
    events: list[Any] = field(default_factory=lambda: [chunk(content="Hello"), chunk("stop", content="!"), USAGE])
    done: bool = True
    """Whether ``[DONE]`` ends a stream."""
    pause: float = 0.0
    """Seconds between events."""
    refusals: list[tuple[int, Any]] = field(default_factory=list)
    """Answered, one each, before a reply is given: status and body."""
    metrics: str | None = METRICS
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)
    """Set when a client closes its stream early."""
    most_at_once: int = 0

    def __enter__(self) -> "FakeVLLM":
        fake = self

        class Handler(_Handler):
            server_state = fake

        self._now = 0
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)

    @property
    def url(self) -> str:
        """The server's root."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def stream(self) -> Iterator[bytes]:
        """The body of one reply."""
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            for event in self.events:
                time.sleep(self.pause)
                yield (event if isinstance(event, str) else f"data: {json.dumps(event)}\n\n").encode()
        finally:  # before the end, at which a client may send its next request
            with self._lock:
                self._now -= 1
        if self.done:
            yield b"data: [DONE]\n\n"


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    server_state: FakeVLLM
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _refused(self) -> bool:
        state = self.server_state
        state.keys.append(self.headers.get("Authorization"))
        if state.key is not None and self.headers.get("Authorization") != f"Bearer {state.key}":
            self._answer(401, {"error": f"Unauthorized: {self.headers.get('Authorization')}"})
            return True
        return False

    def _answer(self, status: int, body: Any, **headers: str) -> None:
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        state = self.server_state
        if self._refused():
            return
        if self.path == "/v1/models":
            self._answer(200, {"object": "list", "data": state.models})
        elif self.path == "/metrics" and state.metrics is not None:
            self._answer(200, state.metrics)
        elif self.path == "/version":
            self._answer(200, {"version": "0.11.0"})
        elif self.path == "/moved/models":
            self._answer(307, "", Location="http://elsewhere.invalid/v1/models?token=secret")
        else:
            self._answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        state = self.server_state
        state.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if self._refused():
            return
        if state.refusals:
            status, body = state.refusals.pop(0)
            self._answer(status, body, Retry_After="0")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        try:
            for piece in state.stream():
                self.wfile.write(piece)
                self.wfile.flush()
        except OSError:
            state.gone.set()
        self.close_connection = True
