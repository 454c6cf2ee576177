"""The panel while connected: what a remote server tells, this notebook's requests there, and the way back."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from itertools import pairwise
from typing import Any

import pytest
from ipywidgets.widgets.widget import _instances

from engine import LLM
from engine.runtime.activity import Throughput
from tests.engine.test_live_settings import COUNTING, SLOW, wait_until
from tests.vm_magic.fake_vllm import METRICS, FakeVLLM, chunk
from tests.vm_magic.helpers import Capture, cell, line
from vm_magic.panel import close_panel, open_panel, panel_line
from vm_magic.panel.panel import Panel, widgets_below
from vm_magic.panel.remote import RemoteActivitySection, RemoteServerSection
from vm_magic.remote import watch
from vm_magic.remote.llm import RemoteLLM
from vm_magic.remote.metrics import ServerState, read_state
from vm_magic.state.session import current_session

ACTIVITY, SAMPLING, SERVER = range(3)
ASK = [{"role": "user", "content": "Hi"}]
COUNTERS = """\
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{{engine="0",model_name="tiny"}} {tokens}
vllm:generation_tokens_total{{engine="0",model_name="other"}} 9000
vllm:prefix_cache_queries_total{{engine="0",model_name="tiny"}} 200
vllm:prefix_cache_hits_total{{engine="0",model_name="tiny"}} 50
"""


@pytest.fixture
def server(shell: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeVLLM]:
    """A server that the notebook is connected to."""
    for name in ("VLLM_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with FakeVLLM(metrics=METRICS + COUNTERS.format(tokens=100)) as fake:
        line(shell, f"connect {fake.url} --api-key k3y")
        yield fake
        close_panel()
        line(shell, "connect --close")


@pytest.fixture
def panel(server: FakeVLLM) -> Iterator[Panel]:
    """A panel that a test refreshes by hand; nobody asks the server for its figures."""
    made = Panel(current_session, refresh_seconds=None)
    yield made
    made.close()


def show(panel: Panel, section: int) -> None:
    panel.tabs.selected_index = section
    panel.refresh()


def refreshed(panel: Panel, true: Callable[[], bool]) -> None:
    def look() -> bool:
        panel.refresh()
        return true()

    wait_until(look)


def polled(watched: watch.ServerWatch, true: Callable[[watch.RemoteActivity], bool]) -> watch.RemoteActivity:
    """Poll until ``true`` of what is seen."""

    def look() -> bool:
        watched.poll()
        return true(watched.look())

    wait_until(look)
    return watched.look()


def state_of(panel: Panel) -> str:
    """Everything that the front end was sent."""
    return repr([widget.get_state() for widget in widgets_below(panel.widget)])


# -- figures ---------------------------------------------------------------------------------------


def test_the_servers_figures_are_asked_for_on_the_panels_thread_and_rarely(
    shell: Any, server: FakeVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[float, threading.Thread]] = []
    ask = RemoteLLM.ask_metrics

    def noted(self: RemoteLLM, timeout: float) -> Any:
        asked.append((time.monotonic(), threading.current_thread()))
        assert timeout <= watch.POLL_SECONDS
        return ask(self, timeout)

    monkeypatch.setattr(RemoteLLM, "ask_metrics", noted)
    line(shell, "panel")
    panel = open_panel()
    section = panel.activity
    assert isinstance(section, RemoteActivitySection)
    wait_until(lambda: "3 running, 4 waiting" in panel.head.value)
    assert "<b>tiny</b>" in panel.head.value
    assert f"{server.url}/v1" in panel.head.value
    wait_until(lambda: "25.0% of the KV cache used" in section.figures.value)
    assert "25% of prompt tokens found in the prefix cache" in section.figures.value
    server.metrics = METRICS.replace("2.0", "6.0") + COUNTERS.format(tokens=700)
    wait_until(lambda: "7 running" in panel.head.value)
    wait_until(lambda: "peak" in section.throughput.value)
    assert {thread.name for _, thread in asked} == {"vm-panel"}
    times = [at for at, _ in asked]
    # the panel takes its time a moment before it asks
    assert all(later - earlier > watch.POLL_SECONDS - 0.5 for earlier, later in pairwise(times))


def test_what_was_generated_is_spread_over_the_time_between_two_answers(
    server: FakeVLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.0)
    watched = watch.ServerWatch(current_session().remote_llm())
    watched._pause = 0.0

    def generated(activity: watch.RemoteActivity) -> int:
        return sum(rate.generation_tokens for rate in activity.rates)

    first = polled(watched, lambda activity: activity.state is not None)
    assert first.state is not None
    assert first.state.generation_tokens == 100
    assert generated(first) == 0, "what the server generated before is not news"
    server.metrics = METRICS + COUNTERS.format(tokens=131)
    polled(watched, lambda activity: generated(activity) == 31)
    server.metrics = METRICS + COUNTERS.format(tokens=7)
    polled(watched, lambda activity: generated(activity) == 38)  # the server was started anew
    watched._counted = (990.2, 7.0)
    watched._throughput = Throughput()
    watched._count(38.0, 1000.9)
    rates = watched._throughput.recent(1000.9)
    assert [rate.second for rate in rates] == list(range(991, 1001))
    assert sum(rate.generation_tokens for rate in rates) == 31
    assert {rate.generation_tokens for rate in rates} == {3, 4}


def test_only_the_models_own_lines_are_read() -> None:
    text = METRICS + COUNTERS.format(tokens=12)
    assert read_state(text, "tiny") == ServerState(3, 4, 0.25, 12, 200, 50)
    assert read_state(text, "other") == ServerState(generation_tokens=9000)
    assert read_state(text, "other").prefix_hit_share is None


def test_a_server_that_tells_nothing_is_said_to(server: FakeVLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = current_session().remote_llm()
    server.metrics = None
    watched = watch.ServerWatch(remote)
    seen = polled(watched, lambda activity: bool(activity.problem))
    assert (seen.state, seen.problem) == (None, "the server shows no /metrics")
    server.metrics = "# TYPE other gauge\nother 1\n"
    seen = polled(watch.ServerWatch(remote), lambda activity: bool(activity.problem))
    assert seen.problem == "the server's /metrics are not vLLM's"
    silent: Future[Any] = Future()
    monkeypatch.setattr(remote, "ask_metrics", lambda timeout: silent)
    monkeypatch.setattr(watch, "POLL_TIMEOUT", 0.01)
    seen = polled(watch.ServerWatch(remote), lambda activity: bool(activity.problem))
    assert "/metrics did not answer" in seen.problem
    assert silent.cancelled()
    monkeypatch.undo()
    remote.close()
    seen = polled(watch.ServerWatch(remote), lambda activity: bool(activity.problem))
    assert "the connection was closed" in seen.problem


# -- requests --------------------------------------------------------------------------------------


def test_requests_of_this_notebook_are_listed_and_cancel_closes_their_stream(panel: Panel, server: FakeVLLM) -> None:
    remote, section = current_session().remote_llm(), panel.activity
    assert "No requests of this notebook" in section.header.value
    server.events, server.pause = [chunk(reasoning_content="Hm. "), *[chunk(content="word ")] * 3000], 0.02
    one, two = (remote.submit_chat(ASK, {}) for _ in range(2))
    refreshed(panel, lambda: all("tok/s" in row.text.value for row in section.rows[:2]))
    row = section.rows[0]
    assert one.request_id in row.text.value
    assert ">running<" in row.text.value
    assert "prompt" not in section.header.value
    assert "2 of this notebook" in panel.head.value
    row.button.click()
    assert one.result().outputs[0].finish_reason == "abort"
    assert server.gone.wait(60)
    assert not two.finished
    refreshed(panel, lambda: two.request_id in row.text.value)
    assert section.rows[1].widget.layout.display == "none"
    two.abort()
    wait_until(lambda: not remote.requests())


def test_a_request_waits_until_its_first_token_and_a_thought_is_called_one(panel: Panel, server: FakeVLLM) -> None:
    first, row = threading.Event(), panel.activity.rows[0]
    stream = server.stream

    def held() -> Iterator[bytes]:
        first.wait(60)
        yield from stream()

    server.stream = held  # type: ignore[method-assign]
    server.events, server.pause = [chunk(reasoning_content="Hm. ")] * 3000, 0.02
    request = current_session().remote_llm().submit_chat(ASK, {})
    refreshed(panel, lambda: ">waiting<" in row.text.value)
    assert "s so far" in row.text.value
    first.set()
    refreshed(panel, lambda: ">thinking<" in row.text.value)
    request.abort()
    refreshed(panel, lambda: row.widget.layout.display == "none")


# -- sampling and server ---------------------------------------------------------------------------


def test_the_sampling_section_sets_what_the_next_request_says(shell: Any, panel: Panel, server: FakeVLLM) -> None:
    show(panel, SAMPLING)
    section = panel.sampling
    assert "the server&#x27;s own" in section.parameters["temperature"].source.value
    section.parameters["temperature"].control.value = 0.35
    section.switch.value = "off"
    section.budget.value = "64"
    cell(shell, "chat", "Hi")
    body = server.bodies[-1]
    assert (body["temperature"], body["thinking_token_budget"]) == (0.35, 64)
    assert body["chat_template_kwargs"]["enable_thinking"] is False
    assert "top_p" not in body
    line(shell, "set preset=qwen-coding")
    panel.refresh()
    assert section.preset.value == "qwen-coding"
    assert section.parameters["top_k"].control.value == 20
    section.forget_all.click()
    panel.refresh()
    assert not current_session().remote_llm().settings.everything()


def test_what_cannot_be_remote_is_left_out_and_the_key_is_hidden_until_asked(panel: Panel, server: FakeVLLM) -> None:
    assert [panel.tabs.get_title(index) for index in range(3)] == ["Activity", "Sampling", "Server"]
    assert len(panel.tabs.children) == 3
    assert "Finish thinking" not in state_of(panel)
    show(panel, SERVER)
    section = panel.sections[SERVER]
    assert isinstance(section, RemoteServerSection)
    assert f"{server.url}/v1" in section.address.value
    assert "k3y" not in state_of(panel)
    for client in section.client.options:
        section.client.value = client
        panel.refresh()
        assert server.url in section.snippet.value
    section.show_key.value = True
    panel.refresh()
    assert "k3y" in section.address.value
    assert "k3y" in section.snippet.value
    section.show_key.value = False
    panel.refresh()
    assert "k3y" not in state_of(panel)
    assert "Memory is planned where the server runs" in state_of(panel)
    assert "%vllm_metal export" in state_of(panel)


def test_a_line_says_what_is_set_at_the_server(shell: Any, server: FakeVLLM) -> None:
    line(shell, "set temperature=0.2")
    assert panel_line(current_session()) == f"panel: tiny at {server.url}/v1; temperature=0.2"


# -- there and back --------------------------------------------------------------------------------


def said(shell: Any, capsys: Capture, text: str) -> str:
    """What ``%vllm_metal text`` prints."""
    capsys.readouterr()
    line(shell, text)
    return capsys.readouterr().out


def test_going_there_and_back_closes_the_panel_with_a_line(shell: Any, server: FakeVLLM, capsys: Capture) -> None:
    before = set(_instances)
    for command, remote in (("connect --close", True), (f"connect {server.url}", False)):
        line(shell, "panel")
        panel = open_panel()
        assert panel.remote is remote
        assert "%vllm_metal panel opens the one" in said(shell, capsys, command)
        assert panel.closed
        assert set(_instances) == before
        assert not [thread for thread in threading.enumerate() if thread.name == "vm-panel"]
    line(shell, "panel")
    panel = open_panel()
    assert "the panel" not in said(shell, capsys, f"connect {server.url}"), "it follows to another server"
    assert not panel.closed
    assert "the panel is closed" in said(shell, capsys, "unload")
    line(shell, f"connect {server.url}")


def test_a_panel_that_was_left_says_so_and_shows_nothing_else(panel: Panel, server: FakeVLLM) -> None:
    remote = current_session().remote
    current_session().remote = None
    panel.refresh()
    assert "%vllm_metal panel opens the panel for it" in panel.head.value
    current_session().remote = remote
    panel.refresh()
    assert "<b>tiny</b>" in panel.head.value


def test_our_own_port_tells_all_figures(shell: Any, scripted_llm: Callable[..., LLM]) -> None:
    there = scripted_llm(COUNTING, step_seconds=SLOW)
    port = there.serve(port=0)
    line(shell, f"connect {port.base_url} --api-key {port.api_key}")
    line(shell, "panel")
    panel = open_panel()
    section = panel.activity
    assert isinstance(section, RemoteActivitySection)
    stream = current_session().remote_llm().submit_chat(ASK, {"temperature": 0, "max_tokens": 450})
    wait_until(lambda: "1 running, 0 waiting" in section.figures.value)
    assert "of the KV cache used" in section.figures.value
    wait_until(lambda: "peak" in section.throughput.value)
    section.rows[0].button.click()
    assert stream.result().outputs[0].finish_reason == "abort"
    wait_until(lambda: there.stats().num_running == 0)
    close_panel()
    line(shell, "connect --close")
