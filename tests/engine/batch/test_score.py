"""Scoring a text, and awaiting a reply."""

import asyncio
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from engine import LLM, SamplingParams
from engine.batch.score import Score
from engine.batch.scored_token import scored_token, unlikely_text
from engine.errors import ContextLengthError, RequestError
from engine.outputs import Logprob
from engine.text.tokens.token_texts import token_texts
from tests.engine.parity.oracle import oracle_logprobs
from vm_magic.show.token_html import score_html, tokens_html, unlikely_html

TEXT = "The quick brown fox jumps over the lazy dog, and <b>again</b> it costs $5 or 3 < 4."


@pytest.fixture(scope="module")
def model(tiny_model_dir: Any) -> str:
    return str(tiny_model_dir("llama"))


@pytest.fixture(scope="module")
def llm(model: str) -> Iterator[LLM]:
    with LLM(model, max_model_len=256) as loaded:
        yield loaded


def test_each_tokens_logprob_and_the_perplexity_are_mlx_lms(llm: LLM, model: str) -> None:
    score = llm.score(TEXT)
    expected = oracle_logprobs(model, score.token_ids)
    wanted = [expected[i, token] for i, token in enumerate(score.token_ids[1:])]
    assert score.logprobs[0] is None
    np.testing.assert_allclose(np.array(score.logprobs[1:], float), wanted, atol=2e-4)
    assert score.perplexity == pytest.approx(math.exp(-np.mean(wanted)), rel=2e-4)
    assert score.num_scored == len(score.tokens) - 1
    assert "".join(score.tokens) == TEXT
    assert score.scored[3].alternatives[0][1] == pytest.approx(expected[2].max(), abs=2e-4)


def test_a_score_is_the_same_when_its_beginning_is_in_memory(llm: LLM) -> None:
    llm.generate(TEXT, SamplingParams(max_tokens=1), use_tqdm=False)
    first, second = llm.score(TEXT), llm.score(TEXT)
    assert first.logprobs == pytest.approx(second.logprobs, abs=2e-4)


def test_a_perplexity_beyond_counting_is_a_power_of_ten() -> None:
    score = Score("ab", (1, 2), ("a", "b"), (None, -39.6), ())
    assert score.headline == "perplexity 1.58e+17 · 1 token scored · 57.131 bits a token"


def test_a_score_shows_its_tokens_escaped_and_the_least_likely_ones(llm: LLM) -> None:
    score = llm.score(TEXT, num_alternatives=3)
    page, text = score_html(score), repr(score)
    assert page.count("<span") >= len(score.tokens)
    assert "<b>again" not in page
    assert "&lt;" in page
    assert "$" not in page
    assert text.startswith(f"perplexity {score.perplexity:,.3f} · {score.num_scored} tokens scored")
    assert "least likely tokens" in text
    assert len(score.scored) == score.num_scored + 1
    assert {len(token.alternatives) for token in score.scored[1:]} <= {3, 4}


def test_tokens_that_share_a_character_are_read_together(scripted_llm: Any) -> None:
    tokenizer = scripted_llm("ok").tokenizer

    def decode(ids: Any) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False))

    text = "<|im_start|>It is 世界, 😀 and a ½-naïve — ok"
    ids = tokenizer.encode(text)
    assert any("\ufffd" in decode([token_id]) for token_id in ids)
    texts = token_texts(ids, decode)
    assert "".join(texts) == text
    assert texts[texts.index("") + 1] == "世"
    cut = ids[: next(i for i, text in enumerate(texts) if not text) + 1]
    assert token_texts(cut, decode)[-1] == "\ufffd"
    assert "".join(token_texts(ids[-1:] + cut[-1:] * 40, decode)).startswith(" ok\ufffd")
    assert token_texts([], decode) == []


def test_a_score_of_any_script_shows_its_characters(scripted_llm: Any) -> None:
    score = scripted_llm("ok").score("Hello 世界 😀!", num_alternatives=2)
    assert "".join(score.tokens) == "Hello 世界 😀!"
    page = score_html(score).split("</pre>")[0]
    assert "\ufffd" not in page
    assert "界</span>" in page
    assert "(part of a character)" in page
    assert "\ufffd" not in repr(score)


def test_what_cannot_be_scored_is_refused_in_one_line(llm: LLM) -> None:
    with pytest.raises(RequestError, match="at least two tokens"):
        llm.score("a")
    with pytest.raises(ContextLengthError, match="256"):
        llm.score("word " * 400)
    with pytest.raises(RequestError, match="prompt_logprobs must"):
        llm.score(TEXT, num_alternatives=99)


def test_colours_follow_the_probability_and_hovering_tells_the_alternatives() -> None:
    sure = scored_token(Logprob(math.log(0.99), 1, "a"), [Logprob(math.log(0.99), 1, "a")])
    odd = Logprob(math.log(0.02), 3, '"><script>\n')
    surprise = scored_token(odd, [odd, Logprob(math.log(0.9), 1, "likely")])
    page = tokens_html([sure, surprise])
    plain, coloured = page.split("<span")[1:]
    assert "background" not in plain
    assert "background" in coloured
    assert "<script" not in page
    assert "\n" not in page
    assert "90.0%" in coloured
    assert "rank 3" in coloured
    assert unlikely_html([sure]) == unlikely_text([sure]) == ""
    assert "'likely' 90.0%" in unlikely_text([sure, surprise])
    assert "<script" not in unlikely_html([sure, surprise])


def test_a_reply_can_be_awaited_and_is_that_of_chat(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    params = SamplingParams(temperature=0, max_tokens=6)

    async def both() -> list[Any]:
        return list(await asyncio.gather(*(llm.achat(messages, params) for _ in range(2))))

    (expected,) = llm.chat(messages, params)
    for output in asyncio.run(both()):
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        assert output.finished


def test_cancelling_the_task_ends_the_request(scripted_llm: Any) -> None:
    llm = scripted_llm("word " * 300, step_seconds=0.02)

    async def give_up() -> None:
        task = asyncio.create_task(llm.achat([{"role": "user", "content": "Hello"}], SamplingParams(max_tokens=250)))
        while llm.stats().num_running == 0:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(give_up())
    deadline = time.monotonic() + 30
    while llm.stats().num_running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert llm.stats().num_running == 0
    assert llm.request_log.latest().outcome.completions[0].finish_reason == "abort"
