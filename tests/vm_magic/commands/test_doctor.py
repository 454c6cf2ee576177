"""``%vllm_metal doctor``: with a model and without, with broken packages; and what its report leaves out."""

import logging
import os
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.checkup import device_probe, doctor
from engine.checkup.device_probe import Probe
from engine.checkup.findings import Examination
from tests.vm_magic.helpers import Capture, line
from vm_magic.commands.front_end_check import check_widgets, log_facts
from vm_magic.show.doctor_view import examination_html

ROOT = Path(__file__).resolve().parents[3]
CPU = Probe("cpu", "a processor", 16 << 30, 8 << 30, "CPU: OpenBLAS 0.3")
SECRETS = {
    "key": "sk-planted0123456789abcdef",
    "variable": "planted-token-77",
    "user": "plantedann",
    "host": "plantedbox",
    "folder": "planted-project",
    "model": "planted-model",
    "served": "planted-alias",
    "prompt": "planted-question",
    "log": "planted-log-words",
    "proxy": "planted-proxy-pass",
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX's answer without a process for it."""
    monkeypatch.setattr(doctor, "ask_device", lambda: CPU)


def kinds(found: Examination) -> dict[str, str]:
    return {f"{finding.area}/{finding.name}": finding.state for finding in found.findings}


def test_without_a_model_every_area_is_looked_at(shell: Any) -> None:
    found = line(shell, "doctor")
    areas = {finding.area for finding in found.findings}
    assert areas >= {"installation", "device", "kernels", "memory", "model cache", "environment", "port", "front end"}
    assert kinds(found)["device/MLX"] == "ok"
    assert str(found).splitlines()[0] == found.title


@pytest.mark.usefixtures("asked")
def test_with_a_model_that_writes_its_port_and_requests_are_told(
    engine_shell: Any, tiny_model_dir: Callable[..., Path], capsys: Capture
) -> None:
    import vm_magic

    line(engine_shell, f"load {tiny_model_dir('llama')} --max-model-len 4096 --gpu-memory-utilization 0.2")
    line(engine_shell, "serve --port 0")
    llm = vm_magic.current()
    stream = llm.submit_prompt("x", llm.sampling_params(max_tokens=4000, ignore_eos=True))
    next(iter(stream))
    found = line(engine_shell, "doctor")
    stream.abort()
    assert found.ok, str(found)
    lines = {finding.name: finding.text for finding in found.findings}
    assert "(folder, llama): 1 running, 0 waiting" in lines["engine"]
    assert "answers with its key" in lines["server"]
    llm.close()
    assert kinds(line(engine_shell, "doctor"))["model/engine"] == "problem"


@pytest.mark.usefixtures("asked")
def test_what_is_wrong_stands_first_with_what_to_do_and_texts_are_no_markup(shell: Any) -> None:
    found = line(shell, "doctor")
    assert "things that are well" not in examination_html(found)
    from engine.checkup.findings import Finding

    more = found.with_more([Finding("port", "<b>server</b>", "<script>", "problem", "do <this>")])
    html = examination_html(more)
    assert html.index("1 problem") < html.index("&lt;script&gt;") < html.index("things that are well")
    assert "<script>" not in html
    assert "do &lt;this&gt;" in html
    assert shell.display_formatter.format(found)[0]["text/html"] == examination_html(found)


def test_a_report_has_nothing_of_who_sends_it(
    engine_shell: Any, tiny_model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.model_card import privacy as card_privacy

    secret = SECRETS
    home = tmp_path / secret["user"]
    folder = home / secret["folder"] / secret["model"]
    folder.parent.mkdir(parents=True)
    folder.symlink_to(tiny_model_dir("llama"))
    for name, value in {
        "HOME": str(home),
        "HF_HOME": str(home / secret["folder"]),
        "HF_TOKEN": secret["variable"],
        "MY_SECRET_PASSWORD": f"{secret['variable']}-too",
        "VLLM_METAL_ATTENTION_BACKEND": "auto",
        "http_proxy": f"http://{secret['user']}:{secret['proxy']}@{secret['host']}:3128",
        "JPY_SESSION_NAME": f"/{secret['folder']}/n.ipynb",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("socket.gethostname", lambda: f"{secret['host']}.example.org")
    monkeypatch.setattr("engine.checkup.privacy.user_name", lambda: secret["user"])
    monkeypatch.setattr(card_privacy, "user_name", lambda: secret["user"])
    line(engine_shell, f"load '{folder}' --served-model-name {secret['served']} --max-model-len 64")
    line(engine_shell, f"serve --port 0 --api-key {secret['key']}")
    line(engine_shell, f"chat --max-tokens 2 {secret['prompt']}")
    logging.getLogger("engine").error("%s of %s in %s: ValueError", secret["log"], secret["user"], folder)
    found = line(engine_shell, "doctor")
    assert any(value in str(found) for value in secret.values()), "the screen may say more"
    text = str(line(engine_shell, "doctor --report"))
    assert [name for name, value in secret.items() if value in text or value in str(found.to_dict())] == []
    assert str(tmp_path) not in text
    assert "ERROR engine ValueError ×1" in text
    assert "folder, llama" in text
    assert "HTTP_PROXY set" in text
    assert "versions  docstring-parser" in text


def test_words_of_the_log_stay_here_but_for_kinds_of_errors() -> None:
    lines = [
        "12:00:00 ERROR engine: the model failed: RuntimeError: PlantedNameError",
        "12:00:01 WARNING engine.openai: The following fields were present: {'planted'}",
        "12:00:02 INFO engine: planted",
        "planted",
    ]
    assert log_facts(lines) == [
        ("log", "ERROR engine RuntimeError ×1, WARNING engine.openai ×1 (%vllm_metal logs has the words)")
    ]


BROKEN = """
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.extension_manager.load_extension("vm_magic")
print(shell.run_line_magic("vllm_metal", "doctor"))
"""


def test_it_works_where_mlx_cannot_be_imported(tmp_path: Path) -> None:
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "__init__.py").write_text("raise ImportError('broken for a test')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "IPYTHONDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", BROKEN], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert "ImportError: broken for a test" in done.stdout
    assert "pip install --force-reinstall 'mlx[" in done.stdout
    assert f"{tmp_path / 'mlx'} is taken for the package mlx" in done.stdout


def test_it_says_that_engine_is_hidden_where_no_other_command_runs(
    shell: Any, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    hidden = types.ModuleType("engine")
    hidden.__file__ = "/srv/ann/engine.py"
    monkeypatch.setitem(sys.modules, "engine", hidden)
    assert line(shell, "doctor") is None
    said = capsys.readouterr().out
    assert said.startswith("problem: /srv/ann/engine.py is imported as `engine`")
    assert "rename that file" in said
    line(shell, "doctor --report")
    assert "ann" not in capsys.readouterr().out


def test_widgets_of_two_generations_and_a_kernel_without_comms_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"ipywidgets": "8.1.5", "jupyterlab_widgets": "1.1.0", "widgetsnbextension": "4.0.1"}
    monkeypatch.setattr("vm_magic.commands.front_end_check.installed", versions.get)
    in_kernel = types.SimpleNamespace(kernel=object())

    def state() -> tuple[str, str]:
        (finding,) = check_widgets(in_kernel)
        return finding.state, finding.text

    assert state() == ("problem", "jupyterlab_widgets 1.1.0 does not go with ipywidgets 8.1.5")
    versions["jupyterlab_widgets"] = "3.0.13"
    assert state() == ("problem", "ipywidgets 8.1.5, but this kernel has no comms to a page")
    monkeypatch.setattr("vm_magic.commands.front_end_check._has_comms", lambda: True)
    assert state()[0] == "ok"
    del versions["ipywidgets"]
    assert state()[0] == "warning"


@pytest.mark.usefixtures("asked")
def test_an_engine_that_stands_still_does_not_hold_it_up(
    engine_shell: Any, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import vm_magic

    line(engine_shell, f"load {tiny_model_dir('llama')} --max-model-len 64 --gpu-memory-utilization 0.2")
    release = threading.Event()
    vm_magic.current()._thread.post(lambda _: release.wait(60))
    monkeypatch.setattr(device_probe, "PATIENCE", 1)
    found = line(engine_shell, "doctor")
    release.set()
    assert kinds(found)["model/engine"] == "ok"
