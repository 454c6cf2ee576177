"""``%%chat --cells`` and ``--error``: what goes along, what never does, and what is left when the extension goes."""

import gc
import sys
import weakref
from typing import Any

import pytest
from IPython.core.error import UsageError

from engine.errors import RequestError
from tests.vm_magic import fakes
from tests.vm_magic.helpers import Capture, cell, line
from vm_magic.chat import notebook_context
from vm_magic.chat.notebook_context import MAX_CONTEXT, WHY, own_code
from vm_magic.state.cell_record import MAX_CELLS, MAX_OUTPUTS, MAX_TEXT, OutputText, recorder_of
from vm_magic.state.error_text import LONGEST, error_text


def run(shell: Any, code: str) -> None:
    shell.run_cell(code, store_history=True)


def sent(loaded: fakes.FakeLLM) -> str:
    """The latest message."""
    text: str = loaded.prompts[-1]
    return text.rpartition("<user>")[2].removesuffix("<assistant>")


def test_the_last_cells_go_along_with_what_they_put_out(shell: Any, loaded: fakes.FakeLLM) -> None:
    run(shell, "early = 1")
    run(shell, "import sys\nprint('said')\nprint('warned', file=sys.stderr)\n6 * 7")
    run(shell, "%vllm_metal set temperature=0.5\nx = 2")
    cell(shell, "chat", "between")
    cell(shell, "chat --new --cells 2", "Why?")
    text = sent(loaded)
    assert text.endswith("### Question\n\nWhy?")
    assert "early" not in text
    assert "between" not in text
    assert "set temperature" not in text
    assert "```python\nx = 2\n```" in text
    assert "Output:\n\n```\nsaid\n(stderr) warned\n42\n```" in text
    assert text.index("print('said')") < text.index("x = 2")


def test_nothing_goes_along_unasked(shell: Any, loaded: fakes.FakeLLM) -> None:
    run(shell, "secret = 'swordfish'; print(secret)")
    run(shell, "1 / 0")
    cell(shell, "chat --new", "Hello")
    assert loaded.prompts[-1] == "<user>Hello<assistant>"


def test_cells_are_chosen_by_number_too_and_one_that_ran_again_counts_once(shell: Any, loaded: fakes.FakeLLM) -> None:
    for code in ("a = 1", "b = 2", "a = 1", "c = 3"):
        run(shell, code)
    first = shell.execution_count - 4
    cell(shell, f"chat --new --cells {first}-{first + 1},{first + 3}", "?")
    assert [f"### In [{first + i}]" in sent(loaded) for i in range(4)] == [True, True, False, True]
    cell(shell, "chat --new --cells 3", "?")
    assert sent(loaded).count("a = 1") == 1
    assert "b = 2" in sent(loaded)


def test_wrong_choices_and_empty_ones_are_one_line(shell: Any, loaded: fakes.FakeLLM) -> None:
    for wrong in ("x", "0", "5-3", "1-", str(MAX_CELLS + 1), "1-999", "²", "9" * 5000, f"1-{'9' * 5000}"):
        with pytest.raises(UsageError, match=r"--cells: .*(?:from 1 to|neither how many)"):
            cell(shell, f"chat --cells {wrong}", "?")
    with pytest.raises(RequestError, match=r"--cells 900-901: no such cell has run"):
        cell(shell, "chat --cells 900-901", "?")
    run(shell, "x = 1")
    with pytest.raises(RequestError, match="no message"):
        cell(shell, "chat --cells 1")


def test_the_last_error_goes_along_with_the_code_around_it(shell: Any, loaded: fakes.FakeLLM) -> None:
    run(shell, "def part(n):\n    # of the whole\n    return 1 / n")
    run(shell, "import json\nsecret = 'swordfish'\npart(0)")
    cell(shell, "chat --new --error")
    text = sent(loaded)
    assert "ZeroDivisionError: division by zero" in text
    assert f"In [{shell.execution_count - 2}], line 3:" in text
    assert "> 3 |     return 1 / n" in text
    assert "  2 |     # of the whole" in text
    assert text.endswith(WHY)
    run(shell, "fine = True")
    cell(shell, "chat --new --error", "Mend it.")
    assert "ZeroDivisionError" in sent(loaded)
    assert sent(loaded).endswith("### Question\n\nMend it.")
    assert "ZeroDivisionError" in line(shell, "chat --new --error").messages[0]["content"]


