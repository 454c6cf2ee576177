"""Weights are evaluated piece by piece, in the order in which files hold them."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.models.folder import stored_weights
from engine.models.local import ResolvedModel
from engine.params.engine_args import EngineArgs
from engine.runner.load import pieces as pieces_module
from engine.runner.load.loader import load_model
from engine.runner.load.pieces import Pieces, in_file_order

mx = pytest.importorskip("mlx.core")
KILOBYTE = 1 << 10


def stored(folder: Path, count: int) -> dict[str, Any]:
    """Lazy arrays of 1 kB each, as a file holds them."""
    mx.save_safetensors(str(folder / "model.safetensors"), {f"w{i}": mx.full((256,), float(i)) for i in range(count)})
    return dict(mx.load(str(folder / "model.safetensors")))


def test_a_piece_is_begun_before_the_one_before_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []
    begin, wait = mx.async_eval, mx.eval
    monkeypatch.setattr(mx, "async_eval", lambda arrays: (calls.append(("begin", len(arrays))), begin(arrays)))
    monkeypatch.setattr(mx, "eval", lambda arrays: (calls.append(("wait", len(arrays))), wait(arrays)))
    monkeypatch.setattr(pieces_module, "_PIECE_BYTES", 2 * KILOBYTE)
    pieces = Pieces(1 << 30)
    counted = []
    for number in range(5):
        pieces.add(mx.ones(256) * number)
        counted.append(pieces.done)
    pieces.finish()
    assert counted == [0, 0, 0, 2 * KILOBYTE, 2 * KILOBYTE]
    assert calls == [
        ("begin", 2), ("wait", 0), ("begin", 2), ("wait", 2), ("begin", 1), ("wait", 2), ("wait", 1)
    ]  # fmt: skip
    assert pieces.done == 5 * KILOBYTE


def test_at_most_two_pieces_are_held_beside_what_they_are_converted_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, size = 64, 1 << 16
    stored_arrays = {f"w{i:02}": mx.zeros((size,), mx.float16) for i in range(count)}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), stored_arrays)
    del stored_arrays
    monkeypatch.setattr(pieces_module, "_PIECE_BYTES", 4 * size * 4)
    monkeypatch.setattr(pieces_module, "_MIN_PIECES", 1)
    arrays = [value.astype(mx.float32) for value in dict(mx.load(str(tmp_path / "model.safetensors"))).values()]
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    pieces = Pieces(count * size * 4)
    for array in arrays:
        pieces.add(array)
    pieces.finish()
    assert mx.get_active_memory() - before == count * size * 4
    assert mx.get_peak_memory() - before <= (count + 8) * size * 4


def test_what_is_evaluated_is_what_the_file_holds(tmp_path: Path) -> None:
    arrays = stored(tmp_path, 40)
    pieces = Pieces(sum(array.nbytes for array in arrays.values()))
    for array in arrays.values():
        pieces.add(array)
    pieces.finish()
    assert [arrays[f"w{i}"].tolist() for i in range(40)] == [[float(i)] * 256 for i in range(40)]
    assert pieces.done == 40 * KILOBYTE


def test_no_bytes_at_all_are_complete_at_once() -> None:
    pieces = Pieces(0)
    pieces.finish()
    assert pieces.done == 0


def test_parameters_are_read_as_they_lie_in_the_files() -> None:
    named = {name: mx.array([number]) for number, name in enumerate(["a", "b", "joined", "c", "d"])}
    ordered = in_file_order(named.items(), ["d", "c", "x", "b", "y", "a"])
    assert [array.item() for array in ordered] == [4, 3, 1, 2, 0]
    renamed = in_file_order([("model.a", named["a"]), ("model.b", named["b"])], ["b", "a"])
    assert [array.item() for array in renamed] == [0, 1]


def test_names_of_a_folders_tensors_come_file_after_file_as_they_lie_in_them(tmp_path: Path) -> None:
    offsets = {"late": [8, 16], "early": [0, 8]}
    for number, names in enumerate((offsets, {"other": [0, 8]}), start=1):
        header = {name: {"dtype": "F32", "shape": [2], "data_offsets": at} for name, at in names.items()}
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        data = len(text).to_bytes(8, "little") + text + bytes(8 * len(names))
        (tmp_path / f"model-0000{number}-of-00002.safetensors").write_bytes(data)
    assert stored_weights(tmp_path).names == ("early", "late", "other")
    assert stored_weights(tmp_path).num_bytes == 24


def test_a_load_reads_forwards_through_the_file(tiny_model_dir: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model_dir("llama")
    begun: list[int] = []
    begin = mx.async_eval

    def watched(arrays: list[Any]) -> None:
        # MLX evaluates the last array first.
        begun.extend(array.nbytes for array in reversed(arrays))
        begin(arrays)

    monkeypatch.setattr(mx, "async_eval", watched)
    loaded = load_model(ResolvedModel("tiny", folder, "folder"), EngineArgs("tiny", dtype="float32"))
    del loaded
    sizes = {name: array.nbytes for name, array in dict(mx.load(str(folder / "model.safetensors"))).items()}
    assert begun == [sizes[name] for name in stored_weights(folder).names]
    assert len(set(begun)) > 1
