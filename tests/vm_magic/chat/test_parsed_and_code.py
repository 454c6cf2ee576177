"""What a reply is besides text: JSON read as Python, and its code alone, also in the next cell."""

import copy
import pickle
from typing import Any

import pydantic
import pytest
from IPython.core.error import UsageError

from engine.errors import ConfigError, RequestError
from engine.outputs import Reply
from tests.vm_magic import fakes
from tests.vm_magic.helpers import Capture, cell, line, shown
from vm_magic.chat.parsed_reply import parse_reply
from vm_magic.commands.parser import split_words
from vm_magic.commands.table import command_parser
from vm_magic.show.code_blocks import code_of
from vm_magic.show.reply_bundle import growing_bundle
from vm_magic.show.reply_text import ReplyText
from vm_magic.state.references import release_references

ANSWER = "First:\n```bash\npip install x\n```\nThen\n```py\na = 1\n```\nand\n```python\nb = 2\n```\n```\n2\n```\nDone."
CODE = "a = 1\n\nb = 2"


class City(pydantic.BaseModel):
    name: str
    size: int = 0


def test_parsed_is_a_dict_or_an_instance_of_the_class(shell: Any, loaded: fakes.FakeLLM) -> None:
    loaded.words = ['{"name": "Ulm", "size": 3}']
    shell.user_ns["City"] = City
    reply = cell(shell, 'chat --json {"type": "object", "title": "a } brace \\" and {"}', "hi")
    assert (reply.parsed, reply.parse_error) == ({"name": "Ulm", "size": 3}, None)
    reply = line(shell, "chat --json City hi")
    assert reply.parsed == City(name="Ulm", size=3)
    assert cell(shell, "vllm_metal complete --json object", "hi").parsed == {"name": "Ulm", "size": 3}
    assert all(set(message) == {"role", "content"} for message in reply.messages)
    for twin in (copy.deepcopy(reply), pickle.loads(pickle.dumps(reply))):
        assert twin == reply
        assert isinstance(twin.parsed, City)
    assert line(shell, "chat hi").parsed is None


@pytest.mark.parametrize(
    ("text", "reason", "says"),
    [
        ('{"name": "Ul', "length", "the JSON is not whole: it was cut off at its limit of tokens"),
        ('{"name": ', "abort", "the JSON is not whole: it was stopped"),
        ("no", "stop", "the text is not JSON: Expecting value"),
        ('{"size": "x"}', "stop", "not a City: name: Field required; size: Input should be a valid integer"),
    ],
)
def test_what_cannot_be_parsed_is_none_and_says_why(text: str, reason: str, says: str) -> None:
    reply = Reply(text, finish_reason=reason)
    parse_reply(reply, City)
    assert reply.parsed is None
    assert reply.parse_error is not None
    assert reply.parse_error.startswith(says)


def test_the_cell_says_that_there_is_nothing_parsed(shell: Any, loaded: fakes.FakeLLM) -> None:
    loaded.words = ["no json"]
    assert "parsed is None: the text is not JSON" in cell(shell, "chat --json object", "hi").notes[0]


