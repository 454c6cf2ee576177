"""The examples of README, manual and docstrings run in a shell and print what they show."""

import builtins
import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import engine
import vm_magic
from engine import LLM
from tests.examples import Example, agrees, examples, outputs_without_code
from tests.vm_magic.helpers import Capture
from vm_magic.state.session import current_session

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "notebooks").glob("*.md"))]
BEFORE = {"OpenAI(base_url=server.base_url": "server = vm_magic.current().serve()"}
"""Code that a block counts on without being in its page: what the block has in it, and what is run first."""
MAX_TOKENS = 24
"""Where an example sets no limit: a small model may go on and on."""
NEEDS_A_GPU = ("bench --kernels",)
"""Examples that say on a CPU that there is nothing to do."""


def shown_by(shell: Any, code: str, capsys: Capture) -> str:
    """What a cell with ``code`` prints and shows, as text; raises what the cell raised."""
    capsys.readouterr()
    shell.display_pub.outputs.clear()
    shell.run_cell(code, store_history=True).raise_error()
    printed = re.sub(r"^Out\[\d+\]: ?\n?", "", capsys.readouterr().out, flags=re.MULTILINE)
    places: dict[Any, str] = {}
    for number, one in enumerate(shell.display_pub.outputs):
        place = one.get("transient", {}).get("display_id", number)
        places[place] = one["data"].get("text/plain", "")
    return "\n".join(filter(None, [*places.values(), printed]))


def check(shell: Any, page: str, example: Example, capsys: Capture) -> None:
    """Run ``example``; AssertionError where it shows something else."""
    for mark, code in BEFORE.items():
        if mark in example.code:
            shell.run_cell(f"import vm_magic\n{code}").raise_error()
    found = shown_by(shell, example.code, capsys)
    assert example.gave(found), f"{page}:{example.line} shows\n{example.output}\nand gives\n{found}"


@pytest.mark.weights
@pytest.mark.timeout(600)
def test_the_examples_of_every_page_run_and_show_what_comes_out(
    engine_shell: Any, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    current_session().settings.update(max_tokens=MAX_TOKENS)
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        assert outputs_without_code(page) == [], f"{path.name}: an output behind no example"
        for example in examples(page):
            if not any(mark in example.code for mark in NEEDS_A_GPU):
                check(engine_shell, path.name, example, capsys)
    closed = [one for one in engine_shell.user_ns.values() if isinstance(one, LLM)]
    assert closed, "README shows LLM"
    assert all(one.closed for one in closed), "and gives its memory back"


def test_pages_have_examples_where_they_are_looked_for() -> None:
    found = {path.name: [one.code for one in examples(path.read_text(encoding="utf-8"))] for path in PAGES}
    assert any(code.startswith("%%chat") for code in found["README.md"])
    assert any("LLM(" in code for code in found["README.md"])
    assert any("%load_ext vm_magic" in code for code in found["index.md"])


PAGE = """\
```console
$ rm -rf /
```
```
%load_ext vm_magic
```
Words.

```python
print("1 of", 3)
"two"
```

```text output
1 of …
'two'
```

```text
not run: no magic
```
"""


def test_an_output_that_is_not_what_comes_out_is_found(engine_shell: Any, capsys: Capture) -> None:
    first, second = examples(PAGE)
    assert (first.line, first.code, first.output) == (4, "%load_ext vm_magic\n", None)
    assert (second.line, second.output) == (9, "1 of …\n'two'\n")
    check(engine_shell, "page", second, capsys)
    wrong = Example(second.line, second.code, "1 of 4\n'two'\n")
    with pytest.raises(AssertionError, match="page:9 shows"):
        check(engine_shell, "page", wrong, capsys)
    with pytest.raises(ZeroDivisionError):
        check(engine_shell, "page", Example(1, "1 / 0", None), capsys)
    assert outputs_without_code(PAGE) == []
    assert outputs_without_code("```text output\nHi\n```\n") == [1]
    assert not agrees("a…b", "ab and more")
    (loaded,) = examples("```\n%load\n```\n```text output, numbers differ\nRoom for 480,608 tokens (22.1 GB)\n```\n")
    assert loaded.gave("Room for 1,024 tokens (3 GB)")
    assert not loaded.gave("Room for 1,024 blocks (3 GB)")
    assert outputs_without_code("```text output, numbers differ\nHi\n```\n") == [1]


def docstring_examples() -> Iterator[doctest.DocTest]:
    """The examples in docstrings of what the packages give, and of the modules that it is in."""
    finder = doctest.DocTestFinder(exclude_empty=True, recurse=True)
    homes = {getattr(engine, name).__module__ for name in engine.__all__}
    modules = {engine, vm_magic, *map(importlib.import_module, homes)}
    for module in sorted(modules, key=lambda one: one.__name__):
        yield from (one for one in finder.find(module) if one.examples)


@pytest.mark.weights
@pytest.mark.timeout(600)
def test_the_examples_of_docstrings_print_what_they_show(capsys: Capture) -> None:
    found = list(docstring_examples())
    written = [path for top in ("engine", "vm_magic") for path in (ROOT / top).rglob("*.py")]
    with_examples = {str(path) for path in written if re.search(r"^\s*>>> ", path.read_text(encoding="utf-8"), re.M)}
    assert {one.filename for one in found} == with_examples, "all of them are found"
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    try:
        for one in found:
            runner.run(one)
    finally:
        vars(builtins).pop("_", None)  # where a value's display leaves it, and IPython would take it for gettext's
    assert runner.tries
    assert not runner.failures, capsys.readouterr().out
