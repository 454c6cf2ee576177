"""A model's rotary layers turn as its configuration tells, in whatever words: the oracle is transformers itself."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.rope_utils import YarnRoPE
from mlx_lm.utils import _get_classes

from engine.errors import ModelLoadError
from engine.models.rope import rope_settings
from engine.models.spelling import with_every_spelling
from engine.runner.load.abstract_model import build_abstract_model
from engine.runner.load.rope_layers import angles_of, angles_told, rotary_layers
from tests.checkpoints.ropes import (
    compared_types,
    engine_angles,
    model_config,
    same_angles,
    scalings_of,
    smallest,
    turn_as,
)
from tests.checkpoints.saved_again import BASE, SCALINGS, original_config, saved_again
from tests.sweep.configurations import tiny_config

_OWN_DEFAULTS = {"apertus", "gemma4", "gemma4_text", "gpt_oss", "laguna", "mellum"}
"""Types whose class of transformers takes another RoPE than the plain one where a configuration tells none."""
_NOT_OLD = {"laguna", "mellum", "olmo3"}
"""Types younger than the older words, and one whose class of transformers gives layers with windows its own base where
``rope_theta`` stands outside of ``rope_parameters``."""
_REFUSED = {("gpt_oss", "longrope"), ("bailing_hybrid", "longrope"), ("laguna", "longrope")}
"""What mlx-lm's layers cannot be made for: the first passes no length on, the others turn parts of two sizes."""


@pytest.mark.parametrize("name", compared_types())
def test_layers_turn_as_transformers_turns_them_in_old_words_and_in_new(name: str) -> None:
    plain = engine_angles(saved_again(original_config(name, {}), name)[0])
    assert plain, "no rotary layers"
    for kind, scaling in scalings_of(name).items():
        original = original_config(name, scaling, smallest(plain))
        saved, theirs = saved_again(original, name)
        if (name, kind) in _REFUSED:
            with pytest.raises(ModelLoadError):
                engine_angles(saved)
            continue
        if kind == "yarn of fractions" and theirs.nested_rope_parameter_keys(theirs.rope_parameters):
            continue  # transformers looks for `truncate` beside the kinds of layers, not in them
        assert turn_as(theirs, engine_angles(saved)), f"{kind}, as saved again"
        if name not in _NOT_OLD and (name not in _OWN_DEFAULTS or kind != "default"):
            assert turn_as(theirs, engine_angles(original)), f"{kind}, as first written"


def test_most_of_the_types_with_rotary_layers_are_compared() -> None:
    assert len(compared_types()) >= 75


@pytest.mark.parametrize("name", ["Klear", "bailing_moe", "deepseek", "internlm2", "minicpm", "plamo", "telechat3"])
@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_types_that_transformers_lacks_turn_alike_in_old_words_and_in_new(name: str, kind: str) -> None:
    scaling = SCALINGS[kind]
    original = {**tiny_config(name), "rope_theta": BASE, "rope_scaling": scaling, "max_position_embeddings": 4096}
    new = {entry: value for entry, value in original.items() if entry not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {**scaling, "rope_theta": BASE}
    one, other = engine_angles(original), engine_angles(new)
    (rope,) = rope_settings(new).values()
    for found, again in zip(one, other, strict=True):
        told = angles_told(rope, 2 * found.angles[0].size)
        assert told is not None
        assert same_angles(found.angles, told)
        assert same_angles(again.angles, told)


def test_a_layer_that_rounds_the_bounds_of_yarn_gets_the_exactengine_angles() -> None:
    scaling = {**SCALINGS["yarn"], "truncate": False}
    config = {**tiny_config("gpt_oss"), "rope_theta": 150000.0, "rope_scaling": scaling}
    kind, args = _get_classes(config)
    rounded = [angles_of(place.layer) for place in rotary_layers(kind(args.from_dict(with_every_spelling(config))))]
    exact = engine_angles(config)
    assert not any(
        found is not None and same_angles(found, told.angles) for found, told in zip(rounded, exact, strict=True)
    )


def test_a_part_of_a_head_turns_where_the_model_file_turns_all_of_it() -> None:
    config = {**tiny_config("glm"), "head_dim": 16, "rope_parameters": {"rope_theta": BASE}}
    assert {layer.angles[0].size for layer in engine_angles(config)} == {8}
    config["rope_parameters"]["partial_rotary_factor"] = 0.5
    assert {layer.angles[0].size for layer in engine_angles(config)} == {4}


def test_a_mended_layer_is_mlx_lms_own_and_turns_neighbours_as_before() -> None:
    config = {**tiny_config("cohere"), "rope_theta": BASE, "rope_scaling": SCALINGS["llama3"]}
    layers = [place.layer for place in rotary_layers(build_abstract_model(model_config(config)))]
    assert all(type(layer) is YarnRoPE and layer.traditional for layer in layers)
    x = mx.random.normal((1, 1, 3, layers[0].dims), key=mx.random.key(0))
    turned, (angles, _) = np.array(layers[0](x, offset=5)), angles_of(layers[0]) or (np.zeros(0), 0.0)
    at = (np.arange(5, 8)[:, None] * angles).astype(np.float32)
    even, odd = np.array(x)[0, 0, :, 0::2], np.array(x)[0, 0, :, 1::2]
    np.testing.assert_allclose(turned[0, 0, :, 0::2], even * np.cos(at) - odd * np.sin(at), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nanochat", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("llama", {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}),
        ("glm", {"rope_scaling": {"type": "longrope", "long_factor": [1.0] * 3, "short_factor": [1.0] * 3}}),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(name: str, words: dict[str, Any]) -> None:
    kind = words["rope_scaling"].get("rope_type", "long")
    with pytest.raises(ModelLoadError, match=kind):
        build_abstract_model(model_config({**tiny_config(name), "rope_theta": BASE, **words}))
