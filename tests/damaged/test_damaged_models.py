"""Whatever is damaged in a model's files, a plan, a card and a load end in one line each, soon and in little memory.

The cases run in a process of their own (:mod:`tests.damaged.tries`), so that a death or a hang is an answer too.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import engine
from engine.errors import ModelLoadError
from tests.damaged import cases
from tests.damaged.__main__ import end_of
from tests.damaged.tries import Tried, tries
from tests.nightly import size

_FIRST = 20_000
"""The brief form's cases are the same in every run."""
_MOST_MEGABYTES = 400
"""That one case may hold at once beyond what was held before: the whole models take 2 MB."""


@pytest.mark.nightly
def test_damaged_files_are_refused_in_one_line_or_load() -> None:
    found = list(tries(_FIRST, size(100, 5000)))
    assert len(found) >= 100
    assert [fault for one in found for fault in one.faults] == []
    assert [(one.number, one.what, one.megabytes) for one in found if one.megabytes > _MOST_MEGABYTES] == []
    refused = sum(bool(one.ends["load"]) for one in found)
    assert 0.3 < refused / len(found) < 0.95, "damage that nobody notices, or whole models that are damaged"


def test_a_case_is_the_same_each_time(tmp_path: Path) -> None:
    written = []
    for root in (tmp_path / "one", tmp_path / "two"):
        root.mkdir()
        for number in range(30):
            folder = root / str(number)
            folder.mkdir()
            cases.write(number, folder)
        written.append({path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()})
    assert written[0] == written[1]


@pytest.mark.parametrize(("does", "end"), [("os.abort()", "died: exit -6"), ("time.sleep(600)", "died: hangs")])
def test_a_death_and_a_hang_are_faults_and_the_cases_go_on(does: str, end: str) -> None:
    program = f"""
import json, os, sys, time
first = int(sys.argv[1])
print(json.dumps(dict(begins=first, what="cut")), flush=True)
if first == 7:
    {does}
print(json.dumps(dict(ends=first, cpu=0, mb=0, plan="", inspect="RAW KeyError", load="ModelLoadError: x")), flush=True)
"""
    found = list(tries(7, 2, (sys.executable, "-c", program), silence=5))
    assert [one.faults for one in found] == [
        [f"case 7 (cut): process: {found[0].ends['process']}"],
        ["case 8 (cut): inspect: RAW KeyError"],
    ]
    assert found[0].ends["process"].startswith(end)


@pytest.mark.parametrize(
    ("error", "fault"),
    [(ModelLoadError("x"), False), (ModelLoadError("x\ny"), True), (KeyError("x"), True), (SystemExit(), True)],
)
def test_only_an_error_for_users_in_one_line_is_no_fault(error: BaseException, fault: bool) -> None:
    def fails() -> None:
        raise error

    end = end_of(fails)
    assert bool(Tried(0, "", {"load": end}).faults) == fault
    assert Tried(0, "", {"load": end_of(lambda: None)}).faults == []


@pytest.fixture
def llama(tmp_path: Path) -> Callable[..., Path]:
    """Writes a whole llama with other entries in its configuration."""
    return lambda **entries: cases.write_whole(tmp_path, **entries)


@pytest.mark.parametrize("layers", [10**5, 10**9, 0, -1, 2.5, "2", True])
def test_numbers_of_layers_that_no_model_has_are_refused_by_name_before_a_layer_is_built(
    llama: Callable[..., Path], layers: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.runner.load.abstract_model.plain_model", pytest.fail)
    folder = llama(num_hidden_layers=layers)
    for ask in (engine.plan, engine.LLM):
        with pytest.raises(ModelLoadError, match=r"num_hidden_layers .* is not a whole number from 1 to 1000"):
            ask(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="num_hidden_layers"):
        engine.plan(str(folder))


def test_more_layers_than_the_weights_have_are_refused_before_they_are_built(
    llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.runner.load.lazy_model._load", pytest.fail)
    folder = str(llama(num_hidden_layers=900))
    for ask in (engine.plan, engine.LLM):
        with pytest.raises(ModelLoadError, match="num_hidden_layers 900, and the weights have 2 layers"):
            ask(folder)
    assert any("the weights have 2 layers" in line for line in engine.inspect(folder).problems)


@pytest.mark.parametrize(("name", "value"), [("layer_types", ["full_attention"]), ("hybrid_override_pattern", "M")])
def test_lists_of_more_layers_than_any_model_has_are_refused(llama: Callable[..., Path], name: str, value: Any) -> None:
    with pytest.raises(ModelLoadError, match=f"{name} of 100000 layers"):
        engine.plan(str(llama(**{name: value * 10**5})))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", 10**9), ("vocab_size", 10**9), ("num_attention_heads", 0), ("num_key_value_heads", -1),
        ("intermediate_size", 10**12), ("head_dim", "8"), ("num_experts", 10**9),
    ],
)  # fmt: skip
def test_sizes_out_of_range_are_refused_by_name(llama: Callable[..., Path], name: str, value: object) -> None:
    folder = llama(**{name: value})
    with pytest.raises(ModelLoadError, match=rf"config.json has {name} '.*, which is not a whole number from \d"):
        engine.plan(str(folder))


def test_a_value_of_any_length_is_quoted_in_short(llama: Callable[..., Path]) -> None:
    folder = str(llama(quantization={"bits": 4, "group_size": "x" * 10**4}))
    for ask in (engine.plan, engine.LLM):
        with pytest.raises(ModelLoadError, match="group_size xxx") as refused:
            ask(folder)
        assert len(str(refused.value)) < 700
    assert all(len(line) < 700 for line in engine.inspect(folder).problems)


def test_a_table_of_characters_that_states_more_than_it_holds_reaches_no_library(llama: Callable[..., Path]) -> None:
    folder = llama()
    file = folder / "tokenizer.json"
    table = {"type": "Precompiled", "precompiled_charsmap": "//////8AAAA="}
    file.write_text(json.dumps({**json.loads(file.read_text()), "normalizer": table}))
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json: its precompiled_charsmap is damaged"):
        engine.LLM(str(folder))
    assert any("precompiled_charsmap" in line for line in engine.inspect(str(folder)).problems)


def test_weights_as_pickles_and_code_of_the_folder_are_refused(llama: Callable[..., Path]) -> None:
    folder = llama(model_file="modeling.py")
    (folder / "modeling.py").write_text("raise SystemExit('run')")
    with pytest.raises(ModelLoadError, match="runs its own Python file"):
        engine.LLM(str(folder))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(engine.ModelNotFoundError, match="PyTorch weights only"):
        engine.LLM(str(folder))
