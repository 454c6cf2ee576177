"""Live settings reach requests that run already, over every door, from their next token."""

import json
import threading
import time
from collections.abc import Callable

import httpx
import pytest

from engine import LLM, SamplingParams
from engine.errors import RequestError
from engine.params.live_sampling import LiveSampling
from engine.params.sampling_defaults import SamplingDefaults
from engine.params.settings import Settings
from tests.scripted_model import SUFFIX

COUNTING = " ".join(str(number) for number in range(400))
PROMPT = f"Count!{SUFFIX}"
TEMPLATE = """\
{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}
"""
SLOW = 0.01


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def live(settings: Settings, budget: int | None = None) -> LiveSampling:
    return LiveSampling(SamplingDefaults({}, {}, settings).resolve({}), budget, 100)


def test_a_request_follows_in_what_it_did_not_say_itself() -> None:
    settings = Settings()
    said = SamplingDefaults({}, {}, settings).resolve({"temperature": 0.7})
    settings.update(temperature=0.1, top_p=0.5, max_tokens=7)
    now = live(settings).params_for(said)
    assert (now.temperature, now.top_p, now.max_tokens) == (0.7, 0.5, 7)
    assert (now.sources["temperature"], now.sources["top_p"]) == ("request", "set")
    settings.update(preset="qwen-coding")
    assert live(settings).params_for(now).top_k == 20
    settings.reset()
    assert live(settings).params_for(now) == said


def test_values_of_a_caller_who_resolved_nothing_are_its_own() -> None:
    settings = Settings()
    settings.update(temperature=0.1)
    own = SamplingParams(top_p=0.9)
    assert live(settings).params_for(own) is own


def test_live_sampling_that_contradicts_a_request_leave_it_alone() -> None:
    settings = Settings()
    own = SamplingDefaults({}, {}, settings).resolve({"min_tokens": 50})
    settings.update(max_tokens=20)
    assert live(settings).params_for(own) is own


def test_a_running_request_ends_when_its_limit_is_lowered(scripted_llm: Callable[..., LLM]) -> None:
    llm = scripted_llm(COUNTING, step_seconds=SLOW)
    llm.settings.update(temperature=0.0)
    follows = llm.submit_prompt(PROMPT, llm.sampling_params())
    own = llm.submit_prompt(PROMPT, llm.sampling_params(max_tokens=60))
    wait_until(lambda: len(follows.snapshot().outputs[0].token_ids) >= 5)
    llm.settings.update(max_tokens=20)
    assert len(follows.result().outputs[0].token_ids) in range(20, 23)
    assert follows.result().outputs[0].finish_reason == "length"
    assert len(own.result().outputs[0].token_ids) == 60
    assert ("max_tokens", 20, "set") in [(one.name, one.value, one.source) for one in llm.explain(2).sampling]


def test_a_lower_temperature_reaches_a_running_http_stream(scripted_llm: Callable[..., LLM]) -> None:
    llm = scripted_llm(COUNTING, step_seconds=SLOW)
    llm.settings.update(temperature=1000.0, ignore_eos=True, seed=3)
    server = llm.serve(no_api_key=True)
    body = {"model": "scripted", "stream": True, "max_tokens": 120, "prompt": PROMPT}
    text = ""
    with httpx.stream("POST", f"{server.base_url}/completions", json=body, timeout=60) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            text += json.loads(line[6:])["choices"][0]["text"]
            if len(text) > 20 and llm.settings.snapshot()["temperature"]:
                assert "0 1 2 3" not in text, "at this temperature every token is as likely as any"
                llm.settings.update(temperature=0.0)
    numbers = [int(word) for word in text.split()[-20:-1]]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers))), "from then on the model says its script"


def test_requests_that_wait_follow_too(scripted_llm: Callable[..., LLM]) -> None:
    llm = scripted_llm(COUNTING, step_seconds=SLOW, max_num_seqs=1)
    first = llm.submit_prompt(PROMPT, SamplingParams(temperature=0, max_tokens=40))
    second = llm.submit_prompt(PROMPT, llm.sampling_params(temperature=0))
    wait_until(lambda: len(first.snapshot().outputs[0].token_ids) >= 3)
    llm.settings.update(max_tokens=4)
    assert len(second.result().outputs[0].token_ids) == 4
    assert len(first.result().outputs[0].token_ids) == 40


