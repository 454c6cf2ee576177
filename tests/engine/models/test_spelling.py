"""config.json as transformers 5 saves it says to mlx-lm's models what it said before."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import _get_classes

from engine.errors import ModelLoadError
from engine.models.local import ResolvedModel
from engine.models.model_config import read_model_config
from engine.models.rope import main_rope, rope_settings
from engine.models.spelling import with_every_spelling
from engine.params.engine_args import EngineArgs
from tests.checkpoints.saved_again import known_to_transformers, saved_again
from tests.sweep.configurations import tiny_config

_THEIR_DEFAULTS = {
    "muse_glimmer": "hidden_size head_dim intermediate_size num_attention_heads num_hidden_layers num_key_value_heads "
    "vocab_size rms_norm_eps max_position_embeddings sliding_window layer_types layer_rope_theta "
    "rope_theta tie_word_embeddings",
    "bailing_hybrid": "head_dim",  # of the part that turns
    "gemma3n": "intermediate_size",  # of each layer, all the same
    "gemma4": "num_global_key_value_heads",  # where keys are values only
    "gemma4_text": "num_global_key_value_heads",
    "lfm2-vl": "block_ff_dim",  # as intermediate_size, which mlx-lm reads then
    "mimo_v2_flash": "partial_rotary_factor rope_theta",
    "recurrent_gemma": "rope_theta",
}
"""What classes of transformers put in place of what a tiny configuration tells, by model type."""


def _read(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """What mlx-lm's model of ``name`` is told, as flat entries."""
    spelled = with_every_spelling(config)
    arguments = _get_classes(dict(spelled))[1].from_dict(spelled)
    told = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(arguments)}
    text = told.pop("text_config", None)
    if dataclasses.is_dataclass(text):
        text = {field.name: getattr(text, field.name) for field in dataclasses.fields(text)}
    return {**told, **(text or {})}


def _told(name: str) -> dict[str, Any]:
    config = tiny_config(name)
    if name == "exaone4" or name.startswith("gemma4"):
        kinds = ["sliding_attention", "full_attention"] * 3
        text = config.get("text_config") or config
        text["layer_types"] = kinds[: text["num_hidden_layers"]]
        text["sliding_window_pattern"] = 2 if name.startswith("gemma4") else "LG"
    return config


@pytest.mark.parametrize("name", known_to_transformers())
def test_nothing_that_a_configuration_tells_is_lost_when_transformers_saves_it_again(name: str) -> None:
    config = _told(name)
    stated = config.get("text_config") if isinstance(config.get("text_config"), dict) else config
    assert stated is not None
    before, after = _read(name, config), _read(name, saved_again(config, name)[0])
    ours = set(_THEIR_DEFAULTS.get(name, "").split()) | {"model_type", "attn_config", "ffn_config"}
    lost = {
        entry: (before[entry], after.get(entry))
        for entry in before.keys() & stated.keys() - ours
        if "rope_" not in entry and after.get(entry) != before[entry]
    }
    assert not lost


def test_a_base_that_stands_only_in_rope_parameters_is_the_base() -> None:
    for words in ({"rope_parameters": {"rope_theta": 5e5}}, {"rope_theta": 5e5}, {"rotary_emb_base": 5e5}):
        assert with_every_spelling({"model_type": "llama", **words})["rope_theta"] == 5e5


def test_a_configuration_that_tells_nothing_of_rope_is_left_alone() -> None:
    assert with_every_spelling({"model_type": "mamba", "hidden_size": 8}) == {"model_type": "mamba", "hidden_size": 8}


def test_reading_what_was_spelled_tells_the_same_again() -> None:
    config = {
        "model_type": "gemma3_text",
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    }
    spelled = with_every_spelling(config)
    assert rope_settings(spelled) == rope_settings(config)
    assert (spelled["rope_theta"], spelled["rope_local_base_freq"]) == (1e6, 1e4)
    assert spelled["rope_scaling"] == {"type": "linear", "rope_type": "linear", "factor": 8.0}
    assert with_every_spelling(spelled) == spelled


def test_the_part_of_a_head_that_turns_in_some_layers_is_not_told_for_all() -> None:
    kinds = {
        "full_attention": {"rope_theta": 1e6, "partial_rotary_factor": 0.25},
        "sliding_attention": {"rope_theta": 1e4},
    }
    spelled = with_every_spelling({"model_type": "gemma4_text", "rope_parameters": kinds})
    assert "partial_rotary_factor" not in spelled
    assert {kind: rope.part for kind, rope in rope_settings(spelled).items()} == {
        "full_attention": 0.25, "sliding_attention": 1.0,
    }  # fmt: skip


