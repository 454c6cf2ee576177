"""A small model takes a load's first steps while the large one's weights are read."""

import gc
import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core")

from engine.llm import LLM  # noqa: E402
from engine.models.local import ResolvedModel  # noqa: E402
from engine.models.model_config import read_model_config  # noqa: E402
from engine.params.engine_args import EngineArgs  # noqa: E402
from engine.params.sampling_params import SamplingParams  # noqa: E402
from engine.runner.device.devices import Device  # noqa: E402
from engine.runner.kv import attention_patch  # noqa: E402
from engine.runner.load import small_model as small_model_module  # noqa: E402
from engine.runner.load.loader import load_model  # noqa: E402
from engine.runner.load.small_model import small_config, small_model  # noqa: E402
from engine.runtime import builder  # noqa: E402
from engine.runtime.rehearsal import Check, meanwhile  # noqa: E402
from tests.engine.parity.tiny_architectures import config_of  # noqa: E402
from tests.tiny_models import tiny_config  # noqa: E402

GPU = Device("cuda", "a GPU", 80 << 30)
ARGS = EngineArgs("tiny", dtype="float32")


def folder_of(tmp_path: Path, config: dict[str, Any]) -> ResolvedModel:
    """A folder without any weights: nothing of the large model is needed."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return ResolvedModel("tiny", tmp_path, "folder")


def test_a_small_configuration_has_few_layers_of_all_kinds_and_small_matrices() -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = {
        "model_type": "gemma3", "head_dim": 256, "text_config": {
            "num_hidden_layers": 48, "layer_types": kinds * 8, "hidden_size": 3840, "intermediate_size": 15360,
            "vocab_size": 262208, "sliding_window_pattern": 6, "rope": [1, 2, 3]},
    }  # fmt: skip
    assert small_config(config) == {
        "model_type": "gemma3", "head_dim": 256, "text_config": {
            "num_hidden_layers": 6, "layer_types": kinds, "hidden_size": 3840, "intermediate_size": 512,
            "vocab_size": 512, "sliding_window_pattern": 6, "rope": [1, 2, 3]},
    }  # fmt: skip
    assert small_config({"num_hidden_layers": 40, "full_attention_interval": 8})["num_hidden_layers"] == 8
    assert small_config({"num_hidden_layers": 4, "vocab_size": 99}) == {"num_hidden_layers": 4, "vocab_size": 99}
    assert small_config({"model_type": "mamba"}) == {"model_type": "mamba"}


def test_where_six_layers_take_much_memory_two_do_and_else_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = folder_of(tmp_path, tiny_config("llama", num_hidden_layers=12))
    config = read_model_config(resolved, ARGS)
    found = []
    for most in (1 << 30, 500_000, 1000):
        monkeypatch.setattr(small_model_module, "_MOST_BYTES", most)
        model = small_model(resolved, config, ARGS, GPU)
        found.append(model and len(model.layers))
    assert found == [6, 2, None]


def test_random_weights_leave_other_random_numbers_alone(tmp_path: Path) -> None:
    resolved = folder_of(tmp_path, tiny_config("qwen3"))
    config = read_model_config(resolved, ARGS)
    first, second = (small_model(resolved, config, ARGS, GPU) for _ in range(2))
    assert first is not None
    assert second is not None
    (one, other) = (model.layers[0].self_attn.q_proj.weight for model in (first, second))
    assert mx.array_equal(one, other).item()
    assert 0.01 < mx.std(one).item() < 0.04


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "gemma4_text", "gpt_oss", "qwen3_next", "deepseek_v3"])
def test_a_rehearsal_takes_the_first_steps_and_leaves_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = folder_of(tmp_path, config_of(name))
    config = read_model_config(resolved, ARGS)
    measured: list[Any] = []
    measure = builder.measure_step_cost
    monkeypatch.setattr(builder, "measure_step_cost", lambda *given, **_device: measured.append(measure(*given)))
    users = {name: number for name, number in attention_patch._users.items() if number}
    before = mx.get_active_memory()
    builder.rehearse(resolved, config, ARGS, GPU, lambda: None)
    assert measured[0].bytes(16, 16) > 0
    assert {name: number for name, number in attention_patch._users.items() if number} == users
    gc.collect()
    mx.synchronize()
    assert mx.get_active_memory() <= before + 100_000


def test_work_runs_beside_the_body_and_is_waited_for() -> None:
    begun, may_end = threading.Event(), threading.Event()
    ended: list[str] = []

    def work(_check: Check) -> None:
        begun.set()
        assert may_end.wait(5)
        ended.append(threading.current_thread().name)

    with meanwhile(work):
        assert begun.wait(5)
        assert not ended
        may_end.set()
    assert ended == ["vm-rehearsal"]


def test_what_a_rehearsal_meets_is_a_line_in_the_debug_log(caplog: pytest.LogCaptureFixture) -> None:
    def work(_check: Check) -> None:
        raise RuntimeError("no such\nkernel")

    with caplog.at_level(logging.DEBUG, "engine"), meanwhile(work):
        pass
    assert [record.getMessage() for record in caplog.records] == ["rehearsal: RuntimeError: no such kernel"]


def test_an_interrupted_read_ends_the_rehearsal_at_its_next_check_and_passes_on() -> None:
    begun = threading.Event()
    rounds: list[int] = []

    def work(check: Check) -> None:
        begun.set()
        while True:
            check()
            rounds.append(1)

    def interrupted() -> None:
        with meanwhile(work):
            assert begun.wait(5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not [thread for thread in threading.enumerate() if thread.name == "vm-rehearsal"]


def test_weights_are_read_beside_what_is_given_and_not_before(tiny_model_dir: Any) -> None:
    from contextlib import contextmanager

    order: list[Any] = []

    @contextmanager
    def beside(config: Any, num_bytes: int) -> Any:
        order.append((config.model_type, num_bytes))
        yield
        order.append("over")

    folder = tiny_model_dir("llama")
    model = ResolvedModel("tiny", folder, "folder")
    loaded = load_model(model, ARGS, lambda stage, done, total: done and order.append(done == total), beside)
    assert order[0] == ("llama", loaded.num_bytes)
    assert order[-2:] == [True, "over"]


@pytest.mark.parametrize(("kind", "most", "rehearsed"), [("cuda", 0, 1), ("cuda", 1 << 30, 0), ("cpu", 0, 0)])
def test_only_cuda_and_large_weights_are_worth_a_rehearsal(
    kind: Any, most: int, rehearsed: int, tiny_model_dir: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "describe_device", lambda: Device(kind, "a device", 16 << 30))
    monkeypatch.setattr(builder, "_WORTH_REHEARSING", most)
    threads: list[str] = []
    rehearse = builder.rehearse

    def watched(*given: Any) -> None:
        threads.append(threading.current_thread().name)
        rehearse(*given)

    monkeypatch.setattr(builder, "rehearse", watched)
    with LLM(str(tiny_model_dir("qwen3")), dtype="float32", max_model_len=256) as llm:
        assert llm.generate("a b c", SamplingParams(temperature=0, max_tokens=4))[0].outputs[0].token_ids
    assert threads == ["vm-rehearsal"] * rehearsed
