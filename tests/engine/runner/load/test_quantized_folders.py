"""Folders in the formats of many quantization tools: billed as they load, mlx-lm's tokens, or refused by name."""

import inspect
import json
import pkgutil
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import engine
from engine.errors import ModelLoadError
from engine.models.folder import stored_weights
from engine.models.local import ResolvedModel
from engine.models.model_config import read_model_config
from engine.params.engine_args import EngineArgs
from engine.runner.device.devices import Device

mx = pytest.importorskip("mlx.core")

import mlx_lm.models  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from engine.runner.load import lazy_model  # noqa: E402
from engine.runner.load.folder import FolderWeights  # noqa: E402
from engine.runner.load.loader import LoadedModel, load_model  # noqa: E402
from engine.runner.load.small_model import small_model  # noqa: E402
from engine.runner.load.weight_types import parameter_bytes  # noqa: E402
from tests.checkpoints.quantized import CHECKPOINTS, write_checkpoint  # noqa: E402
from tests.checkpoints.reference import PROMPT, greedy, mlx_lm_tokens  # noqa: E402
from tests.checkpoints.stored import Stored, write_folder  # noqa: E402
from tests.engine.parity.tiny_architectures import build  # noqa: E402

LOADED = [name for name, kind in CHECKPOINTS.items() if kind.refused is None]
RUN = [name for name in LOADED if CHECKPOINTS[name].runs]
REFUSED = [name for name, kind in CHECKPOINTS.items() if kind.refused is not None]
CPU = Device("cpu", "a CPU", 16 << 30)
GPU = Device("metal", "a GPU", 16 << 30)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each kind's folder, written once."""
    root = tmp_path_factory.mktemp("quantized")

    def folder(name: str) -> Path:
        path = root / re.sub(r"\W+", "_", name)
        return path if path.exists() else write_checkpoint(name, path)

    return folder


@pytest.fixture
def full_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with no room for unpacked weights."""
    monkeypatch.setattr("engine.runner.load.weight_types._EASY_SHARE", 0)


def load(folder: Path, **options: Any) -> LoadedModel:
    return load_model(ResolvedModel("tiny", folder, "folder"), EngineArgs("tiny", **options))


def planned_and_loaded(folder: Path, device: Device) -> tuple[int, int]:
    """Bytes, without the check of what caches the architecture has."""
    resolved, args = ResolvedModel("tiny", folder, "folder"), EngineArgs("tiny")
    config = read_model_config(resolved, args)
    reader = FolderWeights()
    model = reader.prepare(resolved, config, args, device).read(lambda *_: None)
    return reader.abstract(resolved, config, args, device).num_bytes, parameter_bytes(model)


@pytest.mark.parametrize("name", LOADED)
def test_a_plan_bills_what_is_loaded_on_a_cpu_and_on_a_gpu(name: str, folder_of: Callable[[str], Path]) -> None:
    for device in (CPU, GPU):
        planned, loaded = planned_and_loaded(folder_of(name), device)
        assert planned == pytest.approx(loaded, rel=0.01), device


@pytest.mark.parametrize("name", RUN)
def test_tokens_are_mlx_lms(name: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    plain = CHECKPOINTS[name].plain
    if plain:
        plain(tmp_path)
    assert greedy(load(folder_of(name)).model, 16) == mlx_lm_tokens(tmp_path if plain else folder_of(name), 16)


@pytest.mark.parametrize("name", [name for name in RUN if "bit" in name or "fp" in name or "FP4" in name])
def test_where_weights_stay_packed_tokens_are_the_same(
    name: str, folder_of: Callable[[str], Path], full_cpu: None, tmp_path: Path
) -> None:
    assert greedy(load(folder_of(name)).model, 8) == mlx_lm_tokens(folder_of(name), 8)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_by_name_in_one_line(name: str, folder_of: Callable[[str], Path]) -> None:
    words = re.escape(CHECKPOINTS[name].refused or "")
    with pytest.raises(ModelLoadError, match=words) as planned:
        engine.plan(str(folder_of(name)), overhead=0, max_model_len=256)
    with pytest.raises(ModelLoadError, match=words) as loaded:
        load_model(ResolvedModel("tiny", folder_of(name), "folder"), EngineArgs("tiny"), pytest.fail)
    for said in map(str, (planned.value, loaded.value)):
        assert "\n" not in said
        assert "fetch the model again" not in said
        assert re.search(r"convert|set |save |MLX has", said)
