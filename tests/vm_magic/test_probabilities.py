"""``chat --logprobs`` and ``score`` over the real engine on a tiny random model."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from IPython.core.error import UsageError

from engine import LLM
from tests.vm_magic.helpers import cell, line, shown
from vm_magic.state.session import current_session


@pytest.fixture(scope="module")
def llm(tiny_model_dir: Any) -> Iterator[LLM]:
    with LLM(str(tiny_model_dir("llama")), max_model_len=512) as loaded:
        yield loaded


@pytest.fixture
def real(shell: Any, llm: LLM) -> Iterator[LLM]:
    current_session().llm = llm
    yield llm
    current_session().llm = None


def test_tokens_are_coloured_and_tell_their_alternatives(shell: Any, real: LLM) -> None:
    reply = cell(shell, "chat -t 0 --max-tokens 6 --logprobs 3", "Hello")
    assert [len(position) for position in reply.logprobs] == [3] * 6
    page, text = shown(shell)["text/html"], shown(shell)["text/plain"]
    assert page.split("<pre")[1].split("</pre>")[0].count("<span") == 6
    assert page.count("rank 1)") == 6
    assert text == "\n".join([reply.text, *reply.notes])
    assert "text/markdown" not in shown(shell)


def test_characters_of_several_tokens_are_whole_in_the_picture_and_in_explain(
    engine_shell: Any, scripted_llm: Callable[..., LLM]
) -> None:
    answer = "Das ist schön: 世界 😀 für Ærø."
    current_session().llm = scripted_llm(answer)
    try:
        reply = cell(engine_shell, "chat -t 0 --logprobs 2", "Was heißt 世界?")
        picture = shown(engine_shell)["text/html"].split("</pre>")[0]
        assert reply.text == answer
        assert "\ufffd" not in picture
        assert "(part of a character)" in picture
        assert all(f"{character}</span>" in picture for character in "界😀")
        assert any("\ufffd" in (next(iter(one.values())).decoded_token or "") for one in reply.logprobs)
        told = line(engine_shell, "explain")
        assert "界" in "".join(told.explanation.tokens)
        assert "\ufffd" not in repr(told) + told._repr_html_()
    finally:
        current_session().llm = None


def test_what_was_unlikely_is_listed_too(shell: Any, real: LLM) -> None:
    reply = cell(shell, "chat -t 5 --seed 1 --max-tokens 6 --logprobs", "Hello")
    assert len(reply.logprobs[0]) in (5, 6)
    assert "least likely tokens" in shown(shell)["text/plain"]
    assert "least likely tokens" in shown(shell)["text/html"]


def test_the_number_may_be_left_out_in_the_line_form_too(shell: Any, real: LLM) -> None:
    reply = line(shell, "chat -t 0 --max-tokens 2 --logprobs What is it?")
    assert reply.messages[0]["content"] == "What is it?"
    assert len(reply.logprobs) == 2
    assert len(line(shell, "chat -n -t 0 --max-tokens 2 --logprobs 1 What?").logprobs[0]) == 1
    with pytest.raises(UsageError, match="not a whole number from 0 to 20"):
        line(shell, "chat --logprobs 21 What?")


def test_a_raw_completion_is_coloured_as_well(shell: Any, real: LLM) -> None:
    cell(shell, "vllm_metal complete -t 0 --max-tokens 3 --logprobs 2", "Once upon")
    assert shown(shell)["text/html"].split("<pre")[1].split("</pre>")[0].count("<span") == 3


def test_a_cell_and_a_line_are_scored_alike(shell: Any, real: LLM) -> None:
    shell.user_ns["animal"] = "fox"
    score = cell(shell, "vllm_metal score", "The quick brown {{ animal }}")
    assert score.text == "The quick brown fox"
    assert score.perplexity == pytest.approx(real.score("The quick brown fox").perplexity, rel=1e-4)
    assert line(shell, "score The quick brown fox").logprobs[1:] == pytest.approx(score.logprobs[1:], rel=1e-4)
    assert shell.user_ns["_"] is score
    assert cell(shell, "vllm_metal score --raw -o kept --logprobs 2", "{{ animal }}") is None
    assert shell.user_ns["kept"].text == "{{ animal }}"


def test_a_score_without_a_text_is_refused(shell: Any, real: LLM) -> None:
    with pytest.raises(UsageError, match="no text"):
        line(shell, "score")
    with pytest.raises(UsageError, match="cell's body"):
        cell(shell, "vllm_metal score some", "text")
