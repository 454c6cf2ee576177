"""The port as it is shown after ``serve``: whole, and without its key."""

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from engine.openai.server import ServerHandle
from tests.vm_magic.helpers import Capture, line
from vm_magic.show.server_view import server_html, server_text


@pytest.fixture
def shell_with_model(engine_shell: Any, tiny_model_dir: Any, capsys: Capture) -> Iterator[Any]:
    line(engine_shell, f"load {tiny_model_dir('llama')} --max-model-len 256 --served-model-name '<b>tiny</b>'")
    capsys.readouterr()
    yield engine_shell
    line(engine_shell, "unload")


def forms(shell: Any, server: ServerHandle) -> dict[str, str]:
    shell.display_formatter.active_types = ["text/plain", "text/html"]
    bundle: dict[str, str] = shell.display_formatter.format(server)[0]
    return bundle


def test_address_key_and_clients_are_said_in_a_line_each_and_the_key_is_not(shell_with_model: Any) -> None:
    shell = shell_with_model
    server = line(shell, "serve --port 0 --api-key s3cret-key")
    shown = forms(shell, server)
    assert shown["text/plain"].splitlines() == [
        "<b>tiny</b> is served",
        f"  address  {server.base_url}",
        "  key      import vm_magic; vm_magic.current().server.api_key  (or the panel, Server)",
        "  client   %vllm_metal export --client openai --show-key  (--client curl, anthropic, codex or llm)",
    ]
    assert server.base_url in shown["text/html"]
    assert "<b>tiny" not in shown["text/html"]
    assert "s3cret" not in str(shown)
    shell.run_cell("import vm_magic; said = vm_magic.current().server.api_key")
    assert shell.user_ns["said"] == "s3cret-key"
    assert f"{server.base_url} (%vllm_metal export --show-key shows the key)" in repr(line(shell, "status"))
    assert "s3cret-key" in str(line(shell, "export --show-key"))
    assert "s3cret-key" in str(line(shell, "export --client openai --show-key"))


def test_an_open_port_and_a_closed_one_say_so(shell_with_model: Any) -> None:
    server = line(shell_with_model, "serve --port 0 --no-api-key")
    assert "key      none is asked for" in server_text(server)
    assert "(no key)" in repr(line(shell_with_model, "status"))
    server.stop()
    assert server_text(server) == repr(server)
    assert "closed" in server_html(server)


def test_a_port_that_moved_says_why(shell_with_model: Any, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr("engine.openai.http.options.DEFAULT_PORT", port)
        server = line(shell_with_model, "serve")
    why = f"port {port} is in use by another program (or another notebook), so {server.port}"
    assert server.port > port
    assert capsys.readouterr().out.splitlines()[-1] == why
    assert why not in server_text(server), "it is said once, above"
    assert line(shell_with_model, "serve") is server
    assert why not in capsys.readouterr().out
