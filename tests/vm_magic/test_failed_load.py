"""A load that fails never costs the model that works: the real engine and port, and every way to fail."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import vm_magic
from engine.errors import ConfigError, MemoryPlanError, ModelLoadError, ModelNotFoundError, VMMagicError
from engine.llm import memory_in_use
from engine.runtime import builder
from tests.vm_magic.helpers import Capture, cell, line, shown
from vm_magic.show.errors import Interrupted

Loaded = tuple[Any, Any, Path]


@pytest.fixture
def other(tiny_model_dir: Any, tmp_path: Path) -> Path:
    """A folder with a model, to be broken."""
    return Path(shutil.copytree(tiny_model_dir("qwen3"), tmp_path / "other"))


@pytest.fixture
def loaded(engine_shell: Any, tiny_model_dir: Any, capsys: Capture) -> Iterator[Loaded]:
    """The shell, the handle of the port, and the folder of the model that works."""
    folder = tiny_model_dir("llama")
    handle = line(engine_shell, f"serve {folder} --port 0 --max-model-len 512 --max-num-seqs 4")
    capsys.readouterr()
    yield engine_shell, handle, folder
    line(engine_shell, "unload")


def answers(server: Any) -> bool:
    body = {"prompt": "Hi", "max_tokens": 2}
    headers = {"Authorization": f"Bearer {server.api_key}"}
    return httpx.post(f"{server.base_url}/completions", json=body, headers=headers, timeout=60).status_code == 200


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


FAULTS: dict[str, tuple[Callable[[Path], Any], str, type[VMMagicError]]] = {
    "no such model": (lambda other: shutil.rmtree(other), "", ModelNotFoundError),
    "a file is missing": (lambda other: (other / "model.safetensors").unlink(), "", ModelNotFoundError),
    "the config is no JSON": (lambda other: (other / "config.json").write_text("{"), "", ModelLoadError),
    "an architecture that nobody knows": (
        lambda other: (other / "config.json").write_text('{"model_type": "unheard_of", "vocab_size": 9}'),
        "",
        VMMagicError,
    ),
    "a file is cut off": (lambda other: cut(other / "model.safetensors"), "", ModelLoadError),
    "the tokenizer is no JSON": (lambda other: (other / "tokenizer.json").write_text("{}"), "", ModelLoadError),
    "too large for the memory": (lambda other: None, "--gpu-memory-utilization 0.0001", MemoryPlanError),
    "a template that is not there": (lambda other: None, "--chat-template ./nowhere.jinja", ConfigError),
    "longer than its context": (lambda other: None, "--max-model-len 999999", ConfigError),
    "a length that is no number": (lambda other: None, "--max-model-len long", ConfigError),
    "kernels where there are none": (lambda other: None, "--attention-backend paged", ConfigError),
    "a parser that nobody knows": (lambda other: None, "--tool-call-parser mystery", ConfigError),
}  # fmt: skip


def test_what_files_and_flags_tell_is_known_before_the_model_is_let_go(loaded: Loaded, tmp_path: Path) -> None:
    shell, handle, _ = loaded
    llm = vm_magic.current()
    source = tmp_path / "source"
    for number, (break_it, flags, kind) in enumerate(FAULTS.values()):
        broken = tmp_path / f"broken-{number}"
        if not source.exists():
            shutil.copytree(loaded[2], source)
        shutil.copytree(source, broken)
        break_it(broken)
        with pytest.raises(kind, match=r"stays loaded|is not a whole number"):
            line(shell, f"load {broken} {flags}")
        assert vm_magic.current() is llm, list(FAULTS)[number]
    assert handle.running
    assert answers(handle)


def test_other_flags_for_the_same_model_are_checked_likewise(loaded: Loaded) -> None:
    shell, handle, folder = loaded
    for command in ("load", "serve"):
        with pytest.raises(MemoryPlanError, match="stays loaded"):
            line(shell, f"{command} {folder} --gpu-memory-utilization 0.0001")
        assert shown(shell)["text/plain"] == f"{folder}: not loaded with these flags"
    with pytest.raises(MemoryPlanError, match="stays loaded"):
        cell(shell, "vllm_metal serve", f"VLLM_METAL_MEMORY_FRACTION=0.0001 vllm serve {folder} --port 0")
    assert handle.running


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, other: Path) -> Callable[[BaseException], None]:
    """Lets loads of ``other`` fail in the middle."""

    def fail_with(error: BaseException) -> None:
        real = builder.load_model

        def load(resolved: Any, *arguments: Any) -> Any:
            result = real(resolved, *arguments)
            if resolved.path == other:
                raise error
            return result

        monkeypatch.setattr(builder, "load_model", load)

    return fail_with


def test_a_load_that_fails_halfway_loads_the_model_before_again_with_its_port(
    loaded: Loaded, other: Path, failing: Callable[[BaseException], None], capsys: Capture
) -> None:
    shell, handle, folder = loaded
    line(shell, "set temperature=0.3 memory_fraction=0.5 max_model_len=256")
    before = vm_magic.current()
    assert before is not None
    held, plan = memory_in_use(), before.plan
    failing(ModelLoadError("the weights broke off"))
    with pytest.raises(ModelLoadError, match=f"broke off; .* was loaded again, and its port {handle.port} is open"):
        line(shell, f"load {other} --max-model-len 128")
    after = vm_magic.current()
    assert after is not None
    assert before.closed
    assert (after.plan.fraction, after.plan.max_model_len, after.plan.max_num_seqs) == (0.5, 256, plan.max_num_seqs)
    assert after.settings.snapshot()["temperature"] == 0.3
    assert memory_in_use() == pytest.approx(held, rel=0.05)
    assert after.server is not None
    assert (after.server.base_url, after.server.api_key) == (handle.base_url, handle.api_key)
    assert answers(handle)
    assert line(shell, "serve --port 0") is after.server
    texts = [output["data"]["text/plain"] for output in shell.display_pub.outputs]
    assert f"{other}: not loaded" in texts
    assert any(text.startswith(f"{folder}: loaded again in") for text in texts)


def test_an_error_of_a_program_says_what_is_loaded_too(
    loaded: Loaded, other: Path, failing: Callable[[BaseException], None]
) -> None:
    failing(RuntimeError("a bug"))
    with pytest.raises(ModelLoadError, match=r"a bug.* fault of this engine.*was loaded again, and its port"):
        line(loaded[0], f"load {other}")
    assert vm_magic.current() is not None


def test_an_interrupted_load_gives_the_model_before_back(
    loaded: Loaded, other: Path, failing: Callable[[BaseException], None]
) -> None:
    failing(KeyboardInterrupt())
    with pytest.raises(Interrupted, match=r"loading stopped; .* was loaded again, and its port"):
        line(loaded[0], f"load {other}")
    assert answers(loaded[1])


def test_variables_of_the_text_that_failed_do_not_reach_the_model_before(
    loaded: Loaded, other: Path, failing: Callable[[BaseException], None]
) -> None:
    failing(ModelLoadError("no"))
    with pytest.raises(ModelLoadError, match="loaded again"):
        cell(loaded[0], "vllm_metal serve", f"VLLM_METAL_MEMORY_FRACTION=0.25 vllm serve {other} --port 0")
    llm = vm_magic.current()
    assert llm is not None
    assert llm.plan.fraction == 0.9


def test_a_model_that_cannot_be_loaded_again_is_named_with_its_command(
    engine_shell: Any, tiny_model_dir: Any, tmp_path: Path, other: Path, failing: Callable[[BaseException], None]
) -> None:
    gone = shutil.copytree(tiny_model_dir("llama"), tmp_path / "gone")
    line(engine_shell, f"load {gone} --max-model-len 256 --no-enable-prefix-caching")
    failing(ModelLoadError("no"))
    (gone / "model.safetensors").unlink()
    command = f"%vllm_metal load {gone} --max-model-len 256 --no-enable-prefix-caching tries once more"
    with pytest.raises(ModelLoadError, match="could not be loaded again") as raised:
        line(engine_shell, f"load {other}")
    assert str(raised.value).endswith(command)
    assert vm_magic.current() is None


def test_a_random_key_stays_for_the_life_of_the_kernel(loaded: Loaded, other: Path) -> None:
    shell, handle, _ = loaded
    line(shell, "stop")
    again = line(shell, "serve --port 0")
    another = line(shell, f"serve {other} --port 0 --max-model-len 128")
    assert handle.api_key == again.api_key == another.api_key
    assert line(shell, "serve --port 0 --api-key mine").api_key == "mine"
    assert line(shell, "serve --port 0").api_key == handle.api_key