def test_causes_libraries_recursion_and_syntax_are_told_in_short(shell: Any, loaded: fakes.FakeLLM) -> None:
    run(
        shell,
        "import json\ntry:\n    json.loads('{')\nexcept ValueError as error:\n    raise KeyError('outer') from error",
    )
    cell(shell, "chat --new --error")
    text = sent(loaded)
    assert "JSONDecodeError" in text
    assert "in json/decoder.py, line" in text
    assert "(through 2 more)" in text
    assert text.index("which was the direct cause of:") < text.index("KeyError: 'outer'")
    run(shell, "def down(n):\n    return down(n - 1) if n else 1 / n\ndown(20)")
    cell(shell, "chat --new --error")
    assert "in down (21 times in a row):" in sent(loaded)
    assert sent(loaded).count("return down") == 2
    run(shell, "x = 1\nfor i in range(3)\n    pass")
    cell(shell, "chat --new --error")
    assert "SyntaxError: expected ':'" in sent(loaded)
    assert "> 2 | for i in range(3)" in sent(loaded)


def test_errors_of_the_magics_are_not_the_last_error(shell: Any, loaded: fakes.FakeLLM) -> None:
    sys.last_value = None  # type: ignore[assignment]
    with pytest.raises(RequestError, match="no cell has failed yet"):
        cell(shell, "chat --error")
    run(shell, "1 / 0")
    run(shell, "%vllm_metal set temprature=1")
    cell(shell, "chat --new --error")
    assert "ZeroDivisionError" in sent(loaded)


def test_an_error_of_before_the_extension_was_loaded_is_found(shell: Any, loaded: fakes.FakeLLM) -> None:
    run(shell, "%unload_ext vm_magic")
    run(shell, "{}['k']")
    run(shell, "%load_ext vm_magic")
    line(shell, "load smollm2")
    cell(shell, "chat --error")
    assert "KeyError: 'k'" in sent(fakes.MADE[-1])


def test_no_frame_is_kept_alive(shell: Any, loaded: fakes.FakeLLM) -> None:
    class Big:
        pass

    big = Big()
    gone = weakref.ref(big)
    shell.user_ns["take"] = lambda value: value.missing
    shell.user_ns["big"] = big
    run(shell, "take(big)")
    del big
    run(shell, "del big")
    run(shell, "other_error")  # IPython itself keeps the latest traceback
    gc.collect()
    assert gone() is None


def test_calls_of_our_magics_are_never_sent_with_what_they_say(shell: Any, loaded: fakes.FakeLLM) -> None:
    run(shell, "y = 1\n%vllm_metal set stop=SECRET\nz = 1 / 0")
    cell(shell, "chat --new --error --cells 1")
    assert "SECRET" not in sent(loaded)
    assert "%vllm_metal …" in sent(loaded)
    run(shell, "quoted = get_ipython().history_manager.input_hist_parsed[1]\nprint(quoted)")  # as tracebacks have it
    cell(shell, "chat --new --cells 1", "?")
    assert "%vllm_metal …" in sent(loaded).partition("Output:")[2]
    assert "SECRET" not in sent(loaded)
    run(shell, "%vllm_metal status\nprint('after')")
    cell(shell, "chat --new --cells 1", "?")
    assert sent(loaded).partition("Output:")[2].startswith("\n\n```\nafter\n```")
    assert own_code("a = %vllm_metal chat hi \\\n  more\nb = 1\n", "") == "b = 1"
    for ours in (
        "%time %vllm_metal serve --api-key swordfish",
        "%%time\n%%vllm_metal serve\nvllm serve m --api-key swordfish",
        "x = 1; get_ipython().run_line_magic('vllm_metal', 'serve --api-key swordfish')",
        "get_ipython().magic('vllm_metal serve --api-key swordfish')",
    ):
        assert "swordfish" not in own_code(ours, ours)
    assert own_code("hello there\n", "get_ipython().run_cell_magic('chat', '', 'hello there')") == ""


