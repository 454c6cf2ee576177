"""Which cells are messages while talk is on: texts in several languages, and code, broken too."""

from typing import Any

import pytest
from IPython.core.error import UsageError

from engine.errors import ConfigError
from tests.vm_magic import fakes
from tests.vm_magic.helpers import Capture, line
from vm_magic.shell.hooks import keep_empty_cells
from vm_magic.shell.talk_cells import TalkCells, talk_is_on

PROSE = [
    "What is the capital of France?",
    "what is 2+2?",
    "What is love?",
    "Who is it?",
    "Why not?",
    "How are you?",
    "Is 3 < 5?",
    "Is it true that the earth is round?",
    "In which year did the wall come down?",
    "in what year did it happen",
    "If I were you, what would you do?",
    "If so, why?",
    "For example, what could I cook with three eggs and 200 g of flour?",
    "From what year is it?",
    "from what year is the Eiffel Tower",
    "with great power comes great responsibility",
    "While we are at it, explain recursion to me",
    "print a poem about the sea",
    "return the sum of x and y in words, please",
    "pass me the salt, please",
    "continue the story",
    "try again, please",
    "Not sure what you mean.",
    "import duties on cars: what are they?",
    "wait a minute",
    "sync my files with the server",
    "And you?",
    "Tell me more",
    "Thank you!",
    "Thanks!",
    "Hello, world!",
    "Hello there",
    "Good morning",
    "Yes please",
    "list all planets of the solar system",
    "help me to write a letter",
    "Explain f(x)",
    "Explain the difference between print() and sys.stdout.write()",
    "What does f(x) mean?",
    "Why does `print('a'` fail?",
    'What does "carpe diem" mean?',
    '"To be or not to be" - who wrote this?',
    "Solve 3*x + 5 = 20 for x",
    "Calculate 2+2",
    "How do I use df.groupby('a').mean()?",
    "Summarise {{ text }} in one sentence",
    "{{ df }} - what stands out in this table?",
    "Translate to French: good morning",
    "I'm fine, thanks.",
    "Don't use lists, use a table",
    "Summarise https://example.com/a?b=c for me",
    "I came; I saw; I conquered",
    "Dear Sir or Madam,\nI write to you about the heating.\n\nYours, A.",
    "Explain this code:\n\ndef f(x):\n    return x + 1",
    "What is wrong here?\nfor i in range(3) print(i)",
    "1. Read the text\n2. Shorten it",
    "- buy some milk\n- call the doctor",
    "(By the way, what is the time in Tokyo?)",
    "3 apples and 5 pears cost how much?",
    "who is Alan Turing?",
    "time flies when you have fun",
    "Wie heißt die Hauptstadt von Frankreich?",
    "Erzähl mir einen Witz",
    "in welchem Jahr fiel die Mauer",
    "Quelle est la capitale de la France ?",
    "Qu'est-ce que c'est ?",
    "¿Qué hora es?",
    "Cuéntame un chiste",
    "Qual è la capitale d'Italia?",
    "Столица Франции — какой город?",
    "Привет",
    "Расскажи анекдот",
    "今天天气怎么样？",
    "你好",
    "你好，请介绍一下自己",
    "请用Python写一个函数",
    "f(x)是什么？",
    "日本の首都はどこですか？",
    "こんにちは",
    "俳句を一つ書いてください。",
    "한국의 수도는 어디입니까?",
    "안녕하세요",
    "ما هي عاصمة فرنسا؟",
    "भारत की राजधानी क्या है?",
]
CODE = [
    "",
    "\n\n",
    "# a comment",
    "# Title\n\n# more",
    "x = 1",
    "x",
    "Hello",
    "what is this",
    "Thanks, bye",
    "df.head()",
    "print('Hello, how are you?')",
    "import numpy as np",
    "from math import pi, e",
    "def f(x):\n    return x",
    "for i in range(3):\n    print(i)",
    "async def f():\n    await g()",
    "await asyncio.sleep(0)",
    "x = await f()",
    "async with a as b:\n    pass",
    "global warming",
    "[1, 2, 3]",
    "{{ name }}",
    '"How are you?"',
    '"""\nSome text in a string.\n"""',
    "'''Dear all,",
    "lambda x: x",
    "match x:\n    case 1: pass",
    "type X = int",
    "%time x = 1",
    "%vllm_metal status",
    "%vllm_metal chat How are you?",
    "%%chat\nHow are you?",
    "%%bash\necho how are you",
    "files = !ls",
    "x = %pwd",
    "x = 1\n!ls",
    "!ls -l",
    "!echo how are you?",
    "?print",
    "print?",
    "print??",
    "%chat?",
    "np.array?",
    "x = print?",
    "Why?",
    "ls",
    "ls -la",
    "cd ..",
    "pip install numpy pandas",
    "git commit -m 'now it works'",
    "run script.py",
    ">>> x = 1",
    "In [1]: x = 1",
    'print("a"',
    "print('a",
    "for i in range(3) print(i)",
    "print 'hello world, how are you'",
    "print x",
    "print hello world",
    "if x == 3\n    print(x)",
    "if x = 3:",
    "while True print(1)",
    "def f(x)\n    return x",
    "def my function(x):",
    "class Foo Bar:",
    "else:\n    print(1)",
    "x = [1, 2",
    "x = {'a': 1, 'b' 2}",
    "x = hello how are you",
    "x == ",
    "y = x +* 2",
    "x y",
    "df head",
    "a b c = 3",
    "foo(a b)",
    "print(Hello how are you)",
    "print (hello, how are you",
    "df[df.a > 3",
    "df.",
    "import numpy pandas matplotlib",
    "import numpy as np import pandas as pd",
    "improt numpy",
    "iport numpy as np",
    "impor math",
    "importt math",
    "rom torch import nn",
    "retun data",
    "retturn data",
    '""Return the instance."""',
    "form math import pi",
    "Import numpy as np",
    "For i in range(3):",
    "retrun x",
    "return x +",
    "int x = 5;",
    "String name = foo();",
    "with open('a') as f print(f.read())",
    "try:\n    x = 1",
    "1 +",
    "1 2 3",
    "2+2?",
    ")",
    "@decorator",
    "x = 'it's fine'",
    "print(“hello”)",
    "变量 = 5 +",
    "打印(\"你好\"",
    "α",
    "größe",
    "x = 1\nThis is not a comment",
    "import os\n\nos.listdir(",
    "const f = (x) => x + 1;",
    "$x",
    "f'{x'",
    "a, b = 1 2",
    "help me",
]  # fmt: skip


