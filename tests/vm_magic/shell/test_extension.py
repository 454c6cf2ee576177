"""Loading, reloading and unloading the extension; what the import costs."""

import atexit
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from traitlets.config import Config

import vm_magic
from engine.openai.http.ring_log import RingLog
from tests.vm_magic import fakes
from tests.vm_magic.helpers import line
from vm_magic.state.session import current_session, peek_session

ROOT = Path(__file__).resolve().parents[3]


def traces(shell: Any) -> list[str]:
    """Everything of ours that a shell holds."""
    tables = shell.magics_manager.magics
    found = [f"{kind} {name}" for kind in tables for name in tables[kind] if name in ("vllm_metal", "chat")]
    found += [name for name in shell.magics_manager.registry if name == "VLLMMetal"]
    found += [type(c).__name__ for c in shell.configurables if type(c).__name__ == "VLLMMetal"]
    found += ["matcher" for m in shell.Completer.custom_matchers if "vm_magic" in m.__module__]
    transformers = shell.input_transformer_manager
    for kind in (transformers.line_transforms, transformers.cleanup_transforms):
        found += ["transform" for t in kind if "vm_magic" in t.__module__]
    found += ["callback" for c in shell.events.callbacks["post_run_cell"] if "vm_magic" in c.__module__]
    found += ["log" for h in logging.getLogger("engine").handlers if isinstance(h, RingLog)]
    for mime in ("text/plain", "text/html", "text/markdown"):
        makers = shell.display_formatter.formatters[mime].deferred_printers.values()
        found += [f"formatter of {mime}" for maker in makers if "vm_magic" in maker.__module__]
    return found


def test_unloading_leaves_nothing_behind(shell: Any) -> None:
    level = logging.getLogger("engine").level
    assert len(traces(shell)) == 47
    line(shell, "serve smollm2 --port 0")
    llm = fakes.MADE[-1]
    shell.run_line_magic("unload_ext", "vm_magic")
    assert traces(shell) == []
    assert llm.closed
    assert not any(server.running for server in llm.servers)
    assert peek_session() is None
    assert vm_magic.current() is None
    assert logging.getLogger("engine").level in (logging.NOTSET, level - level)


def test_unloading_and_loading_twice_is_safe(shell: Any) -> None:
    before = sorted(traces(shell))
    shell.run_line_magic("load_ext", "vm_magic")
    vm_magic.load_ipython_extension(shell)
    assert sorted(traces(shell)) == before
    vm_magic.unload_ipython_extension(shell)
    vm_magic.unload_ipython_extension(shell)
    assert traces(shell) == []
    vm_magic.load_ipython_extension(shell)
    assert sorted(traces(shell)) == before


def test_reloading_keeps_the_model_the_port_and_the_conversations(shell: Any) -> None:
    handle = line(shell, "serve smollm2 --port 0")
    line(shell, "chat hello")
    llm = vm_magic.current()
    before = sorted(traces(shell))
    shell.run_line_magic("reload_ext", "vm_magic")
    assert sorted(traces(shell)) == before
    assert vm_magic.current() is llm
    assert llm is not None
    assert not llm.closed
    assert line(shell, "serve smollm2 --port 0") is handle
    assert len(line(shell, "history").messages) == 2


def test_unloading_after_a_reload_still_frees_the_model(shell: Any) -> None:
    line(shell, "load smollm2")
    shell.run_line_magic("reload_ext", "vm_magic")
    shell.run_line_magic("unload_ext", "vm_magic")
    assert fakes.MADE[-1].closed


def test_a_value_that_config_refused_does_not_cost_the_magics(shell: Any, capsys: Any) -> None:
    before = sorted(traces(shell))
    for bad in ("temperature = -1", "short_errors = 'perhaps'", "preset = 'none such'"):
        shell.run_line_magic("config", f"VLLMMetal.{bad}")
    for command in ("reload_ext", "unload_ext", "load_ext", "reload_ext"):
        shell.run_line_magic(command, "vm_magic")
    assert sorted(traces(shell)) == before
    assert current_session().settings.everything() == {}
    assert "short_errors is left out" in capsys.readouterr().err