def test_a_model_within_what_was_parsed_is_released(shell: Any) -> None:
    class Holder(pydantic.BaseModel):
        held: Any

    heavy = type("Array", (), {"__module__": "mlx.core"})()
    for number, parsed in ((1, [heavy]), (2, Holder(held={"a": heavy})), (3, {"a": 1})):
        shell.user_ns["_oh"][number] = Reply("", parsed=parsed)
    release_references(shell)
    assert list(shell.user_ns["_oh"]) == [3]


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ('--json {"type": "object" hi', ConfigError, "--json .*not valid JSON: its { is not closed with a }"),
        ("--json [1, 2] hi", RequestError, "a schema is a JSON object, not list"),
        ("--json [1 hi", ConfigError, r"its \[ is not closed"),
        ("--json {a: 1} hi", RequestError, "not valid JSON: Expecting property name enclosed in double quotes"),
    ],
)
def test_wrong_json_says_what_is_wrong(
    shell: Any, loaded: fakes.FakeLLM, text: str, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        line(shell, f"chat {text}")


def test_engine_flags_take_json_without_quotes_too() -> None:
    parser = command_parser("serve")
    typed = 'smollm2 --override-generation-config {"temperature": 0.1, "stop": ["a b"]} --seed 3'
    assert split_words(typed, parser) == split_words(typed.replace("{", "'{").replace("}", "}'"))
    assert split_words('a --default-chat-template-kwargs={"a": "it\'s"} b', parser)[2:] == ['{"a": "it\'s"}', "b"]


@pytest.mark.parametrize(
    ("text", "code", "language"),
    [
        (ANSWER, CODE, "python"),
        ("```\nls\n```", "ls", ""),
        ("~~~sh\nls ``` x\n~~~", "ls ``` x", "sh"),
        ("````md\n```py\nx\n```\n````", "```py\nx\n```", "md"),
        ("- so:\n  ```python\n  if a:\n      b\n  ```", "if a:\n    b", "python"),
        ("x\n```js\nlet a", "let a", "js"),
        ("import os\nos.getcwd()", "import os\nos.getcwd()", "python"),
    ],
)
def test_code_is_the_blocks_of_one_language(text: str, code: str, language: str) -> None:
    assert code_of(text) == (code, language)


@pytest.mark.parametrize("text", ["Hello", "Use print.", "", "```\n```", "Is it? `x = 1`", "```python"])
def test_a_text_without_code_has_none(text: str) -> None:
    assert code_of(text) is None


def test_code_alone_is_shown_and_the_whole_text_kept(shell: Any, loaded: fakes.FakeLLM) -> None:
    loaded.words = [ANSWER]
    reply = cell(shell, "chat -f code", "hi")
    assert str(reply) == ANSWER
    assert shown(shell) == {"text/plain": CODE, "text/markdown": f"```python\n{CODE}\n```"}
    data = shell.display_formatter.format(line(shell, "chat -f code hi"))[0]
    assert data == {"text/plain": CODE, "text/markdown": f"```python\n{CODE}\n```"}


def test_while_code_is_written_words_before_it_are_faint_and_gone_when_it_comes() -> None:
    def grown(text: str) -> str:
        return str(growing_bundle(ReplyText(text), "code")["text/markdown"])

    assert grown("Here <it> is:") == '<span style="opacity:0.6">… Here &lt;it&gt; is:</span>'
    assert grown("Here it is:\n```python") == grown("Here it is:\n```python\n") == grown("Here it is: ```python")
    assert grown("Here it is:\n```python\na = 1\nb") == "```python\na = 1\nb\n```"
    assert grown("Here it is:\n```python\na = 1\n```\nDone") == "```python\na = 1\n```"


@pytest.fixture
def next_cells(shell: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    cells: list[str] = []
    monkeypatch.setattr(shell, "set_next_input", lambda text, replace=False: cells.append(text))
    return cells


def test_code_goes_into_the_next_cell_and_is_not_run(
    shell: Any, loaded: fakes.FakeLLM, next_cells: list[str], capsys: Capture
) -> None:
    loaded.words = [ANSWER]
    cell(shell, "chat --to-cell", "hi")
    assert line(shell, "chat --to-cell hi").text == ANSWER
    cell(shell, "chat --to-cell -o kept", "hi")
    assert shell.user_ns["kept"].text == ANSWER
    assert next_cells == [CODE] * 3
    assert "a" not in shell.user_ns
    loaded.words = ["```bash\nls\n```"]
    cell(shell, "chat --to-cell", "hi")
    loaded.words = ["just words"]
    capsys.readouterr()
    cell(shell, "chat --to-cell", "hi")
    assert next_cells[3:] == ["%%bash\nls"]
    assert "no code in the reply: no cell was made" in capsys.readouterr().out


def test_a_detached_reply_comes_too_late_for_the_next_cell(shell: Any, loaded: fakes.FakeLLM) -> None:
    with pytest.raises(UsageError, match="--to-cell does not go with --detach"):
        cell(shell, "chat --to-cell --detach", "hi")


def test_a_reply_of_a_line_looks_as_one_of_a_cell(shell: Any, loaded: fakes.FakeLLM) -> None:
    loaded.words = ['{"a": 1}']
    data = shell.display_formatter.format(shell.run_cell("%chat --json object hi").result)[0]
    assert data["text/plain"] == '{\n  "a": 1\n}'
    assert data["text/markdown"] == '```json\n{\n  "a": 1\n}\n```'
    plain = shell.display_formatter.format(shell.run_cell("%chat -f text hi").result)[0]
    assert plain == {"text/plain": '{"a": 1}'}