@pytest.fixture
def cells(shell: Any) -> TalkCells:
    shell.user_ns.update(df=1, x=1)
    return TalkCells(shell)


def test_there_are_enough_of_both() -> None:
    assert min(len(set(PROSE)), len(set(CODE))) >= 60


def test_texts_are_messages(cells: TalkCells) -> None:
    assert [text for text in PROSE if not cells.is_message(text)] == []


def test_code_stays_code_and_so_does_what_is_ipythons_own(cells: TalkCells) -> None:
    assert [code for code in CODE if cells.is_message(code)] == []


def test_a_name_of_the_notebook_is_python_in_any_script(cells: TalkCells, shell: Any) -> None:
    assert cells.is_message("数据")
    shell.user_ns["数据"] = 1
    assert not cells.is_message("数据")


def test_calls_without_brackets_stay_calls(cells: TalkCells, shell: Any) -> None:
    shell.user_ns["f"] = len
    assert cells.is_message("f of both numbers")
    shell.run_line_magic("autocall", "1")
    assert not cells.is_message("f of both numbers")


@pytest.fixture
def talking(shell: Any, loaded: fakes.FakeLLM) -> fakes.FakeLLM:
    line(shell, "talk")
    return loaded


def asked(shell: Any) -> list[str]:
    """What the user said in the conversation."""
    return [one["content"] for one in line(shell, "history").messages if one["role"] == "user"]


def test_a_text_is_sent_as_it_was_typed_and_kept_in_the_history(shell: Any, talking: fakes.FakeLLM) -> None:
    text = '\n  What does "a\\n" mean,\n\n    and $HOME and {x}?  '
    result = shell.run_cell(text, store_history=True)
    result.raise_error()
    assert asked(shell) == [text]
    assert shell.user_ns["In"][-1] == shell.history_manager.input_hist_raw[-1] == text
    assert str(shell.user_ns["_"]).startswith("alpha beta")
    mark, *replies = [output["data"] for output in shell.display_pub.outputs]
    assert mark["text/plain"] == "» to smollm2"
    assert "alpha" in replies[-1]["text/markdown"]


