"""``%vllm_metal explain`` over the real engine on a tiny model."""

import dataclasses
import html
import re
from collections.abc import Iterator
from typing import Any

import pytest

from engine import LLM, SamplingParams
from engine.errors import RequestError
from engine.explain.request_log import RequestLog
from tests.vm_magic.helpers import cell, line
from vm_magic.show.explain_view import ExplainView
from vm_magic.state.session import current_session

GREEDY = "-t 0 --max-tokens 3"


@pytest.fixture(scope="module")
def llm(tiny_model_dir: Any) -> Iterator[LLM]:
    with LLM(str(tiny_model_dir("llama")), max_model_len=512) as loaded:
        yield loaded


@pytest.fixture
def real(shell: Any, llm: LLM) -> Iterator[LLM]:
    """The tiny model as the notebook's own."""
    llm.request_log = RequestLog()
    llm.reset_prefix_cache()
    current_session().llm = llm
    yield llm
    current_session().llm = None


def test_a_cell_is_explained_with_prompt_values_cache_and_output(shell: Any, real: LLM) -> None:
    with pytest.raises(RequestError, match="no request yet"):
        line(shell, "explain")
    reply = cell(shell, f"chat {GREEDY} --top-p 0.5", "What is <b>?")
    text = repr(line(shell, "explain"))
    assert text.startswith("request 1 (req-")
    assert re.search(r"queue  +0\.", text)
    assert "  temperature         0.0   flag\n" in text
    assert "  top_p               0.5   flag\n" in text
    assert "  max_tokens          3     flag\n" in text
    assert re.search(r"  0 of \d+ prompt tokens from the cache; no earlier request is remembered\n", text)
    assert "<|im_start|>user\n  What is <b>?<|im_end|>" in text
    assert "|What|" in text
    assert "output as generated (3 tokens)" in text
    assert text.rstrip().endswith("\n".join(f"  {one}" for one in str(reply).splitlines()).rstrip())


def test_a_score_is_explained_as_one(shell: Any, real: LLM) -> None:
    line(shell, "score The quick brown fox")
    told = line(shell, "explain")
    assert told.headline.endswith(": its prompt was scored")
    assert "prompt_logprobs" in repr(told)
    for text in (repr(told), told._repr_html_()):
        assert "output" not in text
        assert "max_tokens=1 " not in text


def test_the_second_cell_shows_where_it_left_the_first(shell: Any, real: LLM) -> None:
    cell(shell, f"chat {GREEDY} --new", "Tell me all about foxes, and then some more about dogs")
    cell(shell, f"chat {GREEDY} --new", "Tell me all about foxes, and then some more about cats")
    text = repr(line(shell, "explain"))
    assert "whole blocks of 16 tokens are reused" in text
    here, there = (row for row in text.splitlines() if row.strip().startswith(("here:", "request 1:")))
    assert here.endswith("cats'")
    assert there.endswith("dogs'")
    assert repr(line(shell, "explain 2")).startswith("request 1 ")


def test_the_page_escapes_what_the_user_wrote_and_marks_the_cached_part(shell: Any, real: LLM) -> None:
    for _ in range(2):
        cell(shell, f"chat {GREEDY} --new", "What is <script>alert(1)</script>, and why is it written like that?")
    page = line(shell, "explain")._repr_html_()
    assert "<script>" not in page
    assert "&lt;" in page
    spans = page.split("<pre")[1].split("</pre>")[0].split("<span")[1:]
    cached = [span for span in spans if "from the cache" in span]
    assert len(cached) == line(shell, "explain").explanation.cache.num_cached_tokens == 48
    assert "first miss" in spans[48]
    assert "&lt;&#124;im&#95;start&#124;&gt;" in cached[0]
    assert page.count("<details") == page.count("</details>") >= 3


def test_it_says_what_read_the_cache_in_text_and_on_the_page(shell: Any, real: LLM) -> None:
    cell(shell, f"chat {GREEDY} --new", "What is it?")
    view = line(shell, "explain")
    said = f"MLX's own operations ({len(real.attention_paths[0].layers)} layers full: no GPU kernels on a CPU)"
    assert f"\nattention\n  {said}\n" in repr(view)
    assert f"attention: {html.escape(said)}</div>" in view._repr_html_()
    hostile = dataclasses.replace(view.explanation, attention="<i>")
    assert "attention: &lt;i&gt;" in ExplainView(hostile)._repr_html_()


def test_the_time_is_a_bar_of_its_parts(shell: Any, real: LLM) -> None:
    cell(shell, f"chat {GREEDY} --new", "What is it?")
    view = line(shell, "explain")
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%;height:14px", view._repr_html_())]
    assert len(widths) == 3
    assert sum(widths) == pytest.approx(100, abs=0.1)
    bar, *parts = repr(view).splitlines()[1:5]
    assert len(bar.split()[0]) == 48
    assert [part.split()[1] for part in parts] == ["queue", "prefill", "decode"]
    assert "tokens computed" in parts[1]
    assert "2 more tokens" in parts[2]


def test_one_token_is_counted_as_one(shell: Any, real: LLM) -> None:
    cell(shell, "chat --new -t 0 --max-tokens 2", "What is it?")
    assert "1 more token," in repr(line(shell, "explain"))


def test_the_text_marks_the_first_token_that_was_not_in_memory(shell: Any, real: LLM) -> None:
    for animal in ("dogs", "cats"):
        cell(shell, f"chat {GREEDY} --new", f"Tell me all about foxes, and then some more about {animal}, if any")
    told = line(shell, "explain").explanation
    shown = next(
        row for row in repr(line(shell, "explain")).splitlines() if "▸" in row and "|" in row and "first" not in row
    )
    before = told.tokens[: told.cache.num_cached_tokens]
    assert shown.split("▸")[0].removeprefix("  ").removeprefix("…|").count("|") <= len(before)
    assert shown.split("▸")[1].split("|")[0] == told.tokens[told.cache.num_cached_tokens]


def test_a_request_from_python_is_explained_too(shell: Any, real: LLM) -> None:
    real.generate("One, two", SamplingParams(temperature=0, max_tokens=2, stop=["zzz"]))
    text = repr(line(shell, "explain"))
    assert "  stop                ('zzz',)  SamplingParams\n" in text
    assert "parsed content" in text
