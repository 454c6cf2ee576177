"""``--device``: which GPU a process is shown, and what is refused."""

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from engine import LLM
from engine.errors import ConfigError
from engine.params.engine_args import EngineArgs
from engine.runner.device import placement
from engine.runner.device.placement import VISIBLE, device_names, environment_of, own_name, place
from tests.conftest import TinyModelDir


class Machine(SimpleNamespace):
    """A machine with GPUs, whose CUDA looks at its variable when it is first asked."""

    def __init__(self, gpus: int, monkeypatch: pytest.MonkeyPatch, **env: str) -> None:
        super().__init__(env=dict(env), default="gpu", started=None)
        monkeypatch.setattr(placement, "_placement", placement._Placement())
        monkeypatch.setattr(placement, "cuda_build_installed", lambda: gpus > 0)
        monkeypatch.setattr(placement, "count_gpus", lambda: gpus)
        monkeypatch.setattr(placement, "prepare_backend", lambda: None)
        monkeypatch.setattr(placement.sys, "platform", "linux")

        def device_count(kind: Any) -> int:
            if self.started is None:
                self.started = len(self.env[VISIBLE].split(",")) if VISIBLE in self.env else gpus
            return self.started

        monkeypatch.setattr(mx, "device_count", device_count)

    def place(self, wanted: str) -> None:
        place(wanted, self.env)


def refusal(machine: Machine, wanted: str) -> str:
    with pytest.raises(ConfigError) as caught:
        machine.place(wanted)
    assert caught.value.flag == "device"
    return str(caught.value)


def test_one_gpu_of_several_is_the_only_one_that_the_process_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(2, monkeypatch)
    assert device_names(machine.env) == ["cuda:0", "cuda:1", "cpu"]
    machine.place("cuda:1")
    assert machine.env[VISIBLE] == "1"
    assert device_names(machine.env) == ["cuda:0", "cuda:1", "cpu"], "they are named as before"
    for same in ("cuda:1", "cuda", "gpu", "auto"):
        machine.place(same)
    assert machine.env[VISIBLE] == "1"
    assert refusal(machine, "cuda:0") == (
        "--device cuda:0: this process computes on cuda:1, and on no other GPU until its kernel is restarted"
    )
    assert environment_of("cuda:0", machine.env)[VISIBLE] == "0"
    assert environment_of("cpu", machine.env) == machine.env


def test_numbers_count_within_what_the_user_made_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(8, monkeypatch, **{VISIBLE: "5, GPU-ab"})
    assert device_names(machine.env) == ["cuda:0", "cuda:1", "cpu"]
    assert refusal(machine, "cuda:2") == "--device cuda:2: not here; this machine has cuda:0 and cuda:1 and cpu"
    machine.place("cuda:1")
    assert machine.env[VISIBLE] == "GPU-ab"
    assert environment_of("cuda:0", machine.env)[VISIBLE] == "5"
    assert [placement.cuda_name(name, machine.env) for name in ("cuda:0", "cuda:1", "cuda:7")] == ["5", "GPU-ab", "7"]


def test_another_gpu_is_refused_once_mlx_has_started_and_the_first_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(2, monkeypatch)
    assert mx.device_count(mx.gpu) == 2
    machine.place("cuda:0")
    assert refusal(machine, "cuda:1") == (
        "--device cuda:1: MLX has started on cuda:0 in this process; restart the kernel and name the device first"
    )
    assert VISIBLE not in machine.env


def test_a_single_gpu_needs_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(1, monkeypatch)
    machine.place("cuda:0")
    assert VISIBLE not in machine.env
    assert refusal(machine, "metal") == "--device metal: not here; this machine has cuda:0 and cpu"


def test_what_is_not_here_is_refused_with_what_is(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(0, monkeypatch)
    for wanted in ("cuda", "cuda:0", "gpu", "metal"):
        assert refusal(machine, wanted) == f"--device {wanted}: not here; this machine has cpu"
    machine.place("cpu")
    assert own_name(machine.env) == "cpu"


def test_the_cpu_beside_a_gpu_is_left_again_by_the_next_load_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(1, monkeypatch)
    chosen: list[Any] = [mx.gpu]
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=chosen[-1]))
    monkeypatch.setattr(mx, "set_default_device", chosen.append)
    machine.place("cpu")
    machine.place("cpu")
    machine.place("auto")
    machine.place("auto")
    assert chosen == [mx.gpu, mx.cpu, mx.gpu]


def test_a_model_under_way_keeps_its_device_whatever_is_planned_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(1, monkeypatch)
    chosen: list[Any] = [mx.gpu]
    monkeypatch.setattr(mx, "default_device", lambda: SimpleNamespace(type=chosen[-1]))
    monkeypatch.setattr(mx, "set_default_device", chosen.append)
    with placement.computing():
        assert refusal(machine, "cpu") == (
            "--device cpu: a model of this process computes on the GPU, and MLX has one device: close it first"
        )
        machine.place("cuda:0")
    machine.place("cpu")
    with placement.computing():
        machine.place("auto")
        machine.place("cpu")
        assert "computes on the CPU" in refusal(machine, "gpu")
        assert chosen == [mx.gpu, mx.cpu]
    machine.place("gpu")
    assert chosen == [mx.gpu, mx.cpu, mx.gpu]


def test_a_loaded_model_is_one_under_way_until_it_is_closed(tiny_model_dir: TinyModelDir) -> None:
    before = placement._placement.num_computing
    with LLM(str(tiny_model_dir("llama")), max_model_len=64, gpu_memory_utilization=0.05) as llm:
        assert placement._placement.num_computing == before + 1
        llm.close()
        assert placement._placement.num_computing == before


def test_names_are_checked_before_anything_is_loaded() -> None:
    assert EngineArgs(model="m", device="CUDA:1").device == "cuda:1"
    assert EngineArgs.from_options("m", {"device": "cpu"}).device == "cpu"
    for wrong in ("tpu", "cuda:x", "gpu:1", "cuda:", ""):
        with pytest.raises(ConfigError, match="must be auto, cpu, gpu, metal, cuda, or cuda:N for one of several"):
            EngineArgs(model="m", device=wrong)


def test_a_load_for_a_gpu_that_is_not_here_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "device_names", lambda env: ["cuda:0", "cpu"])
    with pytest.raises(ConfigError, match="--device cuda:1: not here; this machine has cuda:0 and cpu"):
        LLM("smollm2", device="cuda:1")
