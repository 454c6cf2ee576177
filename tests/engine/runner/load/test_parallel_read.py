"""Several threads read a model's weights, each on a stream of its own."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.models.local import ResolvedModel
from engine.params.engine_args import EngineArgs
from engine.runner.device.devices import Device
from engine.runner.load import folder as folder_module
from engine.runner.load import loader, parallel_read
from engine.runner.load.loader import LoadedModel, load_model
from engine.runner.load.parallel_read import ParallelRead, loading_by
from tests.engine.parity.tiny_architectures import config_of
from tests.tiny_models import write_weights

mx = pytest.importorskip("mlx.core")


def reader() -> ParallelRead:
    found = parallel_read.parallel_read(mx.cpu, 4)
    assert found is not None
    return found


def stored(folder: Path, count: int = 40) -> Path:
    arrays = {f"w{i}": mx.full((256, 1 + i % 3), float(i)) for i in range(count)}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    return folder / "model.safetensors"


def test_arrays_are_read_by_several_threads_and_are_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_read, "_PIECE_BYTES", 4096)
    ours = reader()
    threads: set[threading.Thread] = set()
    evaluate = mx.eval

    def watched(*arrays: Any) -> None:
        threads.add(threading.current_thread())
        evaluate(*arrays)

    monkeypatch.setattr(mx, "eval", watched)
    arrays = ours.load(stored(tmp_path))
    told: list[int] = []
    assert ours.read(list(arrays.values()), told.append) == []
    assert len(threads - {threading.current_thread()}) == 4
    assert sum(told) == sum(array.nbytes for array in arrays.values())
    assert len(told) > 8
    assert [arrays[f"w{i}"].tolist() for i in range(40)] == [[[float(i)] * (1 + i % 3)] * 256 for i in range(40)]


def test_bytes_are_shared_evenly(tmp_path: Path) -> None:
    ours = reader()
    ours.load(stored(tmp_path))
    assert max(ours._bytes) - min(ours._bytes) <= 3 * 1024
    assert sum(ours._bytes) == (tmp_path / "model.safetensors").stat().st_size - 8 - header_size(tmp_path)


def header_size(folder: Path) -> int:
    return int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")


def test_what_was_changed_after_opening_is_left_to_the_caller(tmp_path: Path) -> None:
    ours = reader()
    arrays = ours.load(stored(tmp_path))
    doubled, other = arrays["w1"] * 2, mx.ones(3)
    left = ours.read([arrays["w0"], doubled, other], lambda _: None)
    assert [one is array for one, array in zip(left, (doubled, other), strict=True)] == [True, True]
    assert doubled.tolist() == [[2.0] * 2] * 256


def test_an_interrupt_ends_all_threads_and_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_read, "_PIECE_BYTES", 1)
    ours = reader()
    arrays = list(ours.load(stored(tmp_path, 400)).values())
    told: list[int] = []

    def interrupt(num_bytes: int) -> None:
        told.append(num_bytes)
        if len(told) == 3:
            raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        ours.read(arrays, interrupt)
    assert threading.active_count() == before
    assert len(told) == 3


def test_what_a_thread_meets_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = reader()
    arrays = list(ours.load(stored(tmp_path)).values())

    def broken(*_: Any) -> None:
        raise RuntimeError("[read] Unable to read from file.")

    monkeypatch.setattr(mx, "eval", broken)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="Unable to read"):
        ours.read(arrays, lambda _: None)
    assert threading.active_count() == before


def test_only_mlx_lms_own_loading_opens_files_so(tmp_path: Path) -> None:
    from mlx_lm import utils

    before = utils.mx
    ours = reader()
    path = stored(tmp_path)
    with loading_by(ours):
        assert set(utils.mx.load(str(path))) == set(mx.load(str(path)))
        assert utils.mx.array is mx.array
        assert sum(ours._bytes)
        ours._bytes = [0] * 4
        mx.load(str(path))
        assert not sum(ours._bytes)
    assert utils.mx is before


def test_few_processors_or_streams_that_cannot_be_shared_leave_it_to_one_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert parallel_read.parallel_read(mx.cpu, 3) is None

    def refused(*_: Any) -> None:
        raise RuntimeError("There is no Stream(gpu, 3) in current thread.")

    monkeypatch.setattr(parallel_read, "_streams", {})
    monkeypatch.setattr(mx, "new_thread_unsafe_stream", refused)
    assert parallel_read.parallel_read(mx.cpu, 4) is None


def test_streams_are_kept_and_made_anew_when_they_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = reader()._streams, reader()._streams
    assert first is second
    usable = iter([False, True])
    monkeypatch.setattr(parallel_read, "_usable", lambda streams: next(usable))
    third = reader()._streams
    assert set(map(str, third)).isdisjoint(map(str, first))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads as on a GPU, but from streams of the CPU."""
    monkeypatch.setattr(loader, "describe_device", lambda: Device("cuda", "a GPU", 80 << 30))
    monkeypatch.setattr(loader, "prepare_backend", lambda: None)
    monkeypatch.setattr(loader, "_check_room", lambda *_: None)
    monkeypatch.setattr(folder_module, "parallel_read", lambda kind, cpus: reader())


def load(folder: Path, told: list[Any] | None = None, **options: Any) -> LoadedModel:
    report = None if told is None else lambda *news: told.append(news)
    return load_model(ResolvedModel("tiny", folder, "folder"), EngineArgs("tiny", **options), report)


def logits(loaded: LoadedModel) -> Any:
    return np.array(loaded.model(mx.array([[1, 2, 300, 4000, 5]])).astype(mx.float32))


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}], ids=["as stored", "converted"])
def test_a_model_read_by_several_threads_is_the_same(
    options: dict[str, Any], gpu: None, tiny_model_dir: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model_dir("llama")
    left: list[float] = []
    read = ParallelRead.read

    def watched(self: ParallelRead, parameters: Any, report: Any) -> Any:
        others = read(self, parameters, report)
        left.append(len(others) / len(parameters))
        return others

    monkeypatch.setattr(ParallelRead, "read", watched)
    told: list[tuple[str, int, int]] = []
    ours = load(folder, told, **options)
    assert left == [1.0 if options else 0.0]
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1] == ("load", ours.num_bytes, ours.num_bytes)
    monkeypatch.setattr(folder_module, "parallel_read", lambda kind, cpus: None)
    np.testing.assert_array_equal(logits(ours), logits(load(folder, **options)))


def test_a_model_that_joins_what_it_loads_is_the_same(
    gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_weights(tmp_path, config_of("qwen3_moe"))
    path = tmp_path / "model.safetensors"
    stored: dict[str, Any] = {}
    for name, array in dict(mx.load(str(path))).items():
        if "switch_mlp" in name:  # as published: a matrix for each expert
            split = {name.replace("switch_mlp", f"experts.{number}"): one for number, one in enumerate(array)}
            stored |= split
        else:
            stored[name] = array
    mx.eval(stored)
    mx.save_safetensors(str(path), stored)
    ours = load(tmp_path, dtype="float32")
    monkeypatch.setattr(folder_module, "parallel_read", lambda kind, cpus: None)
    theirs = load(tmp_path, dtype="float32")
    tokens = mx.array([[1, 2, 3, 4]])
    np.testing.assert_array_equal(np.array(ours.model(tokens)), np.array(theirs.model(tokens)))
