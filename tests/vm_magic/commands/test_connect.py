"""``%vllm_metal connect`` in a shell: chats, grids and settings against a server, a loaded model left alone."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import vm_magic
from engine import LLM
from engine.errors import ConfigError, EngineClosedError, GenerationError, RequestError, UnsupportedOptionError
from tests.vm_magic import fakes
from tests.vm_magic.fake_vllm import USAGE, FakeVLLM, chunk
from tests.vm_magic.helpers import Capture, cell, line, shown
from vm_magic.commands.table import COMMANDS, command
from vm_magic.remote.llm import RemoteLLM
from vm_magic.show.errors import Interrupted
from vm_magic.state.session import current_session


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[FakeVLLM]:
    with FakeVLLM() as fake:
        yield fake


def test_connecting_says_what_is_there_and_closing_goes_back(
    shell: Any, loaded: fakes.FakeLLM, server: FakeVLLM, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "not connected" in said(shell, capsys, "connect")
    monkeypatch.setenv("VLLM_API_KEY", "k3y")
    text = said(shell, capsys, f"connect {server.url}")
    assert f"connected to {server.url}/v1: tiny (4,096 tokens, version 0.11.0, key from VLLM_API_KEY)" in text
    assert "smollm2 stays loaded beside it; %vllm_metal connect --close" in text
    assert "k3y" not in text
    assert set(server.keys) == {"Bearer k3y"}
    remote = vm_magic.current()
    assert isinstance(remote, RemoteLLM)
    assert said(shell, capsys, "connect").startswith("connected to")
    assert "back to smollm2 in this kernel" in said(shell, capsys, "connect --close")
    assert remote.closed
    assert vm_magic.current() is loaded
    assert not loaded.closed
    assert "not connected" in said(shell, capsys, "connect --close")


def test_export_writes_for_clients_of_the_server_and_says_what_it_lacks(shell: Any, server: FakeVLLM) -> None:
    line(shell, f"connect {server.url} --api-key k3y")
    text = str(line(shell, "export --client openai"))
    assert f"base_url='{server.url}/v1', api_key=os.environ[\"VLLM_API_KEY\"]" in text
    assert "model='tiny'" in text
    assert "k3y" not in text
    assert "Bearer k3y" in str(line(shell, "export --client curl --show-key"))
    with pytest.raises(EngineClosedError, match=f"connected to {server.url}/v1; export --client openai gives"):
        line(shell, "export")


def test_the_address_may_be_a_variable_or_the_handle_of_a_port(shell: Any, server: FakeVLLM, capsys: Capture) -> None:
    shell.user_ns["cluster"] = server.url
    assert f"connected to {server.url}/v1: tiny" in said(shell, capsys, "connect cluster")
    shell.user_ns["handle"] = SimpleNamespace(base_url=f"{server.url}/v1", api_key="k3y")
    text = said(shell, capsys, "connect handle")
    assert "key from handle.api_key" in text
    assert "k3y" not in text
    assert server.keys[-1] == "Bearer k3y"
    with pytest.raises(ConfigError, match="give an http or https address, such as http://nothing"):
        line(shell, "connect nothing")


def said(shell: Any, capsys: Capture, text: str) -> str:
    """What ``%vllm_metal text`` prints."""
    capsys.readouterr()
    line(shell, text)
    return capsys.readouterr().out


def test_chat_and_complete_go_to_the_server_with_history_settings_and_usage(shell: Any, server: FakeVLLM) -> None:
    line(shell, "set temperature=0.25")
    line(shell, f"connect {server.url}")
    server.events = [
        chunk(reasoning_content="Let me see."),
        chunk(content="It is "),
        chunk("stop", content="Ulm."),
        USAGE,
    ]
    reply = cell(shell, "chat -s 'Be brief' --max-tokens 9 --no-think --stats", "Which city?")
    assert (reply.text, reply.reasoning, reply.finish_reason) == ("It is Ulm.", "Let me see.", "stop")
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.cached_tokens) == (11, 3, 8)
    assert "<summary>thinking (" in shown(shell)["text/markdown"]
    assert shell.user_ns["_"] is reply
    body = server.bodies[-1]
    assert (body["temperature"], body["max_tokens"], body["chat_template_kwargs"]["enable_thinking"]) == (
        0.25,
        9,
        False,
    )
    cell(shell, "chat", "And the {{ 1 + 1 }}nd?")
    assert [(m["role"], m["content"]) for m in server.bodies[-1]["messages"]] == [
        ("system", "Be brief"),
        ("user", "Which city?"),
        ("assistant", "It is Ulm."),
        ("user", "And the 2nd?"),
    ]
    line(shell, "set temperature=0.5")
    server.events = [{"choices": [{"index": 0, "text": " two", "finish_reason": "stop"}]}, USAGE]
    assert line(shell, "complete One,").text == " two"
    assert server.bodies[-1]["temperature"] == 0.5
    server.events = [chunk("stop", content='{"a": 1}'), USAGE]
    shell.user_ns["schema"] = {"type": "object"}
    cell(shell, "chat --json schema -n", "JSON?")
    assert server.bodies[-1]["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert shown(shell)["application/json"] == {"a": 1}
    line(shell, "connect --close")
    assert dict(current_session().settings.snapshot()) == {"temperature": 0.5}


def test_a_cell_says_that_the_server_ended_a_repeating_reply(shell: Any, server: FakeVLLM) -> None:
    line(shell, f"connect {server.url}")
    server.events = [chunk("repetition", content="no no no"), USAGE]
    assert cell(shell, "chat -n", "Well?").finish_reason == "repetition"
    assert shown(shell)["text/plain"] == "no no no\nStopped because it repeated itself."


def test_status_models_and_metrics_are_the_servers(shell: Any, server: FakeVLLM) -> None:
    line(shell, f"connect {server.url} --api-key k3y")
    card = line(shell, "status")
    fields = dict(card.fields)
    assert card.title == "tiny (remote)"
    assert fields["server"] == f"{server.url}/v1, version 0.11.0"
    assert fields["key"] == "from --api-key"
    assert fields["requests"] == "3 running, 4 waiting"
    assert fields["KV blocks"] == "25.0% used"
    assert "k3y" not in repr(card) + card._repr_html_()
    assert line(shell, "models").rows == (("tiny", "4,096", "", "connected"),)
    rows = line(shell, "metrics").rows
    assert ("vllm:kv_cache_usage_perc", "", "0.25") in rows
    server.metrics = None
    assert "requests" not in dict(line(shell, "status").fields)


def test_what_cannot_be_remote_is_refused_by_name(shell: Any, loaded: fakes.FakeLLM, server: FakeVLLM) -> None:
    line(shell, f"connect {server.url}")
    local = [name for name in COMMANDS if command(name).needs_kernel]
    assert local == ["load", "serve", "plan", "score", "explain", "bench"]
    for name in local:
        with pytest.raises(UnsupportedOptionError, match=f"%vllm_metal {name} .*connect --close goes back") as refused:
            line(shell, f"{name} smollm2" if name in ("load", "serve") else name)
        assert "\n" not in str(refused.value)
    assert line(shell, "plan smollm2").model == "smollm2"
    loaded.bench_kernels = lambda: fakes.FakeKernelBench([], ["no GPU"])  # type: ignore[method-assign]
    assert repr(line(shell, "bench --kernels")) == "no GPU", "about this machine, whatever it is connected to"
    assert not loaded.closed


def test_unload_closes_the_connection_too_and_stop_leaves_it(
    shell: Any, loaded: fakes.FakeLLM, server: FakeVLLM, capsys: Capture
) -> None:
    line(shell, f"connect {server.url}")
    remote = vm_magic.current()
    assert "no port is open" in said(shell, capsys, "stop")
    assert vm_magic.current() is remote
    assert "the connection is closed" in said(shell, capsys, "unload")
    assert loaded.closed
    assert vm_magic.current() is None
    with pytest.raises(EngineClosedError, match="no model is loaded"):
        cell(shell, "chat", "Hi")


def test_a_second_connection_ends_the_first_and_a_failed_one_keeps_it(shell: Any, server: FakeVLLM) -> None:
    line(shell, f"connect {server.url}")
    first = vm_magic.current()
    for bad in ("http://127.0.0.1:1", f"{server.url} -m other", "host:1"):
        with pytest.raises((EngineClosedError, ConfigError)):
            line(shell, f"connect {bad}")
    with pytest.raises(ConfigError, match="takes nothing else"):
        line(shell, "connect --close http://h")
    assert vm_magic.current() is first
    line(shell, f"connect {server.url}")
    assert isinstance(first, RemoteLLM)
    assert first.closed
    shell.extension_manager.unload_extension("vm_magic")
    assert not [thread for thread in threading.enumerate() if thread.name == "vm-remote" and thread.is_alive()]


def test_failures_are_one_line_and_the_partial_text_stays(shell: Any, server: FakeVLLM) -> None:
    line(shell, f"connect {server.url}")
    server.events, server.done = [chunk(content="Half an ans")], False
    with pytest.raises(GenerationError, match="broke off its reply"):
        cell(shell, "chat", "Hi")
    assert "Half an ans" in shown(shell)["text/plain"]
    assert current_session().conversation(None).messages == []
    server.refusals = [(400, {"error": {"message": "This model's maximum context length is 10 tokens."}})]
    with pytest.raises(RequestError, match="maximum context length is 10"):
        cell(shell, "chat", "Hi")


def test_interrupting_a_remote_reply_keeps_the_text_and_frees_the_server(
    shell: Any, server: FakeVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vm_magic.remote.stream import RemoteStream

    line(shell, f"connect {server.url}")
    server.events, server.pause = [chunk(content=f"word{i} ") for i in range(3000)], 0.02
    drain = RemoteStream.drain
    came: list[Any] = []

    def interrupted(self: RemoteStream, timeout: float | None = None) -> Any:
        if len(came) >= 3:
            came.clear()
            monkeypatch.undo()
            raise KeyboardInterrupt
        came.extend(found := drain(self, timeout))
        return found

    monkeypatch.setattr(RemoteStream, "drain", interrupted)
    with pytest.raises(Interrupted, match=r"stopped after \d+ tokens"):
        cell(shell, "chat", "Hi")
    assert "word2" in current_session().conversation(None).messages[-1]["content"]
    assert server.gone.wait(30)


def replies_in_turn(server: FakeVLLM, *replies: list[Any]) -> None:
    """Have each request answered by the next of ``replies``."""
    left = iter(replies)
    stream = server.stream

    def next_reply() -> Any:
        server.events = [*next(left), USAGE]
        return stream()

    server.stream = next_reply  # type: ignore[method-assign]


def test_tools_in_a_cell_work_over_the_wire(shell: Any, server: FakeVLLM) -> None:
    line(shell, f"connect {server.url}")
    shell.run_cell("def add(a: int, b: int) -> int:\n    'Add two numbers.'\n    return a + b\n").raise_error()
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
    replies_in_turn(server, [chunk(tool_calls=[call]), chunk("tool_calls")], [chunk("stop", content="Five.")])
    reply = cell(shell, "chat --tools add", "2 + 3?")
    assert reply.text == "Five."
    assert [message["role"] for message in server.bodies[1]["messages"]] == ["user", "assistant", "tool"]
    assert json.loads(server.bodies[1]["messages"][2]["content"]) == 5
    assert server.bodies[0]["tools"][0]["function"]["name"] == "add"


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ('{"a": 2, "b', {"arguments": '{"a": 2, "b'}),
        ("[1]", {"arguments": "[1]"}),
        ("", {}),
    ],
)
def test_broken_arguments_stay_in_the_conversation_and_do_not_end_it(
    shell: Any, server: FakeVLLM, written: str, sent: dict[str, str]
) -> None:
    line(shell, f"connect {server.url}")
    shell.run_cell("def add(a: int, b: int) -> int:\n    'Add two numbers.'\n    return a + b\n").raise_error()
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "add", "arguments": written}}
    replies_in_turn(server, [chunk(tool_calls=[call]), chunk("tool_calls")], [chunk("stop", content="Oh.")])
    reply = cell(shell, "chat --tools add", "2 + 3?")
    assert reply.text == "Oh."
    assert reply.messages[1]["tool_calls"][0]["function"]["arguments"] == written
    _, answer, result = server.bodies[1]["messages"]
    assert json.loads(answer["tool_calls"][0]["function"]["arguments"]) == sent
    assert result["content"].startswith("Error: wrong arguments: ")


@pytest.fixture
def two_engines(shell: Any, scripted_llm: Callable[..., LLM]) -> Iterator[tuple[LLM, LLM]]:
    """A model of this notebook, and one behind a port that it is connected to."""
    here = scripted_llm("I am here.")
    there = scripted_llm("<think>\nOne two three.\n</think>\n\nI am there.", reasoning_parser="qwen3")
    current_session().llm = here
    server = there.serve(port=0)
    line(shell, f"connect {server.base_url} --api-key {server.api_key}")
    yield here, there
    line(shell, "connect --close")
    current_session().llm = None


def test_our_own_port_behaves_as_the_engine_itself(shell: Any, two_engines: tuple[LLM, LLM]) -> None:
    here, there = two_engines
    reply = cell(shell, "chat -t 0", "Who?")
    local = there.chat([{"role": "user", "content": "Who?"}], there.sampling_params(temperature=0))[0]
    assert (reply.text, reply.reasoning) == ("I am there.", "One two three.")
    assert reply.usage.prompt_tokens == len(local.prompt_token_ids)
    assert reply.usage.completion_tokens == len(local.outputs[0].token_ids)
    assert reply.usage.reasoning_tokens > 0
    assert line(shell, "status").title == "scripted (remote)"
    assert "vllm:prompt_tokens_total" in repr(line(shell, "metrics"))
    found = vm_magic.current().map(["a", "b", "c"], "{{ text }}?", temperature=0, use_tqdm=False)  # type: ignore[union-attr]
    assert list(found.text) == ["I am there."] * 3
    assert list(found.reasoning) == ["One two three."] * 3
    assert (found.tokens == reply.usage.completion_tokens).all()
    coloured = cell(shell, "chat -t 0 --logprobs 2 -n", "Who?")
    assert coloured.logprobs is not None
    assert "".join(next(iter(one.values())).decoded_token for one in coloured.logprobs).count("I am there.") == 1
    assert all(1 <= len(one) <= 3 for one in coloured.logprobs)
    assert here.stats().prompt_tokens == 0, "the model of this kernel was not asked"
    cell(shell, "chat -t 0 -n --thinking-token-budget 2", "Who?")
    assert " tokens, ended at its budget)</summary>" in shown(shell)["text/markdown"]
    line(shell, "connect --close")
    assert cell(shell, "chat -t 0 -n", "Who?").text == "I am here."


def test_leaving_a_reply_of_our_own_port_aborts_it_there(shell: Any, scripted_llm: Callable[..., LLM]) -> None:
    there = scripted_llm("word " * 300, step_seconds=0.02)
    server = there.serve(port=0, no_api_key=True)
    line(shell, f"connect {server.base_url}")
    stream = current_session().remote_llm().submit_chat([{"role": "user", "content": "Go"}], {"temperature": 0})
    assert stream.drain(60)
    stream.abort()
    assert stream.result().outputs[0].finish_reason == "abort"
    deadline = time.monotonic() + 60
    while there.stats().num_running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert there.stats().num_running == 0
    line(shell, "connect --close")