def test_a_bad_value_in_a_configuration_file_is_one_line_and_the_others_hold(shell: Any, capsys: Any) -> None:
    shell.run_line_magic("unload_ext", "vm_magic")
    shell.config.VLLMMetal = Config(temperature=-1, top_k=9)
    try:
        shell.run_line_magic("load_ext", "vm_magic")
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1
        assert told[0].startswith("VLLMMetal.temperature is left out: temperature must be non-negative")
        assert current_session().settings.everything() == {"top_k": 9}
    finally:
        shell.run_line_magic("unload_ext", "vm_magic")
        del shell.config["VLLMMetal"]


def test_unloading_takes_back_what_config_set_and_keeps_the_files(shell: Any) -> None:
    shell.run_line_magic("unload_ext", "vm_magic")
    shell.config.VLLMMetal = Config(temperature=0.4)
    try:
        shell.run_line_magic("load_ext", "vm_magic")
        shell.run_line_magic("config", "VLLMMetal.top_k = 7")
        shell.run_line_magic("config", "VLLMMetal.temperature = 0.9")
        shell.run_line_magic("config", "VLLMMetal.short_errors = False")
        line(shell, "set top_k=8")
        shell.run_line_magic("reload_ext", "vm_magic")
        assert current_session().settings.everything() == {"temperature": 0.9, "top_k": 8}
        assert shell.run_line_magic("config", "VLLMMetal.short_errors") is False
        shell.run_line_magic("unload_ext", "vm_magic")
        shell.run_line_magic("load_ext", "vm_magic")
        assert current_session().settings.everything() == {"temperature": 0.4}
        assert shell.run_line_magic("config", "VLLMMetal.short_errors") is True
    finally:
        shell.run_line_magic("unload_ext", "vm_magic")
        shell.config.pop("VLLMMetal", None)


def test_no_exit_hook_is_left(shell: Any, monkeypatch: Any) -> None:
    shell.run_line_magic("unload_ext", "vm_magic")
    added: list[Any] = []
    removed: list[Any] = []
    monkeypatch.setattr(atexit, "register", added.append)
    monkeypatch.setattr(atexit, "unregister", removed.append)
    shell.run_line_magic("load_ext", "vm_magic")
    shell.run_line_magic("unload_ext", "vm_magic")
    assert len(added) == 1
    assert removed == added
    monkeypatch.undo()  # the fixture takes its own hook away


def test_twenty_cycles_leave_memory_where_it_was(shell: Any) -> None:
    start = fakes.MEMORY["bytes"]
    for _ in range(20):
        line(shell, "load smollm2")
        line(shell, "unload")
    assert fakes.MEMORY["bytes"] == start


def test_a_chat_magic_of_somebody_else_is_left_alone(shell: Any) -> None:
    shell.run_line_magic("unload_ext", "vm_magic")

    def chat(line: str, cell: str) -> str:
        return "theirs"

    shell.register_magic_function(chat, "cell")
    shell.run_line_magic("load_ext", "vm_magic")
    assert shell.run_cell_magic("chat", "", "hi") == "theirs"
    shell.run_line_magic("unload_ext", "vm_magic")
    assert shell.run_cell_magic("chat", "", "hi") == "theirs"


def test_nothing_is_made_before_the_first_command(shell: Any) -> None:
    assert peek_session() is None
    assert vm_magic.current() is None
    assert current_session() is peek_session()


def run_python(code: str, **more: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


SHELL = """
import sys, time
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config
c = Config(); c.HistoryManager.enabled = False
shell = InteractiveShell.instance(config=c)
before = set(sys.modules); started = time.process_time()
shell.run_line_magic("load_ext", "vm_magic")
seconds = time.process_time() - started
"""


def test_loading_the_extension_imports_no_model_code() -> None:
    heavy = run_python(SHELL + "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))")
    for name in ("mlx", "mlx_lm", "transformers", "fastapi", "uvicorn", "tokenizers", "jinja2", "huggingface_hub"):
        assert f"'{name}'" not in heavy
    ours = run_python(SHELL + "print([m for m in sys.modules if m.startswith(('engine', 'vm_magic'))])")
    for name in ("engine.llm", "engine.params.engine_args", "vm_magic.commands", "vm_magic.state.session"):
        assert f"'{name}" not in ours  # the first command imports them


def test_loading_the_extension_takes_less_than_150_ms_and_says_nothing(tmp_path: Path) -> None:
    """Of processor time, with compiled modules as an installed package has them: the first run compiles."""
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    printed = [run_python(SHELL + "print(seconds)", **compiled) for _ in range(4)]
    assert min(float(text) for text in printed[1:]) < 0.150, printed  # a silent load: the number is all there is
