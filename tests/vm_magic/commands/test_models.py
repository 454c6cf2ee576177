"""Loading, serving, stopping and unloading through the magics, with a scripted model."""

import os
import socket
import sys
from typing import Any

import pytest

import vm_magic
from engine.errors import ConfigError, EngineClosedError, ModelNotFoundError, ServerError
from tests.vm_magic import fakes
from tests.vm_magic.helpers import Capture, cell, line, shown
from vm_magic.show.progress import LoadProgress


def test_load_returns_none_and_prints_the_plan_and_what_was_chosen(shell: Any, capsys: Capture) -> None:
    assert line(shell, "load smollm2 --max-model-len 1K") is None
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "Room for 2,048 tokens of conversation (46.2 GB, taken as needed; 146.0 MB in use)"
    assert "float32" in printed[1]
    assert printed[-1] == f"log line: {fakes.MADE[-1].plan.log_line()}"
    assert "145.0 MB loaded in" in shown(shell)["text/plain"]
    assert vm_magic.current() is fakes.MADE[-1]
    assert fakes.MADE[-1].args.max_model_len == 1024


def test_other_programs_on_the_machine_are_told_of(
    shell: Any, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fakes, "OTHERS", ["Another notebook plans"])
    line(shell, "load smollm2")
    assert capsys.readouterr().out.splitlines()[1] == "Another notebook plans"
    line(shell, "serve smollm2 --port 0")
    assert capsys.readouterr().out == "Another notebook plans\n"
    line(shell, "plan")
    assert capsys.readouterr().out == "Another notebook plans\n"
    assert "  other programs  Another notebook plans" in repr(line(shell, "status"))
    line(shell, "plan org/m")
    assert capsys.readouterr().out == "", "a plan of another kind is no plan of this machine's memory"


def test_the_same_load_again_is_a_no_op(shell: Any, loaded: fakes.FakeLLM, capsys: Capture) -> None:
    line(shell, "load smollm2")
    assert vm_magic.current() is loaded
    assert "loaded already" in capsys.readouterr().out


def test_loading_another_model_frees_the_first(shell: Any, loaded: fakes.FakeLLM) -> None:
    line(shell, "load other --seed 3")
    assert loaded.closed
    assert fakes.MADE[-1].args.model == "other"


def test_another_attention_backend_is_another_load(shell: Any, loaded: fakes.FakeLLM, capsys: Capture) -> None:
    line(shell, "load smollm2 --attention-backend auto")
    assert vm_magic.current() is loaded
    line(shell, "load smollm2 --attention-backend reference")
    assert loaded.closed
    assert fakes.MADE[-1].args.attention_backend == "reference"
    pasted = "VLLM_METAL_ATTENTION_BACKEND=reference vllm serve smollm2 --port 0"
    cell(shell, "vllm_metal serve", pasted)
    assert vm_magic.current() is fakes.MADE[-1]
    assert "loaded already" in capsys.readouterr().out
    cell(shell, "vllm_metal serve", pasted.replace("=reference", "=auto"))
    assert fakes.MADE[-1].args.attention_backend == "auto"


def test_a_wrong_flag_leaves_the_loaded_model_alone(shell: Any, loaded: fakes.FakeLLM) -> None:
    with pytest.raises(ConfigError, match="max-model-len"):
        line(shell, "load other --max-model-len banana")
    assert vm_magic.current() is loaded


def test_a_missing_model_leaves_nothing_half_loaded(shell: Any) -> None:
    with pytest.raises(ModelNotFoundError, match="fetches one"):
        line(shell, "load missing")
    assert vm_magic.current() is None
    assert shown(shell)["text/plain"] == "missing: not loaded"


def test_a_missing_model_does_not_cost_the_loaded_one(shell: Any, loaded: fakes.FakeLLM) -> None:
    with pytest.raises(ModelNotFoundError, match="fetches one"):
        line(shell, "load missing")
    assert vm_magic.current() is loaded


