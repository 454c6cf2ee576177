"""The panel without a browser: widgets in this process over the real engine, with a model that says what it is told."""

import gc
import re
import threading
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

import psutil
import pytest
from ipywidgets.widgets.widget import _instances

from engine import LLM, SamplingParams
from engine.errors import MemoryPlanError
from engine.runtime.activity import Rate
from tests.engine.test_live_settings import COUNTING, PROMPT, SLOW, wait_until
from tests.vm_magic.helpers import line
from vm_magic.panel import close_panel, open_panel, panel_line
from vm_magic.panel.panel import Panel, widgets_below
from vm_magic.panel.pictures import BUCKET_SECONDS, WINDOW_SECONDS, rates_per_second, throughput_svg
from vm_magic.state.session import current_session

ACTIVITY, SAMPLING, MEMORY, SERVER = range(4)
OPTIONS = {"max_model_len": 512, "gpu_memory_utilization": 0.02}


@pytest.fixture
def loaded_llm(engine_shell: Any, scripted_llm: Callable[..., LLM]) -> Iterator[Callable[..., LLM]]:
    """Makes a scripted model the notebook's own."""

    def make(*scripts: str, **options: Any) -> LLM:
        llm = scripted_llm(*(scripts or (COUNTING,)), **{**OPTIONS, **options})
        current_session().llm = llm
        return llm

    yield make
    close_panel()
    current_session().llm = None


@pytest.fixture
def panel(loaded_llm: Callable[..., LLM]) -> Iterator[Panel]:
    """A panel that a test refreshes by hand."""
    loaded_llm(step_seconds=SLOW)
    made = Panel(current_session, refresh_seconds=None)
    yield made
    made.close()


def show(panel: Panel, section: int) -> None:
    panel.tabs.selected_index = section
    panel.refresh()


def running(llm: LLM, number: int = 1, **given: Any) -> list[Any]:
    """Requests that run, each with a token at least."""
    streams = [llm.submit_prompt(PROMPT, llm.sampling_params(**{"temperature": 0, **given})) for _ in range(number)]
    wait_until(lambda: all(stream.snapshot().outputs[0].token_ids for stream in streams))
    return streams


def refreshed(panel: Panel, true: Callable[[], bool]) -> None:
    """Refresh until ``true``: a look may be that of a step before."""

    def look() -> bool:
        panel.refresh()
        return true()

    wait_until(look)


