"""The scripted model itself: it says its script on both backends, masks win, anchors and selectors work."""

from collections.abc import Callable

import pytest

from engine import LLM, SamplingParams
from tests.scripted_model import SUFFIX

GREEDY = SamplingParams(temperature=0, max_tokens=200, skip_special_tokens=False)
SCRIPT = "<think>\nHm, 12 > 7?\n</think>\n\nJa: «größer», 🎉!"
ScriptedLLM = Callable[..., LLM]


def say(llm: LLM, prompt: str, params: SamplingParams = GREEDY) -> str:
    return llm.generate(prompt, params)[0].outputs[0].text


@pytest.mark.parametrize("paged", [True, False])
def test_it_says_its_script_and_ends(scripted_llm: ScriptedLLM, paged: bool) -> None:
    llm = scripted_llm(SCRIPT, use_paged_attention=paged)
    assert llm._thread.call(lambda engine: engine.runner.backend.paged) is paged
    output = llm.chat([{"role": "user", "content": "Well?"}], GREEDY)[0].outputs[0]
    assert (output.text, output.finish_reason) == (SCRIPT, "stop")
    batch = llm.generate([f"{'word ' * n}{SUFFIX}" for n in (1, 40, 7)], GREEDY, use_tqdm=False)
    assert [one.outputs[0].text for one in batch] == [SCRIPT] * 3


def test_sampling_follows_the_script_too_and_prefix_hits_change_nothing(scripted_llm: ScriptedLLM) -> None:
    llm = scripted_llm(SCRIPT)
    prompt = "tell me more about it " * 20 + SUFFIX
    for seed in range(3):
        output = llm.generate(prompt, GREEDY.replace(temperature=1.0, seed=seed))[0]
        assert output.outputs[0].text == SCRIPT
    assert output.num_cached_tokens > 0


def test_it_goes_on_behind_an_anchor_that_the_prompt_brings(scripted_llm: ScriptedLLM) -> None:
    llm = scripted_llm(SCRIPT)
    assert say(llm, SUFFIX + "<think>\n") == SCRIPT.removeprefix("<think>\n")
    assert say(llm, SUFFIX + "<think>\n\n</think>\n\n") == SCRIPT.partition("</think>\n\n")[2]


def test_the_latest_selector_chooses_the_script(scripted_llm: ScriptedLLM) -> None:
    llm = scripted_llm("nought", "one", "two")
    assert [say(llm, text + SUFFIX) for text in ("", "<|script_2|>", "<|script_2|> then <|script_1|> ")] == [
        "nought",
        "two",
        "one",
    ]


def test_a_forbidden_token_costs_one_place_of_the_script(scripted_llm: ScriptedLLM) -> None:
    llm = scripted_llm("one two three")
    first, second, third = llm.tokenize("one two three")
    output = llm.generate(SUFFIX, GREEDY.replace(logit_bias={second: -100, 2: -100}, max_tokens=3))[0].outputs[0]
    assert (output.token_ids[0], output.token_ids[2]) == (first, third)
    assert output.token_ids[1] != second