def test_a_live_budget_ends_the_thought_of_a_running_request(scripted_llm: Callable[..., LLM]) -> None:
    llm = scripted_llm(f"<think>{COUNTING}</think>Done.", reasoning_parser="qwen3", step_seconds=SLOW)
    params = llm.sampling_params(temperature=0, skip_special_tokens=False)
    follows = llm.submit_prompt(PROMPT, params)
    own = llm.submit_prompt(PROMPT, params.replace(max_tokens=60), thinking_token_budget=-1)
    wait_until(lambda: len(follows.snapshot().outputs[0].token_ids) >= 5)
    llm.settings.update(thinking_token_budget=12)
    done = follows.result().outputs[0]
    assert done.text.endswith("</think>Done.")
    assert len(done.token_ids) < 40
    assert done.thinking_cut == "budget"
    assert "</think>" not in own.result().outputs[0].text


def test_a_budget_set_before_holds_for_later_requests_until_it_is_removed(scripted_llm: Callable[..., LLM]) -> None:
    llm = scripted_llm("<think>one two three four five six</think>Done.", reasoning_parser="qwen3")
    params = llm.sampling_params(temperature=0, max_tokens=60)
    llm.settings.update(thinking_token_budget=2)
    assert llm.generate(PROMPT, params)[0].outputs[0].thinking_cut == "budget"
    llm.settings.update(thinking_token_budget=-1)
    whole = llm.generate(PROMPT, params)[0].outputs[0]
    assert (whole.thinking_cut, "six" in whole.text) == (None, True)


def test_finish_thinking_ends_every_thought_now(scripted_llm: Callable[..., LLM]) -> None:
    llm = scripted_llm(f"<think>{COUNTING}</think>Done.", reasoning_parser="qwen3", step_seconds=SLOW)
    params = llm.sampling_params(temperature=0)
    streams = [llm.submit_prompt(PROMPT, params) for _ in range(2)]
    wait_until(lambda: all(request.thinking for request in llm.activity().requests))
    llm.finish_thinking()
    assert [stream.result().outputs[0].thinking_cut for stream in streams] == ["request", "request"]


def test_thinking_is_switched_for_every_door_that_does_not_say(scripted_llm: Callable[..., LLM]) -> None:
    llm = scripted_llm("Yes.", chat_template=TEMPLATE, reasoning_parser="qwen3")
    messages = [{"role": "user", "content": "Well?"}]
    llm.settings.update(enable_thinking=False)
    assert llm.render_chat(messages).endswith("</think>\n\n")
    assert not llm.render_chat(messages, chat_template_kwargs={"enable_thinking": True}).endswith("</think>\n\n")
    llm.settings.update(enable_thinking=None)
    assert not llm.render_chat(messages).endswith("</think>\n\n")


@pytest.mark.parametrize(
    "values", [{"enable_thinking": "yes"}, {"thinking_token_budget": 1.5}, {"thinking_token_budget": -2}]
)
def test_bad_values_about_thinking_change_nothing(values: dict[str, object]) -> None:
    settings = Settings()
    settings.update(temperature=0.5)
    with pytest.raises(RequestError):
        settings.update(temperature=0.1, **values)
    assert dict(settings.everything()) == {"temperature": 0.5}


def test_changes_from_many_threads_leave_the_engine_with_the_last(scripted_llm: Callable[..., LLM]) -> None:
    llm = scripted_llm(COUNTING, step_seconds=SLOW)
    stream = llm.submit_prompt(PROMPT, llm.sampling_params(temperature=0, max_tokens=300))
    wait_until(lambda: len(stream.snapshot().outputs[0].token_ids) >= 1)

    def turn(number: int) -> None:
        for step in range(50):
            llm.settings.update(top_p=0.5 + number / 100 + step / 1000)

    threads = [threading.Thread(target=turn, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: llm.activity().requests[0].params.top_p == llm.settings.snapshot()["top_p"])
    stream.abort()
