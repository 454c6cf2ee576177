"""``engine.plan``: the memory plan from a config alone."""

import json
import shutil

import pytest

import engine
from engine.config import EngineArgs
from engine.hub import resolve
from engine.runner.devices import describe_device
from engine.runner.loader import load_model
from tests.tiny_models import tiny_config

GIVEN = {"device_memory": 51.54e9, "model_memory": 14.96e9, "overhead": 1.13e9}


def test_the_seeds_line_comes_out_of_a_config_of_its_size(tmp_path):
    shape = {"num_hidden_layers": 55, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
    config = tiny_config("llama", **shape, torch_dtype="bfloat16", max_position_embeddings=131072)
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = engine.plan(str(tmp_path), fraction=0.90, **GIVEN)
    assert plan.log_line() == (
        "metal_limit=51.54GB, fraction=0.90, usable_metal=46.39GB, model_memory=14.96GB, overhead=1.13GB, "
        "kv_budget=30.30GB, per_block_bytes=3604480, num_blocks=8405, max_tokens_cached=134480"
    )


def test_on_this_cpu_half_precision_weights_are_planned_as_they_are_loaded(tiny_model_dir, tmp_path):
    mx = pytest.importorskip("mlx.core")
    if describe_device().kind != "cpu":
        pytest.skip("only a CPU makes weights float32")
    folder = tmp_path / "half"
    shutil.copytree(tiny_model_dir("llama"), folder)
    weights = mx.load(str(folder / "model.safetensors"))
    half = {name: value.astype(mx.bfloat16) for name, value in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), half, metadata={"format": "mlx"})
    planned = engine.plan(str(folder)).model_memory
    assert planned == load_model(resolve(str(folder)), EngineArgs(str(folder))).num_bytes
