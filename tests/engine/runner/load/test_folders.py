"""Folders as tools lay them out give mlx-lm's tokens, or are refused by name before a weight is read."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.utils import load_model as mlx_lm_load

import engine
from engine.errors import ModelLoadError, ModelNotFoundError
from engine.models.resolve import resolve
from engine.params.engine_args import EngineArgs
from engine.runner.load.loader import load_model
from engine.runner.load.rope_layers import rotary_layers
from engine.runner.load.weight_types import parameter_bytes
from tests.checkpoints.folders import LAYOUTS, SAVED, original, write_original, write_saved
from tests.checkpoints.reference import greedy, mlx_lm_tokens
from tests.checkpoints.saved_again import Angles, angles_by_kind, saved_again

LOADED = [name for name, kind in LAYOUTS.items() if kind.refused is None]
REFUSED = [name for name, kind in LAYOUTS.items() if kind.refused is not None]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("folders")

    def folder(name: str) -> Path:
        path = root / re.sub(r"\W+", "_", name)
        if not path.exists():
            LAYOUTS[name].write(path)
        return path

    return folder


class _Turned(nn.Module):
    """RoPE by sines and cosines that are written out."""

    def __init__(self, angles: Angles, traditional: bool) -> None:
        super().__init__()
        self._angles, self._factor = mx.array(angles[0].astype(np.float32)), angles[1]
        self._traditional = traditional

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        half = self._angles.size
        at = (offset + mx.arange(x.shape[-2]))[:, None] * self._angles
        sine, cosine = mx.sin(at) * self._factor, mx.cos(at) * self._factor
        turned, rest = x[..., : 2 * half], x[..., 2 * half :]
        if self._traditional:
            one, other = turned[..., 0::2], turned[..., 1::2]
        else:
            one, other = turned[..., :half], turned[..., half:]
        pair = [one * cosine - other * sine, other * cosine + one * sine]
        joined = mx.stack(pair, -1).reshape(turned.shape) if self._traditional else mx.concatenate(pair, -1)
        return mx.concatenate([joined, rest], -1)


def _tokens_by_transformers_angles(name: str, folder: Path, num_tokens: int) -> list[int]:
    """mlx-lm's greedy tokens of a folder, with the angles of transformers' own functions in its rotary layers."""
    write_original(name, folder)
    model, _ = mlx_lm_load(folder)
    theirs = saved_again(original(name), name)[1]
    for place in list(rotary_layers(model)):
        dims = getattr(place.layer, "dims", 0) or place.layer.dim
        if name == "glm":
            dims //= 2  # mlx-lm turns whole heads, the configuration tells a half
        by_kind = angles_by_kind(theirs, dims)
        kind = None if None in by_kind else theirs.layer_types[place.number]
        setattr(place.parent, place.name, _Turned(by_kind[kind], getattr(place.layer, "traditional", False)))
    return greedy(model, num_tokens)


def _load(folder: Path, **options: Any) -> Any:
    return load_model(resolve(str(folder)), EngineArgs(str(folder), **options))


@pytest.mark.parametrize("name", SAVED)
def test_a_folder_that_transformers_saved_again_is_the_same_model(name: str, tmp_path: Path) -> None:
    write_saved(name, tmp_path / "saved")
    loaded = _load(tmp_path / "saved")
    expected = _tokens_by_transformers_angles(name, tmp_path / "original", 16)
    assert greedy(loaded.model, 16) == expected
    assert len(set(expected)) > 3, "a text that would not show a difference"


@pytest.mark.parametrize("name", ["deepseek_v3", "gemma3_text", "llama", "olmo3", "phi3", "qwen2"])
@pytest.mark.parametrize("left_out", ["", "rope_theta", "rope_local_base_freq"])
def test_a_folder_that_mlx_lm_reads_as_it_is_stays_the_same_model(name: str, left_out: str, tmp_path: Path) -> None:
    write_original(name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop(left_out, None)
    if name == "olmo3":
        config |= {"rope_theta": 54321.0, "layer_types": ["sliding_attention", "full_attention"] * 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert greedy(_load(tmp_path).model, 16) == mlx_lm_tokens(tmp_path, 16)


@pytest.mark.parametrize("name", LOADED)
def test_a_whole_folder_is_billed_as_it_loads_and_gives_mlx_lms_tokens(
    name: str, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of(name)
    planned = engine.plan(str(folder), overhead=0, max_model_len=256)
    loaded = _load(folder)
    assert planned.model_memory == parameter_bytes(loaded.model) == loaded.num_bytes
    assert greedy(loaded.model, 8) == mlx_lm_tokens(folder, 8)


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_is_not_whole_is_refused_by_name_in_one_line(name: str, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(name)
    with pytest.raises((ModelLoadError, ModelNotFoundError), match=re.escape(LAYOUTS[name].refused or "")) as caught:
        _load(folder)
    assert "\n" not in str(caught.value)