def test_the_older_word_wins_where_both_are_there() -> None:
    config = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
        "rope_scaling": {"type": "su", "factor": 2},
    }
    (rope,) = rope_settings({**config, "max_position_embeddings": 64}).values()
    assert (rope.type, rope.base, rope.original_length) == ("longrope", 7.0, 64)


def test_short_sequences_of_longrope_are_turned_and_multiplied_as_short_ones() -> None:
    words = {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "short_mscale": 1.1, "long_mscale": 1.3}
    config = {"rope_scaling": words, "original_max_position_embeddings": 64, "max_position_embeddings": 256}
    for longest, factor, scale in ((64, [1.0], 1.1), (65, [2.0], 1.3), (None, [2.0], 1.3)):
        told = with_every_spelling(config, longest)["rope_scaling"]
        assert (told["long_factor"], told["long_mscale"]) == (factor, scale)


def test_numbers_that_json_has_no_word_for_are_numbers() -> None:
    spelled = with_every_spelling({"time_step_limit": [0.0, {"__float__": "Infinity"}]})
    assert spelled["time_step_limit"] == [0.0, math.inf]


def test_heads_of_single_layers_become_those_of_all_full_layers_or_are_refused() -> None:
    config = {
        "model_type": "gemma4_text",
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "per_layer_config": {
            "1": {"head_dim": 32, "num_key_value_heads": 1},
            "3": {"head_dim": 32, "num_key_value_heads": 1},
        },
    }
    spelled = with_every_spelling(config)
    assert (spelled["global_head_dim"], spelled["num_global_key_value_heads"]) == (32, 1)
    for changed in (
        {"model_type": "llama"},
        {"per_layer_config": {"1": {"head_dim": 32}}},
        {"per_layer_config": {"1": {"head_dim": 32}, "3": {"head_dim": 16}}},
        {"per_layer_config": {"1": {"hidden_size": 32}, "3": {"hidden_size": 32}}},
    ):
        with pytest.raises(ModelLoadError, match="per_layer_config"):
            with_every_spelling({**config, **changed})


def test_kinds_of_layers_that_do_not_repeat_are_refused_where_only_a_pattern_can_be_told() -> None:
    config = {"model_type": "cohere2", "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}
    with pytest.raises(ModelLoadError, match="layer_types that do not repeat"):
        with_every_spelling(config)
    assert with_every_spelling({**config, "model_type": "llama"})["layer_types"] == config["layer_types"]


_LONG = {"rope_type": "longrope", "long_factor": [2.0, 3.0], "short_factor": [1.0, 1.5], "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("length", "factors", "context"), [(None, "long", 4096), (2048, "long", 4096), (512, "short", 1024)]
)
def test_longrope_turns_as_for_the_longest_sequence_asked_for(
    tmp_path: Path, length: int | None, factors: str, context: int
) -> None:
    words = {**_LONG, "original_max_position_embeddings": 1024}
    config = {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 9, "rope_parameters": words}
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = read_model_config(ResolvedModel("m", tmp_path, "folder"), EngineArgs("m", max_model_len=length))
    rope = main_rope(rope_settings(read.hf_config))
    assert rope is not None
    assert rope.parameters["long_factor"] == words[f"{factors}_factor"]
    assert read.context_length == context
    assert [bool("as for sequences over 1024 tokens" in note) for note in read.notes] == [True] * (factors == "long")


def test_longrope_of_a_model_that_was_never_stretched_turns_as_for_short_sequences() -> None:
    config = {"model_type": "minicpm3", "max_position_embeddings": 1024, "rope_scaling": {**_LONG, "rope_theta": 1e4}}
    assert with_every_spelling(config)["rope_scaling"]["long_factor"] == _LONG["short_factor"]


def test_dynamic_contexts_end_where_it_would_begin_to_turn_otherwise(tmp_path: Path) -> None:
    config = {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 9, "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_scaling": {"type": "dynamic", "factor": 4.0}}))
    read = read_model_config(ResolvedModel("m", tmp_path, "folder"), EngineArgs("m"))
    assert read.context_length == 4096
    assert read.hf_config["rope_scaling"] is None
    assert "contexts end at 4096 tokens" in read.notes[0]


def test_an_unknown_type_is_refused_with_the_models_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "rope_parameters": {"rope_type": "spiral"}})
    )
    with pytest.raises(ModelLoadError, match=r"^tiny: RoPE type 'spiral'.*yarn"):
        read_model_config(ResolvedModel("tiny", tmp_path, "folder"), EngineArgs("tiny"))