def sent_by(panel: Panel, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All state that the panel's widgets send from now on."""
    sent: list[Any] = []
    for widget in widgets_below(panel.widget):
        monkeypatch.setattr(widget, "send_state", lambda key=None, widget=widget: sent.append((widget, copy(key))))
    return sent


# -- memory ----------------------------------------------------------------------------------------


def test_the_identity_moves_with_the_slider_and_the_engine_does_not(panel: Panel) -> None:
    llm = current_session().require()
    show(panel, MEMORY)
    before, section = llm.plan, panel.memory
    assert f'<div class="vmp-v">{before.num_blocks:,}</div>' in section.identity.value
    section.fraction.value = 0.1
    expected = llm.what_if(fraction=0.1)
    assert f'<div class="vmp-v">{expected.num_blocks:,}</div>' in section.identity.value
    assert f"was {before.num_blocks:,}" in section.identity.value
    assert f"<b>{expected.max_model_len_that_fits:,}</b>" in section.identity.value
    assert llm.plan is before
    assert not section.apply.disabled
    section.undo.click()
    assert section.fraction.value == before.fraction
    assert section.apply.disabled


def test_what_cannot_be_is_refused_beside_the_button(panel: Panel) -> None:
    show(panel, MEMORY)
    section = panel.memory
    section.max_model_len.value = "100000"
    assert "greater than the derived max_model_len" in section.verdict.value
    assert section.apply.disabled
    section.max_model_len.value = "many"
    assert "many" in section.verdict.value
    assert "is not a whole number" in section.verdict.value
    section.max_model_len.value = "256"
    assert section.verdict.value == '<span class="vmp-faint">Not applied yet.</span>'


def test_apply_hands_over_what_changed_and_a_refusal_says_what_fits(
    panel: Panel, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = current_session().require()
    asked: list[dict[str, Any]] = []

    def refuse(**changed: Any) -> None:
        asked.append(changed)
        raise MemoryPlanError("not enough. Mitigations: many.", flag="memory_fraction", max_model_len_that_fits=128)

    monkeypatch.setattr(llm, "replan", refuse)
    show(panel, MEMORY)
    panel.memory.fraction.value = 0.1
    panel.memory.max_model_len.value = "256"
    panel.memory.apply.click()
    assert asked == [{"fraction": 0.1, "max_model_len": 256}]
    assert "not enough. The largest max_model_len that fits is 128." in panel.memory.verdict.value
    assert not panel.memory.apply.disabled


def test_apply_replans_the_engine_while_a_request_runs_on(panel: Panel) -> None:
    llm = current_session().require()
    (stream,) = running(llm, max_tokens=100)
    show(panel, MEMORY)
    before = llm.plan.num_blocks
    panel.memory.fraction.value = 0.01
    panel.memory.apply.click()
    assert "Applied: fraction=0.01" in panel.memory.verdict.value
    assert llm.plan.num_blocks < before
    assert llm.plan.num_blocks == llm.stats().num_blocks
    refreshed(panel, lambda: panel.memory.apply.disabled)
    assert f'<div class="vmp-v">{llm.plan.num_blocks:,}</div>' in panel.memory.identity.value
    assert len(stream.result().outputs[0].token_ids) == 100


# -- sampling --------------------------------------------------------------------------------------


def test_a_slider_changes_the_live_settings_and_reaches_running_requests(panel: Panel) -> None:
    llm = current_session().require()
    (stream,) = running(llm, temperature=None, max_tokens=300)
    show(panel, SAMPLING)
    panel.sampling.parameters["temperature"].control.value = 0.35
    assert llm.settings.snapshot() == {"temperature": 0.35}
    wait_until(lambda: llm.activity().requests[0].params.temperature == 0.35)
    stream.abort()


def test_a_tab_that_was_never_in_front_shows_what_holds_and_takes_the_first_touch(
    panel: Panel, engine_shell: Any
) -> None:
    llm = current_session().require()
    parameters = panel.sampling.parameters
    assert (parameters["temperature"].control.value, parameters["top_p"].control.value) == (1.0, 1.0)
    assert panel.memory.fraction.value == llm.plan.fraction
    line(engine_shell, "set top_k=7")
    panel.refresh()
    assert parameters["top_k"].control.value == 7
    parameters["top_p"].control.value = 0.6
    assert llm.settings.snapshot() == {"top_k": 7, "top_p": 0.6}


def test_set_config_and_the_panel_show_the_same(panel: Panel, engine_shell: Any, capsys: Any) -> None:
    show(panel, SAMPLING)
    parameters = panel.sampling.parameters
    line(engine_shell, "set temperature=0.2 stop=END max_tokens=30")
    panel.refresh()
    assert parameters["temperature"].control.value == 0.2
    assert parameters["stop"].control.value == "END"
    assert parameters["max_tokens"].control.value == "30"
    engine_shell.run_line_magic("config", "VLLMMetal.temperature = 0.6")
    panel.refresh()
    assert parameters["temperature"].control.value == 0.6
    parameters["top_p"].control.value = 0.5
    parameters["stop"].control.value = '["A B", "C"]'
    parameters["max_tokens"].control.value = ""
    capsys.readouterr()
    engine_shell.run_line_magic("config", "VLLMMetal.top_p")
    assert current_session().settings.snapshot() == {"temperature": 0.6, "top_p": 0.5, "stop": ["A B", "C"]}


def test_presets_move_the_sliders_and_forgetting_brings_the_models_own_back(panel: Panel) -> None:
    show(panel, SAMPLING)
    section = panel.sampling
    own = section.parameters["temperature"].control.value
    section.preset.value = "qwen-coding"
    assert section.parameters["top_k"].control.value == 20
    assert "preset qwen-coding" in section.parameters["top_k"].source.value
    section.parameters["temperature"].control.value = 0.1
    assert section.parameters["temperature"].undo.layout.visibility == "visible"
    section.parameters["temperature"].undo.click()
    panel.refresh()
    assert section.parameters["temperature"].control.value == 0.6
    section.forget_all.click()
    panel.refresh()
    assert section.parameters["temperature"].control.value == own
    assert section.preset.value == "model"
    assert not current_session().settings.everything()


def test_a_bad_value_is_said_and_changes_nothing(panel: Panel) -> None:
    show(panel, SAMPLING)
    panel.sampling.parameters["seed"].control.value = "often"
    assert "seed must be a whole number" in panel.sampling.message.value
    assert not current_session().settings.everything()


def test_values_beyond_a_slider_widen_it(panel: Panel) -> None:
    current_session().settings.update(temperature=3.5)
    show(panel, SAMPLING)
    assert panel.sampling.parameters["temperature"].control.value == 3.5


def test_a_value_and_the_range_that_holds_it_come_in_one_message(panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
    show(panel, SAMPLING)
    slider = panel.sampling.parameters["temperature"].control
    sent = sent_by(panel, monkeypatch)
    current_session().settings.update(temperature=3.5)
    panel.refresh()
    assert [set(key) for widget, key in sent if widget is slider] == [{"max", "value"}]
    assert slider.max == 3.5
    current_session().settings.update(temperature=0.5)
    panel.refresh()
    assert slider.max == 2


def test_a_front_ends_sums_of_steps_are_no_hand_and_are_rounded(panel: Panel) -> None:
    show(panel, SAMPLING)
    section, settings = panel.sampling, current_session().settings
    section.preset.value = "qwen-coding"
    slider = section.parameters["top_p"].control
    slider.set_state({"value": 0.9500000000000002})
    assert settings.everything()["top_p"] == 0.95
    assert settings.layers()[-1] == ("set", {})
    slider.set_state({"value": 0.9400000000000002})
    assert settings.layers()[-1] == ("set", {"top_p": 0.94})


def test_a_front_end_that_rounds_the_fraction_changes_nothing_and_a_typed_one_is_taken_as_typed(panel: Panel) -> None:
    llm = current_session().require()
    llm.replan(fraction=0.023)
    show(panel, MEMORY)
    section = panel.memory
    section.fraction.set_state({"value": 0.02})
    assert section.apply.disabled
    section.fraction.set_state({"value": 0.024})
    assert section.verdict.value == '<span class="vmp-faint">Not applied yet.</span>'
    assert f'<div class="vmp-v">{llm.what_if(fraction=0.024).num_blocks:,}</div>' in section.identity.value


def test_boxes_left_to_the_plan_show_what_the_preview_makes_of_them(panel: Panel) -> None:
    llm = current_session().require()
    llm.replan(max_model_len="auto", max_num_seqs="auto")
    show(panel, MEMORY)
    section = panel.memory
    assert (section.max_model_len.value, section.max_num_seqs.value) == ("", "")
    section.fraction.value = 0.03
    planned = llm.what_if(fraction=0.03)
    assert section.max_num_seqs.placeholder == f"auto: {planned.max_num_seqs:,}"
    assert section.max_model_len.placeholder == f"auto: {planned.max_model_len:,}"
    assert f"max_model_len {planned.max_model_len:,};" in section.identity.value
    section.max_model_len.value = "300"
    assert section.wanted() == {"fraction": 0.03, "max_model_len": 300}
    assert "max_model_len 300;" in section.identity.value
    section.apply.click()
    panel.refresh()
    assert (section.max_model_len.value, llm.plan.max_model_len) == ("300", 300)
    section.max_model_len.value = ""
    assert section.wanted() == {"max_model_len": "auto"}


def test_a_hand_on_the_slider_is_not_pushed_back(panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
    show(panel, SAMPLING)
    slider = panel.sampling.parameters["temperature"].control
    slider.value = 0.5
    sent = sent_by(panel, monkeypatch)
    slider.set_state({"value": 0.55})  # as the front end does
    panel.refresh()
    assert slider.value == 0.55
    assert not [key for widget, key in sent if widget is slider and key != "value"]


def test_thinking_is_switched_budgeted_and_ended_from_the_panel(loaded_llm: Callable[..., LLM]) -> None:
    template = "{{ messages[0].content }}{{ enable_thinking }}<|im_start|>assistant\n"
    llm = loaded_llm(
        f"<think>{COUNTING}</think>Done.", reasoning_parser="qwen3", chat_template=template, step_seconds=SLOW
    )
    panel = open_panel()
    show(panel, SAMPLING)
    panel.sampling.switch.value = "off"
    assert "False" in llm.render_chat([{"role": "user", "content": "Well?"}])
    panel.sampling.budget.value = "300"
    assert llm.settings.thinking() == {"enable_thinking": False, "thinking_token_budget": 300}
    (stream,) = running(llm)
    refreshed(panel, lambda: not panel.sampling.finish.disabled)
    panel.sampling.finish.click()
    assert stream.result().outputs[0].thinking_cut == "request"
    panel.sampling.switch.value = "model's own"
    panel.sampling.budget.value = ""
    assert llm.settings.thinking() == {}


def test_what_a_model_cannot_do_cannot_be_moved(panel: Panel) -> None:
    show(panel, SAMPLING)
    assert panel.sampling.switch.disabled
    assert panel.sampling.budget.disabled
    assert panel.sampling.finish.disabled


# -- activity --------------------------------------------------------------------------------------


def test_requests_of_cells_and_clients_are_listed_and_cancelled(panel: Panel) -> None:
    llm = current_session().require()
    one, two = running(llm, 2, max_tokens=450)
    section = panel.activity
    refreshed(panel, lambda: sum(row.widget.layout.display == "flex" for row in section.rows) == 2)
    assert one.request_id in section.rows[0].text.value
    refreshed(panel, lambda: "tok/s" in section.rows[0].text.value)
    section.rows[0].button.click()
    assert one.result().outputs[0].finish_reason == "abort"
    refreshed(panel, lambda: two.request_id in section.rows[0].text.value)
    assert section.rows[1].widget.layout.display == "none"
    assert not section.rows[0].button.disabled
    two.abort()


def test_blocks_are_drawn_by_holder_and_binned_where_they_are_many(panel: Panel) -> None:
    llm = current_session().require()
    (stream,) = running(llm, max_tokens=450)
    refreshed(panel, lambda: 'data-kind="0"' in panel.activity.blocks.value)
    drawn = panel.activity.blocks.value
    assert f"{llm.plan.num_blocks:,} blocks of 16 tokens" in drawn
    assert len(drawn) < 40_000
    stream.abort()
    refreshed(panel, lambda: 'data-kind="0"' not in panel.activity.blocks.value)


@dataclass(frozen=True)
class Counted:
    """Tokens by second, at second ``second``."""

    rates: tuple[Rate, ...]
    second: int


def test_generated_tokens_are_counted_in_buckets_of_three_seconds_and_prompt_tokens_not_at_all() -> None:
    counted = Counted((Rate(818, 0, 600), Rate(999, 500, 30), Rate(1001, 0, 15), Rate(1004, 0, 6)), second=1008)
    values = rates_per_second(counted)
    assert len(values) == WINDOW_SECONDS // BUCKET_SECONDS == 60
    assert values[56:] == [0, 15.0, 2.0, 0]
    assert sum(values) == 17.0, "what is older than the window does not count"
    assert rates_per_second(Counted((Rate(0, 0, 3),), second=WINDOW_SECONDS + BUCKET_SECONDS)) == [0.0] * 60


def test_the_bucket_under_way_counts_only_while_there_is_no_other() -> None:
    assert rates_per_second(Counted((Rate(109, 0, 12), Rate(110, 0, 12)), second=110))[-2:] == [0, 8.0]
    assert rates_per_second(Counted((Rate(105, 0, 3), Rate(110, 0, 12)), second=110))[-2:] == [0, 1.0]


def test_the_line_of_throughput_has_its_peak_at_the_top_and_names_it() -> None:
    drawn = throughput_svg(Counted((Rate(99, 0, 45), Rate(102, 0, 15)), second=109))
    (line,) = re.findall(r'<polyline points="([^"]*)"', drawn)
    heights = [float(point.split(",")[1]) for point in line.split()]
    assert heights[56:] == [62.0, 6.0, 43.3, 62.0]
    assert line.endswith(" 480,62.0")
    assert drawn.count("peak 15.0 tokens/s") == 2
    assert "3 minutes ago" in drawn
    assert "No tokens in the last three minutes." in throughput_svg(Counted((Rate(99, 500, 0),), second=109))


def test_the_panel_draws_the_speed_of_what_runs(panel: Panel) -> None:
    llm = current_session().require()
    panel.refresh()
    assert "No tokens in the last three minutes." in panel.activity.throughput.value
    (stream,) = running(llm, max_tokens=450)
    refreshed(panel, lambda: "peak" in panel.activity.throughput.value)
    stream.abort()
    (peak,) = set(re.findall(r"peak ([\d.]+) tokens/s", panel.activity.throughput.value))
    assert 0 < float(peak) <= 1 / SLOW


def test_more_requests_than_rows_are_counted(panel: Panel) -> None:
    llm = current_session().require()
    streams = [llm.submit_prompt(PROMPT, SamplingParams(temperature=0, max_tokens=450)) for _ in range(14)]
    refreshed(panel, lambda: "and 2 more" in panel.activity.more.value)
    for stream in streams:
        stream.abort()


# -- server ----------------------------------------------------------------------------------------


def test_the_port_is_opened_and_closed_and_the_key_shown_only_when_asked(
    panel: Panel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/me/")
    show(panel, SERVER)
    panel.server.start.click()
    panel.refresh()
    server = current_session().server
    assert server is not None
    assert server.api_key is not None
    assert server.base_url in panel.server.address.value
    assert f"/user/me/proxy/{server.port}/v1" in panel.server.address.value
    state = repr([widget.get_state() for widget in widgets_below(panel.widget)])
    assert server.api_key not in state
    panel.server.show_key.value = True
    panel.refresh()
    assert server.api_key in panel.server.address.value
    panel.server.client.value = "curl"
    panel.refresh()
    assert "curl" in panel.server.snippet.value
    panel.server.stop.click()
    panel.refresh()
    assert current_session().server is None
    assert server.api_key not in repr([widget.get_state() for widget in widgets_below(panel.widget)])
    assert "The port is closed." in panel.server.address.value


# -- the whole -------------------------------------------------------------------------------------


def test_the_panel_moves_by_itself_while_a_cell_runs(engine_shell: Any, loaded_llm: Callable[..., LLM]) -> None:
    llm = loaded_llm(step_seconds=SLOW)
    line(engine_shell, "panel")
    panel = open_panel()
    (stream,) = running(llm, max_tokens=450)
    seen: set[str] = set()

    def moved() -> bool:  # this thread is busy, as with a cell
        seen.add(panel.activity.rows[0].text.value)
        return len(seen) > 3

    wait_until(moved)
    assert not stream.finished
    stream.abort()


def test_nothing_is_sent_when_nothing_changed(panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
    for section in range(4):
        show(panel, section)
        refreshed(panel, lambda: True)
        sent = sent_by(panel, monkeypatch)
        for _ in range(5):
            panel.refresh()
        assert sent == []
        monkeypatch.undo()


def test_it_is_one_panel_however_often_it_is_shown(engine_shell: Any, loaded_llm: Callable[..., LLM]) -> None:
    loaded_llm()
    line(engine_shell, "panel")
    first = engine_shell.display_pub.outputs[-2]["data"]["application/vnd.jupyter.widget-view+json"]["model_id"]
    line(engine_shell, "panel")
    assert engine_shell.display_pub.outputs[-2]["data"]["application/vnd.jupyter.widget-view+json"]["model_id"] == first


def test_a_line_says_what_is_set_where_there_is_no_front_end(
    engine_shell: Any, loaded_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    llm = loaded_llm()
    line(engine_shell, "set temperature=0.2")
    line(engine_shell, "panel")
    widget = engine_shell.display_pub.outputs[-2]["data"]
    assert widget["text/plain"] == panel_line(current_session())
    monkeypatch.setattr("vm_magic.commands.panel.can_update", lambda shell: False)
    capsys.readouterr()
    line(engine_shell, "panel")
    assert capsys.readouterr().out == (
        f"panel: scripted; memory_fraction=0.02 max_model_len=512 max_num_seqs={llm.plan.max_num_seqs}; "
        "temperature=0.2; port closed\n"
    )


def test_it_follows_another_model_and_none(engine_shell: Any, loaded_llm: Callable[..., LLM]) -> None:
    panel = open_panel()
    for section in range(4):
        show(panel, section)
    assert "No model is loaded" in panel.head.value
    llm = loaded_llm()
    for section in range(4):
        show(panel, section)
    assert "scripted" in panel.head.value
    assert not panel.memory.fraction.disabled
    llm.close()
    for section in range(4):
        show(panel, section)
    assert "No model is loaded" in panel.head.value


def num_observers(panel: Panel) -> int:
    return sum(
        len(handlers)
        for widget in widgets_below(panel.widget)
        for by_type in widget._trait_notifiers.values()
        for handlers in by_type.values()
    )


@pytest.mark.parametrize("how", ["close", "button", "unload"])
def test_closing_leaves_no_observer_thread_or_widget(
    engine_shell: Any, loaded_llm: Callable[..., LLM], how: str
) -> None:
    loaded_llm()
    before = set(_instances)
    line(engine_shell, "panel")
    panel = open_panel()
    assert num_observers(panel) > 20
    assert any(thread.name == "vm-panel" for thread in threading.enumerate())
    if how == "close":
        line(engine_shell, "panel --close")
    elif how == "button":
        panel.close_button.click()
    else:
        engine_shell.extension_manager.unload_extension("vm_magic")
    wait_until(lambda: not any(thread.name == "vm-panel" for thread in threading.enumerate()))
    assert num_observers(panel) == 0
    assert set(_instances) == before
    assert panel.widget.comm is None


def test_a_thousand_updates_leave_memory_flat(loaded_llm: Callable[..., LLM]) -> None:
    llm = loaded_llm(step_seconds=0.002)
    panel = Panel(current_session, refresh_seconds=None)
    streams = running(llm, 3, max_tokens=250)
    process = psutil.Process()

    def turn() -> None:
        for section in range(4):
            panel.tabs.selected_index = section
            panel.refresh()
        if all(stream.finished for stream in streams):
            streams[:] = [
                llm.submit_prompt(PROMPT, llm.sampling_params(temperature=0, max_tokens=250)) for _ in range(3)
            ]

    for _ in range(25):
        turn()
    gc.collect()
    widgets, objects, memory = len(_instances), len(gc.get_objects()), process.memory_info().rss
    for _ in range(250):
        turn()
    gc.collect()
    more = process.memory_info().rss - memory
    assert len(_instances) == widgets
    assert len(gc.get_objects()) - objects < 5000
    assert more < 10_000_000, f"{more} bytes more after 1000 updates"
    for stream in streams:
        stream.abort()
    panel.close()
