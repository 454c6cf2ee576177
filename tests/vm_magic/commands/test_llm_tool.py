"""The entry for the ``llm`` command-line tool: ours is written, everybody else's stays byte for byte."""

import json
from pathlib import Path

import llm
import pytest
import yaml

from engine.errors import ConfigError
from vm_magic.commands.llm_tool import KEY_NAME, MARK, LlmEntry, user_folder, with_entry, write_entry

ENTRY = LlmEntry("tiny", "org/tiny: one", "http://127.0.0.1:8000/v1", needs_key=True)
OTHERS = """\
# my models

- model_id: gpt-mine   # the good one
  model_name: "gpt"
  headers: {a: 'b'}

- {model_id: flow, model_name: flow}
# the end
"""


def models(folder: Path) -> Path:
    return folder / "extra-openai-models.yaml"


def test_the_entry_has_the_seeds_fields_and_the_keys_name() -> None:
    assert yaml.safe_load(ENTRY.yaml()) == [
        {
            "model_id": "tiny",
            "model_name": "org/tiny: one",
            "api_base": "http://127.0.0.1:8000/v1",
            "api_key_name": KEY_NAME,
            "supports_schema": True,
        }
    ]
    assert MARK in ENTRY.yaml().splitlines()[0]


def test_the_first_entry_makes_folder_list_and_keys_which_only_the_user_reads(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "llm"
    written = write_entry(ENTRY, "sk-1", folder)
    assert written == [models(folder), folder / "keys.json"]
    assert models(folder).read_text() == ENTRY.yaml()
    assert json.loads((folder / "keys.json").read_text())[KEY_NAME] == "sk-1"
    assert (folder / "keys.json").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in folder.iterdir()) == ["extra-openai-models.yaml", "keys.json"]


def test_other_entries_comments_and_keys_stay_byte_for_byte(tmp_path: Path) -> None:
    models(tmp_path).write_text(OTHERS)
    (tmp_path / "keys.json").write_text(json.dumps({"openai": "mine"}))
    write_entry(ENTRY, "sk-1", tmp_path)
    assert models(tmp_path).read_text() == OTHERS + ENTRY.yaml()
    assert json.loads((tmp_path / "keys.json").read_text()) == {"openai": "mine", KEY_NAME: "sk-1"}


def test_our_entry_is_replaced_where_it_stands(tmp_path: Path) -> None:
    after = "\n# below\n- model_id: last\n  model_name: last\n"
    models(tmp_path).write_text(OTHERS + ENTRY.yaml() + after)
    moved = LlmEntry("tiny", "tiny", "http://127.0.0.1:9/v1", needs_key=False, supports_tools=True)
    assert write_entry(moved, None, tmp_path) == [models(tmp_path)]
    assert models(tmp_path).read_text() == OTHERS + moved.yaml() + after
    assert not (tmp_path / "keys.json").exists()


def test_an_indented_list_and_a_missing_line_end_are_kept_valid() -> None:
    text = with_entry("  - model_id: a\n    model_name: a", ENTRY, Path("x"))
    assert [entry["model_id"] for entry in yaml.safe_load(text)] == ["a", "tiny"]
    assert with_entry(text, ENTRY, Path("x")) == text


def test_writing_twice_changes_nothing(tmp_path: Path) -> None:
    models(tmp_path).write_text(OTHERS)
    write_entry(ENTRY, "sk-1", tmp_path)
    once = models(tmp_path).read_text()
    write_entry(ENTRY, "sk-1", tmp_path)
    assert models(tmp_path).read_text() == once


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- model_id: tiny\n  model_name: theirs\n", "not ours.*--model-id NAME"),
        ("- model_id: [\n", "not valid YAML"),
        ("model_id: a\n", "not a YAML list"),
        ("[{model_id: a, model_name: a}]\n", "not a YAML list"),
    ],
)
def test_what_is_not_ours_or_not_understood_is_left_alone(tmp_path: Path, text: str, says: str) -> None:
    models(tmp_path).write_text(text)
    with pytest.raises(ConfigError, match=says):
        write_entry(ENTRY, "sk-1", tmp_path)
    assert models(tmp_path).read_text() == text
    assert not (tmp_path / "keys.json").exists()


def test_broken_keys_stop_everything_before_the_first_write(tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text("{")
    with pytest.raises(ConfigError, match=r"keys\.json is not a JSON object"):
        write_entry(ENTRY, "sk-1", tmp_path)
    assert not models(tmp_path).exists()


def test_a_linked_list_stays_a_link_and_keeps_its_mode(tmp_path: Path) -> None:
    real = tmp_path / "dotfiles.yaml"
    real.write_text(OTHERS)
    real.chmod(0o640)
    models(tmp_path).symlink_to(real)
    write_entry(ENTRY, None, tmp_path)
    assert models(tmp_path).is_symlink()
    assert real.read_text().startswith(OTHERS)
    assert real.stat().st_mode & 0o777 == 0o640


def test_the_folder_is_the_tools_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path / "a"))
    assert user_folder() == llm.user_dir()
    monkeypatch.delenv("LLM_USER_PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    assert user_folder() == llm.user_dir()
