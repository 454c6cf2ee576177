"""``engine.inspect`` of folders whose files are missing, cut short, or hold what they should not."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.model_card.folders import (
    WEIGHTS,
    card,
    changed,
    facts,
    only,
    write_folder,
    write_json,
)

pytestmark = pytest.mark.usefixtures("no_network")
INDEX = "model.safetensors.index.json"


def test_what_an_index_names_and_what_is_there_are_compared(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    shards = {
        "model.norm.weight": "model-00001-of-00002.safetensors",
        "gone.weight": "model-00002-of-00002.safetensors",
    }
    write_json(folder / INDEX, {"metadata": {"total_size": 7}, "weight_map": shards})
    found = card(folder)
    assert facts(found, "weights")["index"] == ("2 tensors in 2 files", f"{INDEX}: weight_map")
    assert "names 1 tensor that no file here has (gone.weight …)" in only(found.problems, "gone")
    assert "does not name model.safetensors" in only(found.remarks, "does not name")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "run `git lfs pull`"),
        (b"", "not a safetensors file"),
        (b"\x10\0\0\0\0\0\0\0{{{{{{{{{{{{{{{{", "its header is not valid JSON"),
        (b"\xff" * 64, "not a safetensors file"),
    ],
)
def test_a_weight_file_that_cannot_be_read_is_named_and_the_rest_is_shown(
    tmp_path: Path, content: bytes, says: str
) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / WEIGHTS).write_bytes(content)
    found = card(folder)
    (problem,) = found.problems
    assert problem.startswith(f"{WEIGHTS}: ")
    assert says in problem
    assert found.section("layers")
    assert found.section("tokenizer")


def test_a_weight_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-1])
    assert card(folder).problems == (
        f"{WEIGHTS}: cut short ({len(whole) - 1} of {len(whole)} bytes); fetch the file again",
    )


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", INDEX]
)
def test_a_file_of_bad_json_is_a_problem_that_names_it_and_the_others_are_shown(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "m")
    (folder / name).write_text('{"never": ')
    found = card(folder)
    assert any(problem.startswith(f"{name}: ") for problem in found.problems)
    titles = {section.title for section in found.sections}
    expected = {"model", "architecture", "weights", "tokenizer", "end tokens", "versions"}
    assert expected - titles == {"config.json": {"architecture"}, "tokenizer.json": {"tokenizer"}}.get(name, set())


def odd_entries(folder: Path) -> Iterator[None]:
    """Each entry of each file in turn as something that it should not be."""
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        whole = (folder / name).read_text()
        entries = {**json.loads(whole), "text_config": 1, "rope_scaling": 1, "rope_parameters": 1, "quantization": 1,
                   "quantization_config": 1, "sliding_window": 1, "num_experts": 1, "auto_map": 1}  # fmt: skip
        for key in entries:
            for value in ({"a": {"b": [None]}}, -1e300, [None, "x"]):
                changed(folder / name, **{key: value})
                yield
                (folder / name).write_text(whole)


def test_whatever_an_entry_holds_the_card_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "engine.model_card.inspection._abstract", lambda *_args, **_options: None
    )  # mlx-lm's own affair
    folder = write_folder(tmp_path / "m")
    count = 0
    for _ in odd_entries(folder):
        found = card(folder)
        assert {section.title for section in found.sections} >= {"model", "weights", "versions"}
        json.dumps(found.to_dict())
        count += 1
    assert count > 90


@pytest.mark.parametrize("value", ["four", -3, {"a": 1}])
def test_a_shape_that_no_model_can_have_is_a_problem(tmp_path: Path, value: Any) -> None:
    found = card(write_folder(tmp_path / "m", num_hidden_layers=value))
    assert found.problems
    assert found.section("tokenizer")


def test_pytorch_weights_alone_are_refused_in_the_words_of_a_load(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", leave_out=(WEIGHTS,))
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert "has PyTorch weights only; convert them with" in only(card(folder).problems, "PyTorch")


def test_more_layers_than_any_model_has_are_a_problem_and_not_built(tmp_path: Path) -> None:
    found = card(write_folder(tmp_path / "m", num_hidden_layers=10**30))
    assert "is not a whole number from 1 to 1000" in only(found.problems, "num_hidden_layers")


def test_numbers_that_json_has_not_are_words(tmp_path: Path) -> None:
    found = card(write_folder(tmp_path / "m", rope_theta=float("inf")))
    assert json.dumps(found.to_dict(), allow_nan=False)
