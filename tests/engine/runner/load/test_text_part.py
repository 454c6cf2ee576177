"""Checkpoints that also see or hear, in the layouts that their makers publish: their text part loads, exactly."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from engine.models.local import ResolvedModel
from engine.params.engine_args import EngineArgs
from engine.runner.load.loader import load_model
from tests.engine.parity.tiny_architectures import build
from tests.sweep.configurations import tiny_config

Weights = dict[str, mx.array]
PARTS = {
    "gemma3": ("vision", ["vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
                          "multi_modal_projector.mm_input_projection_weight"]),
    "gemma3n": ("vision and audio", ["model.vision_tower.timm_model.conv_stem.conv.weight",
                                     "model.audio_tower.conformer.0.norm.weight",
                                     "model.embed_vision.embedding.weight", "model.embed_audio.embedding.weight"]),
    "gemma4": ("vision and audio", ["model.vision_tower.encoder.layers.0.mlp.up_proj.weight",
                                    "model.audio_tower.layers.0.norm.weight", "model.embed_vision.projection.weight"]),
    "qwen3_5": ("vision", ["model.visual.blocks.0.attn.qkv.weight", "model.visual.merger.norm.weight",
                           "mtp.layers.0.mlp.up_proj.weight"]),
    "qwen3_5_moe": ("vision", ["model.visual.blocks.0.attn.qkv.weight", "mtp.fc.weight"]),
    "mistral3": ("vision", ["vision_tower.transformer.layers.0.attention.q_proj.weight",
                            "multi_modal_projector.linear_1.weight"]),
    "llama4": ("vision", ["vision_model.model.layers.0.mlp.fc1.weight", "multi_modal_projector.linear_1.weight"]),
}  # fmt: skip


def published(name: str, key: str, value: mx.array) -> Iterator[tuple[str, mx.array]]:
    """A parameter of mlx-lm's model under the name, and in the layout, of the maker's files."""
    if name in ("gemma3n", "mistral3", "gemma3"):
        yield key, value
        return
    if name == "llama4":
        expert = key.removesuffix(".weight")
        yield (expert, value.swapaxes(1, 2)) if ".experts." in key else (key, value)
        return
    key = key.removeprefix("language_model.")
    key = key.replace("model.", "model.language_model.", 1) if key.startswith("model.") else key
    if name.startswith("qwen3_5"):
        value = value.moveaxis(1, 2) if "conv1d" in key else value
        gained = ("input_layernorm.weight", "post_attention_layernorm.weight", "language_model.norm.weight",
                  "q_norm.weight", "k_norm.weight")  # fmt: skip
        value = value - 1 if key.endswith(gained) else value
    yield key.replace("switch_mlp.", "experts.") if name == "qwen3_5_moe" else key, value


def stacked(weights: Weights) -> Weights:
    """Experts as published: gate and up in one tensor, no ``.weight``."""
    for key in [key for key in weights if key.endswith(".experts.gate_proj.weight")]:
        base = key.removesuffix(".gate_proj.weight")
        gate, up = weights.pop(key), weights.pop(f"{base}.up_proj.weight")
        weights[f"{base}.gate_up_proj"] = mx.concatenate([gate, up], axis=-2)
        weights[f"{base}.down_proj"] = weights.pop(f"{base}.down_proj.weight")
    return weights


def stacked_llama4(weights: Weights) -> Weights:
    """As :func:`stacked`, in Llama 4's order of axes."""
    for key in [key for key in weights if key.endswith(".experts.gate_proj")]:
        up = weights.pop(key.replace("gate_proj", "up_proj"))
        weights[key.replace("gate_proj", "gate_up_proj")] = mx.concatenate([weights.pop(key), up], axis=-1)
    return weights


def write(folder: Path, name: str) -> Any:
    """A tiny checkpoint with towers; gives the model that its text part is."""
    config = tiny_config(name) | {"vocab_size": 199}
    model = build(json.loads(json.dumps(config)))
    weights = dict(pair for key, value in tree_flatten(model.parameters()) for pair in published(name, key, value))
    weights = {"qwen3_5_moe": stacked, "llama4": stacked_llama4}.get(name, dict)(weights)
    parts, towers = PARTS[name]
    weights |= {key: mx.random.normal((4, 4)) for key in towers}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    config |= {f"{part}_config": {"hidden_size": 4} for part in parts.split(" and ")}
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("name", PARTS)
def test_the_text_part_of_a_published_checkpoint_loads(tmp_path: Path, name: str) -> None:
    model = write(tmp_path, name)
    loaded = load_model(ResolvedModel(name, tmp_path, "folder"), EngineArgs(name, dtype="float32"))
    assert loaded.notes[1:] == [f"only the text part is loaded, not {PARTS[name][0]}: this engine serves text"]
    tokens = mx.array([[1, 2, 30, 40, 5]])
    np.testing.assert_allclose(np.array(loaded.model(tokens)), np.array(model(tokens)), rtol=1e-4, atol=1e-4)
    assert loaded.num_bytes == sum(value.nbytes for _, value in tree_flatten(model.parameters()))
