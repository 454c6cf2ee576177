"""No sequence of control characters that a model, a file or a server writes reaches a terminal."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell

from engine.errors import ConfigError, RequestError
from engine.format.text import harmless, harmless_line
from engine.outputs import Reply
from engine.text.template.chat_template import ChatTemplate
from tests.vm_magic import fakes
from tests.vm_magic.helpers import Capture, cell, line, shown
from vm_magic.shell.hooks import _FORMATTERS
from vm_magic.show.tables import Table

ROOT = Path(__file__).resolve().parents[3]
TITLE, CLIPBOARD, CLEAR = "\x1b]0;owned\x07", "\x1b]52;c;cm0=\x1b\\", "\x1b[2J\x1b[H"
ONE_BYTE = "\x9b2J\x9d0;owned\x9c\x90q"
HOSTILE = f"before{TITLE}{CLIPBOARD}{CLEAR}{ONE_BYTE}\b\b\x7f\x0e\rafter"
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


@pytest.mark.parametrize("text", [HOSTILE, *(chr(code) for code in [*range(9), *range(11, 32), *range(127, 160)])])
def test_no_control_character_is_left(text: str) -> None:
    assert _CONTROL.search(harmless(text)) is None


def test_what_a_terminal_prints_stays_as_it_is() -> None:
    text = "tab\tline\nnaïve 漢字 🙂 \u200f\u05d0\u202bx\u202c \xa0 \u0301 𝄞 ␛[2J"
    assert harmless(text) == text
    assert harmless("a\r\nb") == "a\nb"
    assert harmless("\x1b[31m") == "␛[31m"
    assert harmless("\ud800").encode() == b"\xef\xbf\xbd"


def test_in_a_line_of_ours_nothing_turns_the_direction_of_writing() -> None:
    assert harmless_line("a\u202eb\u2066c") == "a\ufffdb\ufffdc"


@pytest.mark.parametrize("at", range(1, len(HOSTILE)))
def test_a_sequence_in_two_pieces_is_as_harmless_as_in_one(at: int) -> None:
    assert harmless(HOSTILE[:at]) + harmless(HOSTILE[at:]) == harmless(HOSTILE)


@pytest.fixture
def hostile(loaded: fakes.FakeLLM) -> fakes.FakeLLM:
    """A model whose pieces of text split a sequence at every character."""
    loaded.words = list(HOSTILE)
    return loaded


def _printed(capsys: Capture) -> str:
    found = capsys.readouterr()
    return found.out + found.err


def _of_shell(shell: InteractiveShell, value: Any) -> str:
    data, _ = shell.display_formatter.format(value)  # type: ignore[union-attr]
    return str(data["text/plain"])


def test_a_reply_keeps_its_text_and_shows_it_harmlessly(shell: Any, hostile: fakes.FakeLLM, capsys: Capture) -> None:
    reply = cell(shell, "chat", "hello")
    assert "\x1b" in reply.text  # what is kept is what the model wrote
    plain = [output["data"].get("text/plain", "") for output in shell.display_pub.outputs]
    for text in (_printed(capsys), *plain, _of_shell(shell, reply)):
        assert _CONTROL.search(text) is None, repr(text)
    assert any("␛" in text for text in plain)
    line(shell, "set temperature=0.5")
    for command in ("history", "history --list", "status"):
        shown_by = line(shell, command)
        text = _of_shell(shell, shown_by) + _printed(capsys)
        assert _CONTROL.search(text) is None, (command, text)
    assert "␛" in _of_shell(shell, line(shell, "history"))


def test_a_reply_in_a_terminal_is_written_harmlessly(
    shell: Any, hostile: fakes.FakeLLM, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("display_handle", "front_end"):
        monkeypatch.setattr(f"vm_magic.show.{module}.front_end", lambda _: "terminal")
    cell(shell, "chat", "hello")
    cell(shell, "chat --compare temperature=0,1", "hello")
    text = _printed(capsys)
    assert text.replace(" ", "").count("before␛]0;owned␇") == 3  # the fake puts a space behind each piece
    assert _CONTROL.search(text) is None, repr(text)


def test_errors_quote_harmlessly_wherever_they_are_shown(shell: Any, capsys: Capture) -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate("{{ raise_exception(messages[0].content) }}").render([{"role": "user", "content": HOSTILE}])
    assert _CONTROL.search(str(caught.value)) is None
    error = ConfigError(f"no such flag: {HOSTILE}\u202e", flag="x")
    assert (error.flag, "\u202e" in str(error), _CONTROL.search(str(error))) == ("x", False, None)
    shell.run_cell(f"%vllm_metal {TITLE}\u202e")
    text = _printed(capsys).replace("\x1b[31m", "").replace("\x1b[39m", "")  # our own red
    assert "owned" in text
    assert _CONTROL.search(re.sub(r"\x1b\[[\d;]*m", "", text)) is None, repr(text)


def test_tables_cards_and_frames_are_shown_harmlessly(shell: Any) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": [HOSTILE]})
    for value in (Table(("a",), ((HOSTILE,),)), frame, frame["text"], Reply(HOSTILE)):
        text = _of_shell(shell, value)
        assert "before" in text
        assert _CONTROL.search(text) is None, repr(text)
    assert frame["text"][0] == HOSTILE


def test_a_display_shows_its_plain_text_harmlessly(shell: Any) -> None:
    from vm_magic.show.display_handle import DisplayHandle

    DisplayHandle(shell)({"text/plain": HOSTILE, "application/json": {"a": HOSTILE}})
    assert _CONTROL.search(shown(shell)["text/plain"]) is None
    assert shown(shell)["application/json"] == {"a": HOSTILE}


def _classes_with_a_text() -> list[str]:
    """Our classes that write their own text, by full name."""
    found = []
    for package in ("engine", "vm_magic"):
        for file in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    methods = {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
                    found += [f"{module}.{node.name}"] if methods & {"__repr__", "_repr_pretty_"} else []
    return found


def test_every_class_with_a_text_of_its_own_is_shown_through_the_one_place() -> None:
    plain = {name for mime, name, _ in _FORMATTERS if mime == "text/plain"}
    own = set(_classes_with_a_text())
    assert len(own) > 15
    assert own - plain == {"vm_magic.summaries.registry.Describe"}  # it names itself only


def _calls(file: Path) -> list[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_nothing_prints_or_publishes_by_another_way() -> None:
    ways = re.compile(r"(print|display|.*sys\.(stdout|stderr)\.write|.*display_pub\.publish)")
    others = {
        (file.name, call)
        for file in sorted((ROOT / "vm_magic").rglob("*.py"))
        for call in _calls(file)
        if ways.fullmatch(call)
    }
    assert others == {("terminal.py", "print"), ("terminal.py", "sys.stdout.write"),
                      ("terminal.py", "shell.display_pub.publish")}  # fmt: skip