def test_a_template_is_filled_in_from_the_notebook_as_in_a_chat(shell: Any, talking: fakes.FakeLLM) -> None:
    shell.user_ns["city"] = "Ulm"
    shell.run_cell("What is the weather in {{ city }}?").raise_error()
    assert asked(shell) == ["What is the weather in Ulm?"]


def test_the_flags_of_talk_hold_for_every_message_until_they_are_changed(shell: Any, loaded: fakes.FakeLLM) -> None:
    line(shell, "talk -c side --raw")
    shell.run_cell("How about {{ this }}?").raise_error()
    line(shell, "talk -o kept")
    shell.display_pub.outputs.clear()
    shell.run_cell("Tell me more").raise_error()
    assert shell.user_ns["kept"].messages[0]["content"] == "Tell me more"
    assert shell.display_pub.outputs == []
    line(shell, "talk off")
    assert isinstance(shell.run_cell("Tell me more").error_before_exec, SyntaxError)
    assert [one["content"] for one in line(shell, "history side").messages][:1] == ["How about {{ this }}?"]


def test_status_says_that_talk_is_on(shell: Any, loaded: fakes.FakeLLM, capsys: Capture) -> None:
    line(shell, "talk -t 0.2")
    said = "on: cells of plain text are messages, with -t 0.2; %vllm_metal talk off ends it"
    assert capsys.readouterr().out == f"talk is {said}\n"
    assert dict(line(shell, "status").fields)["talk"] == said
    line(shell, "talk off")
    line(shell, "talk off")
    assert capsys.readouterr().out == "talk is off\ntalk was off already\n"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--temprature 1", "did you mean --temperature"),
        ("hello", "invalid choice: 'hello'"),
        ("--fork other", "--fork belongs to one message"),
        ("-t warm", "warm"),
    ],
)
def test_wrong_flags_are_refused_at_once_and_change_nothing(
    shell: Any, talking: fakes.FakeLLM, flags: str, says: str
) -> None:
    with pytest.raises((UsageError, ConfigError), match=says):
        line(shell, f"talk {flags}")
    assert "talk" in dict(line(shell, "status").fields)


@pytest.mark.parametrize(
    ("code", "state"),
    [
        ("What is the capital of France?", "complete"),
        ("Tell me more", "complete"),
        ("Dear Sir,\nI write to you", "complete"),
        ("for i in range(3):", "incomplete"),
        ("print('a'", "incomplete"),
        ("x = [", "incomplete"),
        ("def f(x):\n    return x", "incomplete"),
        ("x = 1", "complete"),
        ("%%chat", "incomplete"),
    ],
)
def test_a_sentence_is_complete_at_once_and_code_as_ever(
    shell: Any, talking: fakes.FakeLLM, code: str, state: str
) -> None:
    assert shell.input_transformer_manager.check_complete(code)[0] == state


def test_what_is_left_to_python_gets_a_hint_where_it_may_have_been_text(
    shell: Any, talking: fakes.FakeLLM, capsys: Capture
) -> None:
    hint = "talk is on, but this starts like Python; %%chat sends it as a message"
    for code, hinted in (
        ("for the win", True),
        ("Hello", True),
        ("what is this", True),
        ("print('a'", False),
        ("for i in range(3) print(i)", False),
        ("x = hello how are you", False),
        ("1/0", False),
        ("x.hello", False),
    ):
        shell.run_cell(code)
        captured = capsys.readouterr()
        assert (hint in captured.err) == hinted, code
    line(shell, "talk off")
    shell.run_cell("for the win")
    assert hint not in capsys.readouterr().err


def test_a_fault_while_a_cell_is_looked_at_leaves_it_to_python(
    shell: Any, talking: fakes.FakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> bool:
        raise ZeroDivisionError

    monkeypatch.setattr("vm_magic.shell.talk_cells.is_unknown_word", fails)
    shell.run_cell("y = 41 + 1").raise_error()
    assert shell.user_ns["y"] == 42
    assert talk_is_on()


def test_unloading_ends_it_and_reloading_does_not(shell: Any, talking: fakes.FakeLLM) -> None:
    shell.extension_manager.reload_extension("vm_magic")
    assert talk_is_on()
    before = list(shell.input_transformer_manager.cleanup_transforms)
    shell.extension_manager.unload_extension("vm_magic")
    assert not talk_is_on()
    after = shell.input_transformer_manager.cleanup_transforms
    assert [one for one in before if one not in after and one is not keep_empty_cells] == before[:1]
    assert isinstance(before[0], TalkCells)
