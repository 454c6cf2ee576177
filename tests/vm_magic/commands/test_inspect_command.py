"""``%vllm_metal inspect``: what it asks the engine for, and what a shell shows of a card."""

from pathlib import Path
from typing import Any

import pytest
from IPython.core.error import UsageError

from engine.model_card.card import Fact, ModelCard, Section
from tests.engine.model_card.folders import write_folder
from tests.vm_magic.helpers import line
from vm_magic.show.model_card_view import model_card_html

CARD = ModelCard(
    "org/<b>name</b>",
    (
        Section("architecture", (Fact("layers", 4, "config.json: num_hidden_layers"), Fact("tied", True, "a.json: t"))),
        Section("chat templates", (Fact("variables", ("<script>", "$x$"), "x.gguf: tokenizer.chat_template"),)),
    ),
    ("</div><img src=x onerror=alert(1)>",),
    (),
    "x.gguf",
)


def test_the_card_is_of_a_load_with_the_same_flags(shell: Any) -> None:
    asked = line(shell, "inspect org/m --dtype float16 --trust-remote-code --revision abc")
    assert asked.model == "org/m"
    assert asked.options == {"dtype": "float16", "trust_remote_code": True, "revision": "abc"}


def test_a_model_must_be_named_and_flags_known(shell: Any) -> None:
    with pytest.raises(UsageError, match="required: MODEL"):
        line(shell, "inspect")
    with pytest.raises(Exception, match="no-such-flag"):
        line(shell, "inspect org/m --no-such-flag 1")


def test_a_shell_gets_the_card_as_text_and_as_a_page(engine_shell: Any, tmp_path: Path) -> None:
    found = line(engine_shell, f"inspect {write_folder(tmp_path / 'm')}")
    assert isinstance(found, ModelCard)
    data, _ = engine_shell.display_formatter.format(found)
    assert data["text/plain"] == str(found)
    assert "config.json: num_hidden_layers" in data["text/html"]
    assert "no problems" in data["text/html"]


def test_a_page_shows_texts_of_files_as_text() -> None:
    page = model_card_html(CARD)
    assert not any(mark in page for mark in ("<script", "<img", "<b>name", "$x$"))
    assert "&lt;script&gt;" in page
    assert page.count("<div") == page.count("</div>")
    assert "1 problem<" in page
    assert ">tokenizer.chat_template<" in page
    assert "text to send" in page


def test_values_are_words_for_people_and_stay_what_they_are_for_programs() -> None:
    assert [fact.text for fact in CARD.facts] == ["4", "yes", "<script>, $x$"]
    assert CARD.to_dict()["facts"]["architecture"] == {
        "layers": {"value": 4, "source": "config.json: num_hidden_layers"},
        "tied": {"value": True, "source": "a.json: t"},
    }
    assert CARD.section("chat templates")["variables"].value == ("<script>", "$x$")
    assert CARD.section("nothing") == {}