def test_a_load_interrupted_before_the_other_model_is_let_go_says_that_it_stays(
    shell: Any, loaded: fakes.FakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    show = LoadProgress.open

    def interrupted(bar: LoadProgress) -> None:
        show(bar)
        raise KeyboardInterrupt

    monkeypatch.setattr(LoadProgress, "open", interrupted)
    with pytest.raises(KeyboardInterrupt, match="loading stopped; smollm2 is loaded"):
        line(shell, "load other")
    assert shown(shell)["text/plain"] == "other: not loaded"
    assert vm_magic.current() is loaded


def test_serve_loads_and_gives_a_handle_whose_key_is_not_shown(shell: Any) -> None:
    handle = line(shell, "serve smollm2 --port 0 --api-key s3cret")
    assert handle.base_url.endswith("/v1")
    assert (handle.api_key, handle.port) == ("s3cret", 54321)
    assert "s3cret" not in repr(handle)
    assert "s3cret" not in repr(line(shell, "status"))
    assert handle.base_url in repr(line(shell, "status"))


def test_the_same_serve_again_gives_the_same_handle(shell: Any) -> None:
    handle = line(shell, "serve smollm2")
    assert line(shell, "serve smollm2") is handle
    assert line(shell, "serve") is handle


def test_serve_asks_for_8000_or_the_next_free_port_unless_told(shell: Any) -> None:
    assert line(shell, "serve smollm2").port == 8000
    assert fakes.MADE[-1].server is not None
    assert fakes.MADE[-1].server.options == {"port_is_default": True}
    assert line(shell, "serve --port 8123").port == 8123
    assert fakes.MADE[-1].server.options == {}


def test_other_server_flags_open_the_port_anew_with_the_same_model(shell: Any, loaded: fakes.FakeLLM) -> None:
    first = line(shell, "serve --port 8100")
    second = line(shell, "serve --port 8101 --no-api-key --allowed-origins '[\"*\"]'")
    assert (first.port, second.port, second.api_key) == (8100, 8101, None)
    assert vm_magic.current() is loaded
    assert loaded.server is not None
    assert loaded.server.options == {"allowed_origins": ["*"]}


def test_serve_without_engine_flags_takes_the_model_as_it_is(shell: Any) -> None:
    line(shell, "load smollm2 --max-model-len 1K")
    llm = vm_magic.current()
    line(shell, "serve smollm2 --port 0")
    assert vm_magic.current() is llm


def test_serve_needs_a_model_name_when_nothing_is_loaded(shell: Any) -> None:
    with pytest.raises(ConfigError, match="serve smollm2"):
        line(shell, "serve")


def test_stop_closes_the_port_and_keeps_the_model(shell: Any, loaded: fakes.FakeLLM, capsys: Capture) -> None:
    line(shell, "serve")
    line(shell, "stop")
    assert loaded.server is None
    assert not loaded.servers[0].running
    assert not loaded.closed
    line(shell, "stop")
    assert "no port is open" in capsys.readouterr().out


def test_the_handle_itself_can_stop_and_serve_opens_anew(shell: Any, loaded: fakes.FakeLLM) -> None:
    first = line(shell, "serve --port 0")
    first.stop()
    first.stop()
    assert line(shell, "serve --port 0") is not first
    assert loaded.server is not None
    assert loaded.server.running


def test_status_knows_that_the_handle_stopped(shell: Any, loaded: fakes.FakeLLM) -> None:
    handle = line(shell, "serve --port 0")
    assert handle is loaded.server
    handle.stop()
    assert "closed; %vllm_metal serve opens it" in repr(line(shell, "status"))


def test_a_serve_that_cannot_be_leaves_model_and_port_alone(shell: Any, loaded: fakes.FakeLLM) -> None:
    handle = line(shell, "serve --port 0")
    with pytest.raises(ConfigError, match="--no-api-key with --host"):
        line(shell, "serve another --no-api-key --host 0.0.0.0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ServerError, match="is in use"):
            line(shell, f"serve another --port {taken.getsockname()[1]}")
    assert vm_magic.current() is loaded
    assert handle.running


def test_loading_another_model_says_that_the_port_closed(shell: Any, loaded: fakes.FakeLLM, capsys: Capture) -> None:
    line(shell, "serve smollm2 --port 0")
    capsys.readouterr()
    line(shell, "load smollm2")
    assert "the port closed" not in capsys.readouterr().out
    line(shell, "load smollm2 --max-model-len 1024")
    assert "the port closed with the model before; %vllm_metal serve" in capsys.readouterr().out


def test_unload_says_bytes_before_and_after(shell: Any, loaded: fakes.FakeLLM, capsys: Capture) -> None:
    line(shell, "unload")
    assert loaded.closed
    assert vm_magic.current() is None
    assert "before" in (printed := capsys.readouterr().out)
    assert "1.0 MB after" in printed
    line(shell, "unload")
    assert "nothing is loaded" in capsys.readouterr().out


def test_unload_lets_go_of_out_and_of_the_last_traceback(shell: Any, loaded: fakes.FakeLLM) -> None:
    Array = type("Array", (), {"__module__": "mlx.core"})  # noqa: N806 - stands for a class
    shell.user_ns["Array"] = Array
    shell.run_cell("Array()", store_history=True)
    shell.run_cell("[1, Array()]", store_history=True)
    shell.run_cell("'kept'", store_history=True)
    shell.run_cell("1 / 0", store_history=True)
    assert sys.last_value is not None
    line(shell, "unload")
    assert list(shell.user_ns["_oh"].values()) == ["kept"]
    assert not hasattr(sys, "last_value")
    assert not isinstance(shell.displayhook.__, Array)


def test_unload_copes_with_an_out_that_holds_itself(shell: Any, loaded: fakes.FakeLLM) -> None:
    shell.run_cell("Out", store_history=True)
    shell.run_cell("'kept', Out", store_history=True)
    line(shell, "unload")
    assert "kept" in str(shell.user_ns["_oh"])


def test_a_model_closed_behind_our_back_is_said_and_loads_again(shell: Any, loaded: fakes.FakeLLM) -> None:
    loaded.close()
    assert vm_magic.current() is None
    with pytest.raises(EngineClosedError, match="%vllm_metal load smollm2 loads it again"):
        line(shell, "chat hi")
    line(shell, "load smollm2")
    assert vm_magic.current() is fakes.MADE[-1] is not loaded


def test_pasted_shell_text_serves(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_METAL_MEMORY_FRACTION", raising=False)
    body = "# as documented\nexport VLLM_METAL_MEMORY_FRACTION=0.5\nvllm serve smollm2 \\\n  --port 0 --api-key k"
    handle = cell(shell, "vllm_metal serve", body)
    assert handle.api_key == "k"
    assert fakes.MADE[-1].args.memory_fraction == 0.5
    assert "VLLM_METAL_MEMORY_FRACTION" not in os.environ
    assert cell(shell, "vllm_metal serve", body) is handle


def test_flags_on_the_magics_line_come_after_the_pasted_ones(shell: Any) -> None:
    assert cell(shell, "vllm_metal serve --port 8123", "vllm serve smollm2 --port 8001").port == 8123


def test_pasted_text_without_a_serve_line_is_refused(shell: Any) -> None:
    with pytest.raises(ConfigError, match="no vllm serve line"):
        cell(shell, "vllm_metal serve", "export A=1")


def test_plan_loads_nothing_and_takes_the_flags(shell: Any) -> None:
    plan = line(shell, "plan org/m --max-model-len 32K --gpu-memory-utilization 0.75 --device-memory 51.54GB")
    assert plan.model == "org/m"
    assert plan.options == {
        "max_model_len": "32K",
        "gpu_memory_utilization": "0.75",
        "device_memory": "51.54GB",
    }
    assert vm_magic.current() is None


def test_plan_without_a_model_is_the_plan_in_force(shell: Any, loaded: fakes.FakeLLM) -> None:
    assert line(shell, "plan") is loaded.plan