def test_what_is_kept_and_sent_is_bounded(shell: Any, loaded: fakes.FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    run(shell, "for i in range(20000): print('line', i)")
    run(shell, "from IPython.display import display\nfor i in range(100): display(i)")
    run(shell, f"text = {'x' * 20_000!r}; print(text)")
    recorder = recorder_of(shell)
    assert recorder is not None
    kept = [one for record in recorder._records.values() for one in record.outputs]
    assert max(len(one.text) for one in kept) <= MAX_TEXT + 100
    assert max(len(record.outputs) for record in recorder._records.values()) <= MAX_OUTPUTS
    monkeypatch.setattr(notebook_context, "context_limit", lambda _: MAX_CONTEXT)
    cell(shell, "chat --new --cells 3", "?")
    assert "line 0\n" in sent(loaded)
    assert "line 19999" in sent(loaded)
    assert "80 more outputs" in sent(loaded)
    assert len(sent(loaded)) < MAX_CONTEXT + 1000
    for i in range(MAX_CELLS + 10):
        run(shell, f"print({i})")
    assert len(recorder._records) == MAX_CELLS


def test_a_short_context_gets_the_latest_cells(shell: Any, loaded: fakes.FakeLLM) -> None:
    for i in range(5):
        run(shell, f"value_{i} = '{'y' * 900}'")
    cell(shell, "chat --new --cells 5", "?")
    assert "value_4" in sent(loaded)
    assert "value_0" not in sent(loaded)
    assert "earlier cells are left out" in sent(loaded)
    assert len(sent(loaded)) < 2 * notebook_context._LEAST_CONTEXT


def test_a_growing_text_keeps_its_beginning_and_its_end() -> None:
    text = OutputText()
    for i in range(5000):
        text.add(f"{i}\n")
    assert text.text().startswith("0\n1\n")
    assert text.text().endswith("4999\n")
    assert "characters left out" in text.text()


def test_progress_bars_colours_pictures_and_cleared_outputs_are_what_a_reader_sees(
    shell: Any, loaded: fakes.FakeLLM
) -> None:
    run(
        shell,
        "from IPython.display import HTML, Image, Markdown, clear_output, display\nprint('gone')\nclear_output()\n"
        "for i in range(3): print(f'\\r{i}0%', end='')\nprint('\\n\\x1b[31mred\\x1b[0m')\n"
        "display(HTML('<b>page</b>'))\ndisplay(Markdown('**text**'))\ndisplay(Image(data=b'x' * 99, format='png'))",
    )
    cell(shell, "chat --new --cells 1", "?")
    output = sent(loaded).partition("Output:")[2]
    assert "\n20%\nred\n(a page of HTML, 11 characters)\n**text**\n(a picture, image/png" in output
    assert "gone" not in output


def test_fences_are_longer_than_any_inside(shell: Any, loaded: fakes.FakeLLM) -> None:
    run(shell, "text = '''\n````\n'''\nprint(text)")
    cell(shell, "chat --new --cells 1", "?")
    assert "`````python" in sent(loaded)
    assert "Output:\n\n`````\n" in sent(loaded)


def test_captures_and_nested_runs_are_left_alone(shell: Any, loaded: fakes.FakeLLM, capsys: Capture) -> None:
    run(shell, "%%capture kept\nprint('inside')")
    assert shell.user_ns["kept"].stdout == "inside\n"
    run(shell, "get_ipython().run_cell('print(1)'); print('outer')")
    run(
        shell,
        "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()): print('redirected')\nprint('shown')",
    )
    cell(shell, "chat --new --cells 3", "?")
    outputs = "".join(part.partition("### ")[0] for part in sent(loaded).split("Output:")[1:])
    assert "inside" not in outputs
    assert "1\nouter" in outputs
    assert "elsewhere" not in outputs
    assert "shown" in outputs


def test_unloading_takes_every_hook_away(shell: Any) -> None:
    run(shell, "print('x')\n%unload_ext vm_magic\nprint('y')")
    assert recorder_of(shell) is None
    for event in ("pre_run_cell", "post_run_cell"):
        assert [one for one in shell.events.callbacks[event] if "vm_magic" in one.__module__] == []
    for place in (sys.stdout, sys.stderr, shell.display_pub, shell.displayhook):
        own = getattr(place, "__dict__", {})
        assert [name for name, one in own.items() if "vm_magic" in str(getattr(one, "__module__", ""))] == []
    transforms = shell.input_transformer_manager.cleanup_transforms
    assert [one for one in transforms if "vm_magic" in one.__module__] == []


def test_a_cell_without_a_body_reaches_the_magic_and_a_terminal_still_waits_for_one(
    shell: Any, loaded: fakes.FakeLLM
) -> None:
    run(shell, "1 / 0")
    shell.run_cell("%%chat --error", store_history=True).raise_error()
    assert "ZeroDivisionError" in sent(loaded)
    with pytest.raises(RequestError, match="no message"):
        shell.run_cell("%%chat", store_history=True).raise_error()
    assert shell.check_complete("%%chat --error")[0] == "incomplete"
    assert shell.check_complete("%%chat\nhello\n\n")[0] == "complete"
    assert "pinfo" in shell.transform_cell("%%chat?")


def test_what_went_along_is_told(shell: Any, loaded: fakes.FakeLLM) -> None:
    for i in range(4):
        run(shell, f"x = {i}")
    last = shell.execution_count - 1
    cell(shell, "chat --new --cells 4", "?")
    title = shell.display_pub.outputs[0]["data"]["text/plain"]
    assert title.startswith(f"sent with: In [{last - 3}] – In [{last}] · ")
    shell.display_pub.outputs.clear()
    run(shell, "1 / 0")
    cell(shell, "chat --new --cells 1 --error", "?")
    assert shell.display_pub.outputs[0]["data"]["text/plain"].startswith(f"sent with: In [{last + 2}], the last error")


def test_of_a_long_chain_of_errors_the_last_ones_are_told(shell: Any) -> None:
    error: BaseException | None = None
    for number in range(900):
        made = ValueError(f"number {number}")
        made.__context__, error = error, made
    assert error is not None
    text = error_text(error, shell)
    assert text.startswith("(895 errors before these are left out.)")
    assert text.endswith("ValueError: number 899")
    long = KeyError("x" * 9000)
    long.__context__ = error
    middle = error_text(long, shell)
    assert len(middle) < LONGEST * 1.1
    assert middle.index("number 899") < middle.index("KeyError")


def test_an_error_that_ipython_cannot_print_leaves_no_hook_behind(shell: Any, loaded: fakes.FakeLLM) -> None:
    class UntoldError(Exception):
        def __str__(self) -> str:
            raise ValueError("no text")

    shell.user_ns["UntoldError"] = UntoldError
    for _ in range(3):
        run(shell, "raise UntoldError")
    recorder = recorder_of(shell)
    assert recorder is not None
    assert not recorder.running
    run(shell, "get_ipython().run_cell('print(1)', store_history=True)\nprint(2)")
    assert not vars(shell.display_pub).keys() & {"publish", "clear_output"}
    shell.events.trigger("pre_run_cell", None)  # by somebody else
    assert not recorder.running


def test_keys_in_use_are_never_sent(shell: Any, loaded: fakes.FakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "swordfish")
    line(shell, "serve --api-key sk-the-ports-own")
    run(shell, "import os, vm_magic\nprint(os.environ['VLLM_API_KEY'])\n'sk-the-ports-own'")
    run(shell, "command = 'vllm serve m --api-key abc'\nraise ValueError('swordfish')")
    cell(shell, "chat --new --error --cells 2", "?")
    assert "•••" in sent(loaded)
    assert not any(key in sent(loaded) for key in ("swordfish", "sk-the-ports-own", "abc"))
