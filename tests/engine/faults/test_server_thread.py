"""The port's thread ends for whatever reason: clients hear of it, the model stays, and the port opens again."""

import socket
import threading
from typing import Any

import httpx
import pytest

from engine.llm import LLM
from tests.engine.faults.scenes import GREEDY, LIMIT, assert_goes_on, nothing_leaks, result_of
from tests.scripted_model import install  # noqa: F401 - the model of scripted_llm


class Died(SystemExit):
    """What asyncio passes on where it comes from a callback."""


def test_a_server_thread_that_dies_ends_its_requests_and_only_them(scripted_llm: Any) -> None:
    llm: LLM = scripted_llm("word " * 400, step_seconds=0.02)
    with nothing_leaks(bytes_more=1 << 20):
        server = llm.serve(port=0, no_api_key=True)
        mine = llm.submit_prompt([5, 6, 7], GREEDY.replace(max_tokens=30))
        told: list[BaseException] = []
        body = {"prompt": "Hi", "max_tokens": 800, "stream": True}
        with httpx.stream("POST", f"{server.base_url}/completions", json=body, timeout=LIMIT) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")

            def die() -> None:
                raise Died("no reason")

            assert server._loop is not None
            server._loop.call_soon_threadsafe(die)
            try:
                for _ in lines:
                    pass
            except httpx.HTTPError as error:
                told.append(error)
        server._thread.join(LIMIT)
        assert not server.running
        assert llm.server is None
        assert any("the server thread failed" in line for line in server.log_lines)
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", server.port), timeout=5)
        assert len(result_of(mine).outputs[0].token_ids) == 30
        for _ in range(1000):
            if not llm.activity().requests:
                break
            threading.Event().wait(0.01)
        assert not llm.activity().requests, "nobody reads it any more"
        again = llm.serve(port=0, no_api_key=True)
        assert httpx.get(f"{again.base_url}/models", timeout=LIMIT).status_code == 200
        again.stop()
        server.stop()


def test_a_port_whose_engine_ended_answers_503_in_a_line(tiny_model_dir: Any) -> None:
    folder = str(tiny_model_dir("llama", num_hidden_layers=2))
    with LLM(folder, max_model_len=256, gpu_memory_utilization=0.5) as llm:
        server = llm.serve(port=0, no_api_key=True)

        def leave(_engine: Any) -> None:
            raise SystemExit

        with pytest.raises(SystemExit):
            llm._thread.call(leave)
        assert_goes_on(llm, folder)  # a command's end is its caller's
        llm._thread._commands.put(leave)
        llm._thread._thread.join(LIMIT)
        assert llm.closed
        assert httpx.get(server.base_url.replace("/v1", "/health"), timeout=LIMIT).status_code == 503
        asked = httpx.post(f"{server.base_url}/completions", json={"prompt": "Hi"}, timeout=LIMIT)
        assert asked.status_code == 503
        assert "load the model again" in asked.json()["error"]["message"]
