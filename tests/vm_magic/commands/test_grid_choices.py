"""``%%vllm_metal grid --choices``: labels with their probabilities as a table with bars."""

from typing import Any

import pandas
import pytest

from engine import LLM
from engine.errors import RequestError
from tests.vm_magic.commands.test_grid import llm, scripted  # noqa: F401 - fixtures
from tests.vm_magic.helpers import cell, line, shown
from vm_magic.commands.table import command_parser
from vm_magic.show.choice_view import MAX_BARS, ChoiceView, percent
from vm_magic.show.grid_view import GridView


def test_a_cell_gives_the_probability_of_each_choice_for_each_row(shell: Any, llm: LLM) -> None:  # noqa: F811
    shell.user_ns["city"] = ["Ulm", "B<b>onn"]
    found = cell(shell, "vllm_metal grid --over city --choices 'Fine <b>weather</b>., rain'", "In {{ city }}?")
    assert list(found.columns) == [
        *("city", "prompt", "choice", "p(Fine <b>weather</b>.)", "p(rain)"),
        *("coverage", "prompt_tokens", "cached_tokens", "time", "error"),
    ]
    assert set(found.choice) == {"Fine <b>weather</b>."}
    assert (found["p(Fine <b>weather</b>.)"] > 0.999).all()
    bundle = shown(shell)
    assert bundle["text/plain"].startswith("2 prompts done · 2 choices\ncity")
    assert "rain <0.01%" in bundle["text/plain"]
    assert bundle["text/html"].count("width:100.0%") == 2
    assert "<b>weather" not in bundle["text/html"]
    assert "B&lt;b&gt;onn" in bundle["text/html"]
    assert llm.request_log.latest() is None or "Ulm" not in (llm.request_log.latest().prompt or "")  # type: ignore[union-attr]


def test_choices_may_be_a_list_of_the_notebook_and_resume_goes_on(shell: Any, llm: LLM) -> None:  # noqa: F811
    shell.user_ns["labels"] = [1, 2, 3]
    found = line(shell, "grid --choices labels How many?")
    assert list(found.columns[1:5]) == ["choice", "p(1)", "p(2)", "p(3)"]
    asked = llm.stats().prefix_queries
    assert line(shell, "grid --choices labels --resume How many?")["p(2)"].iloc[0] == found["p(2)"].iloc[0]
    assert llm.stats().prefix_queries == asked
    assert line(shell, "grid --complete --choices a,b Hi")["p(a)"].iloc[0] >= 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--choices yes", "--choices yes: give several with commas, or the name of a list"),
        ("--choices yes,no -t 0", "temperature: choices are scored, not sampled"),
        ("--choices yes,no --stop x", "stop: choices are scored"),
        ("--choices yes,no --json object", "schema: choices are the only answers"),
        ("--choices yes,no --no-think", "--no-think: choices are answers without a thought"),
        ("--choices yes,yes", "'yes' is there twice"),
        ("--choices yes,", "a text or a number"),
    ],
)
def test_what_does_not_go_with_choices_is_refused_by_name(shell: Any, llm: LLM, flags: str, said: str) -> None:  # noqa: F811
    with pytest.raises(RequestError, match=said):
        cell(shell, f"vllm_metal grid {flags}", "Well?")


def test_the_flag_is_completed_and_explained() -> None:
    assert "--choices" in command_parser("grid").flags()
    assert "probability" in command_parser("grid").format_help()


def frame(num_labels: int, errors: list[str | None]) -> pandas.DataFrame:
    names = [f"p(label {n})" for n in range(num_labels)]
    rows = [
        {
            "prompt": f"row {place}",
            "choice": None if error else "label 0",
            **dict.fromkeys(names, None if error else 1 / num_labels),
            "coverage": None if error else 0.5,
            "error": error,
        }
        for place, error in enumerate(errors)
    ]
    return pandas.DataFrame(rows)


def test_many_labels_are_cut_to_the_likeliest_and_failed_rows_say_why() -> None:
    view = ChoiceView.of(frame(9, [None, "too <long>"]))
    assert view.rows[0].num_hidden == 9 - MAX_BARS
    assert "label 2 11.1%, 6 more" in repr(view)
    assert "… and 3 more" in view.bundle()["text/html"]
    assert "too &lt;long&gt;" in view.bundle()["text/html"]
    assert view.caption == "1 prompts done, 1 failed · 9 choices"
    many = ChoiceView.of(frame(2, [None] * 50))
    assert many.note == "… and 10 more rows; the DataFrame in _ has all"


def test_frames_of_texts_keep_their_own_picture(shell: Any, llm: LLM) -> None:  # noqa: F811
    cell(shell, "vllm_metal grid --max-tokens 2", "Hi")
    assert shown(shell)["text/plain"] == repr(GridView.of(llm.last_map))  # type: ignore[arg-type]
    assert not ChoiceView.shows(llm.last_map)  # type: ignore[arg-type]


def test_small_probabilities_keep_a_digit_that_tells() -> None:
    assert [percent(one) for one in (0.9312, 0.01, 0.0023, 0.00001, 0)] == ["93.1%", "1.0%", "0.23%", "<0.01%", "0.0%"]
