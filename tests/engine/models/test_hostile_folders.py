"""A model's folder from someone else: it names files, and only those of the folder itself are read."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file

from engine.errors import ModelNotFoundError
from engine.models.folder import stored_weights
from engine.models.local import ResolvedModel
from engine.models.resolve import resolve
from engine.params.engine_args import EngineArgs
from engine.text.tokens.tokenizer import load_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder beside files that are not its own."""
    save_file({"a": np.zeros(4, np.float32)}, tmp_path / "outside.safetensors")
    write_tokenizer(tmp_path / "outside.json", "outside")
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text("{}")
    return made


def write_tokenizer(path: Path, word: str) -> None:
    tokenizers.Tokenizer(tokenizers.models.WordLevel({word: 0, "<unk>": 1}, "<unk>")).save(str(path))


def test_an_index_leads_to_no_file_outside_of_its_folder(folder: Path, tmp_path: Path) -> None:
    for name in ("../outside.safetensors", str(tmp_path / "outside.safetensors")):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ModelNotFoundError, match=r"outside\.safetensors missing"):
            resolve(str(folder))
        assert stored_weights(folder).names == ()


def test_a_tokenizers_configuration_leads_to_no_file_outside_of_its_folder(folder: Path, tmp_path: Path) -> None:
    write_tokenizer(folder / "tokenizer.json", "inside")
    outside = str(tmp_path / "outside.json")
    named = dict.fromkeys(("tokenizer_file", "vocab_file", "merges_file", "name_or_path", "_name_or_path"), outside)
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    read = load_tokenizer(ResolvedModel("given", folder, "folder"), EngineArgs("given"))
    assert read.hf.get_vocab().keys() >= {"inside"}
    assert "outside" not in read.hf.get_vocab()


class Marked:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_nothing_pickled_is_opened(folder: Path, tmp_path: Path) -> None:
    write_tokenizer(folder / "tokenizer.json", "inside")
    mark = tmp_path / "was opened"
    for name in ("pytorch_model.bin", "model.safetensors.index.pkl", "consolidated.pth", "tokenizer.pkl", "model.pt"):
        (folder / name).write_bytes(pickle.dumps(Marked(mark)))
    with pytest.raises(ModelNotFoundError, match="PyTorch weights only"):
        resolve(str(folder))
    load_tokenizer(ResolvedModel("given", folder, "folder"), EngineArgs("given"))
    assert not mark.exists()
    pickle.loads(pickle.dumps(Marked(mark)))
    assert mark.exists(), "the trap works"
