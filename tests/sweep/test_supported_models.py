"""Every model file of mlx-lm gives mlx-lm's tokens, and the table of supported models says how it runs."""

from importlib import metadata

import pytest

from engine.runner.device.devices import describe_device
from tests.sweep.configurations import tiny_config
from tests.sweep.models import Row, model_files, run, sweep
from tests.sweep.table import COMMAND, TABLE, render, written_names, written_version

pytestmark = pytest.mark.timeout(1200)  # a minute on an idle machine
WRITTEN = TABLE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return sweep(model_files())


def test_a_short_batch_gives_mlx_lms_greedy_tokens(rows: list[Row]) -> None:
    known = written_names(WRITTEN)
    assert [row.name for row in rows if not row.equal and row.name in known] == []
    assert sum(row.how == "paged" for row in rows) > 100


def test_the_table_is_what_the_sweep_finds(rows: list[Row]) -> None:
    version, device = metadata.version("mlx-lm"), describe_device().kind
    if version != written_version(WRITTEN) or device != "cpu":
        pytest.skip(f"the table is of mlx-lm {written_version(WRITTEN)} on a CPU; `{COMMAND}` writes that of {version}")
    assert render(rows) == WRITTEN, f"`{COMMAND}` writes the table anew; read the difference"


def test_a_model_file_that_cannot_be_built_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.sweep.models._MOST_PARAMETERS", 1000)
    row = run("llama")
    assert (row.how, row.equal) == ("not runnable", True)
    assert "no tiny configuration" in row.note


def test_other_tokens_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.sweep.models.greedy", lambda model, prompt, num_tokens: [0] * num_tokens)
    monkeypatch.setattr("tests.sweep.models.greedy_from_one_call", lambda model, prompt, num_tokens: [1] * num_tokens)
    assert not run("llama").equal


def test_a_configuration_is_derived_from_names_and_types() -> None:
    config = tiny_config("llama")
    assert (config["hidden_size"], config["num_key_value_heads"], config["vocab_size"]) == (64, 2, 199)
    assert "rope_theta" not in config  # it has a default that fits any size
    assert tiny_config("gemma4")["text_config"]["num_kv_shared_layers"] == 2
