"""Code of others that the engine calls: it may use the engine, be slow and fail, at no cost to other requests."""

import logging
import threading

import pytest

from engine import LLM, SamplingParams
from engine.errors import GenerationError, OwnThreadError, RequestError
from tests.engine.parity.oracle import assert_nothing_is_held

SHORT = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
LONG = SHORT.replace(max_tokens=150)
WAIT = 60
"""Seconds after which a test gives up."""


@pytest.fixture(scope="module")
def llm(tiny_model_dir):
    with LLM(str(tiny_model_dir("llama")), max_model_len=512, served_model_name="tiny") as llm:
        yield llm


def ended_with(llm, callback):
    """``callback`` for a request that is over, beside another one; what the other one gave."""
    other, stream = llm.submit_prompt([8, 9], LONG), llm.submit_prompt([5, 6, 7], SHORT)
    stream.add_done_callback(callback)
    stream.result()
    return other


@pytest.mark.parametrize("use", ["stats", "activity", "generate", "reset_prefix_cache"])
def test_a_callback_may_use_the_engine(llm, use):
    found, over = [], threading.Event()

    def callback():
        try:
            given = ([[1, 2]], SHORT) if use == "generate" else ()
            found.append(getattr(llm, use)(*given))
        finally:
            over.set()

    other = ended_with(llm, callback)
    assert over.wait(WAIT)
    assert len(found) == 1
    assert len(other.result().outputs[0].token_ids) == 150


def test_a_callback_that_raises_is_logged_and_ends_nobody_elses_request(llm, caplog):
    calls, over = [], threading.Event()

    def fails():
        calls.append("fails")
        raise SystemExit("no such luck")

    with caplog.at_level(logging.ERROR, logger="engine"):
        other = llm.submit_prompt([8, 9], LONG)
        stream = llm.submit_prompt([5, 6, 7], SHORT)
        stream.add_done_callback(fails)
        stream.add_done_callback(over.set)
        assert len(other.result().outputs[0].token_ids) == 150
        assert over.wait(WAIT)
        stream.add_done_callback(over.clear)  # it is over: at once
    assert calls == ["fails"]
    assert "SystemExit: no such luck" in caplog.text
    assert_nothing_is_held(llm)


def test_a_slow_callback_holds_up_no_request(llm):
    begun, go, after = threading.Event(), threading.Event(), threading.Event()

    def slow():
        begun.set()
        go.wait(WAIT)

    other = ended_with(llm, slow)
    try:
        assert begun.wait(WAIT)
        assert len(other.result().outputs[0].token_ids) == 150
        assert len(llm.generate([[3, 4]], SHORT)[0].outputs[0].token_ids) == 3
        assert len(llm.map(["one", "two"], "{{ text }}", raw=True, max_tokens=2, use_tqdm=False)) == 2
        ended_with(llm, after.set)
        assert not after.is_set(), "callbacks come one after the other"
    finally:
        go.set()
    assert after.wait(WAIT)


def test_what_would_wait_for_the_engine_on_its_own_thread_is_refused_in_one_line(llm):
    """As a log handler might, which runs on the thread that logs."""
    refused = []

    class Handler(logging.Handler):
        def emit(self, record):
            if "logged" not in record.getMessage():
                return
            queued = llm.submit_prompt([8, 9], SHORT)  # which cannot begin before this returns
            asks = (llm.stats, llm.activity, llm.block_map, llm.reset_prefix_cache, lambda: llm.score("a b"),
                    lambda: llm.generate([[1]], SHORT), queued.result, lambda: next(queued), queued.drain)  # fmt: skip
            for ask in asks:
                with pytest.raises(OwnThreadError) as told:
                    ask()
                refused.append(str(told.value))

    logger, handler = logging.getLogger("engine"), Handler()
    level = logger.level
    logger.addHandler(handler)
    try:
        logger.setLevel(logging.INFO)
        other, stream = llm.submit_prompt([8, 9], LONG), llm.submit_prompt([5, 6, 7], LONG, request_id="logged")
        stream.abort()
        assert stream.result().outputs[0].finish_reason == "abort"
        assert len(other.result().outputs[0].token_ids) == 150
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert len(refused) == 9
    assert all("on that thread; call it from another" in line and "\n" not in line for line in refused)
    llm.generate([[1]], SHORT)  # behind all that was queued
    assert_nothing_is_held(llm)


def test_a_token_that_breaks_its_own_requests_text_or_grammar_ends_that_request_alone(llm, monkeypatch):
    broken, other = llm.submit_prompt([5, 6, 7], LONG, request_id="broken"), llm.submit_prompt([8, 9], LONG)

    def breaks(engine):
        for completion in engine._groups["broken"].completions:
            monkeypatch.setattr(completion.detokenizer, "next_text", lambda token: 1 / 0)

    next(broken)
    llm._thread.call(breaks)
    with pytest.raises(GenerationError, match="the model's token could not be read: ZeroDivisionError"):
        broken.result()
    assert len(other.result().outputs[0].token_ids) == 150
    assert_nothing_is_held(llm)


def test_a_change_between_steps_that_fails_leaves_the_engine_serving(llm, caplog):
    other = llm.submit_prompt([8, 9], LONG)
    with caplog.at_level(logging.ERROR, logger="engine"):
        llm._thread.post(lambda engine: 1 / 0)
        assert len(other.result().outputs[0].token_ids) == 150
    assert "a change between two steps failed: ZeroDivisionError" in caplog.text


def test_a_listener_to_the_settings_that_fails_or_asks_the_engine_keeps_no_change_from_the_others(llm, caplog):
    told = []
    llm.settings.on_change(lambda: 1 / 0)
    llm.settings.on_change(lambda: told.append(llm.stats()))
    with caplog.at_level(logging.ERROR, logger="engine"):
        llm.settings.update(temperature=0.5)
    assert len(told) == 1
    assert "a listener to the settings failed: ZeroDivisionError" in caplog.text
    assert llm._thread.call(lambda engine: engine._live.base.temperature) == 0.5, "the engine follows all the same"
    llm.settings.reset()


def test_one_callback_thread_begins_with_the_first_and_goes_on_behind_an_interrupt():
    from engine.runtime.callbacks import CallbackThread

    thread, over = CallbackThread(), threading.Event()
    assert thread._thread is None

    def interrupted():
        raise KeyboardInterrupt

    thread.call(interrupted)
    thread.call(over.set)
    assert over.wait(WAIT)
    assert thread._thread.daemon


def test_a_progress_callback_may_use_another_model(llm, tiny_model_dir):
    answers = []

    def progress(stage, done, total):
        if not answers:
            answers.append(llm.generate([[1, 2]], SHORT, use_tqdm=False))

    with LLM(str(tiny_model_dir("qwen3")), max_model_len=64, progress=progress):
        assert len(answers[0][0].outputs[0].token_ids) == 3
    with pytest.raises(RequestError, match="not now"):
        LLM(str(tiny_model_dir("qwen3")), max_model_len=64, progress=lambda *_: refuse())


def refuse():
    raise RequestError("not now")
