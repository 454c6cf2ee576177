"""What mlx-lm makes of the RoPE in configurations that transformers 5 saved, by itself and told by the engine."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mlx_lm.utils import _get_classes

from engine.errors import ModelLoadError
from engine.models.model_config import ModelConfig
from engine.models.spelling import with_every_spelling
from engine.runner.load.abstract_model import build_abstract_model
from engine.runner.load.rope_layers import angles_of, rotary_layers
from tests.checkpoints.saved_again import (
    SCALINGS,
    Angles,
    angles_by_kind,
    known_to_transformers,
    original_config,
    refused_by_transformers,
    saved_again,
)

OWN_VALUES = {"mimo_v2_flash", "muse_glimmer", "recurrent_gemma", "gptj"}
"""Types whose class of transformers puts values of its own in place of those of a tiny configuration."""
OWN_SCALING = {"gemma4", "gemma4_text"}
_NO_LAYERS = {"nanochat"}


class Layer(NamedTuple):
    """A rotary layer of the decoder's layer ``number``."""

    number: int | None
    angles: Angles


def compared_types() -> list[str]:
    """Model types of both libraries that have rotary layers."""
    return sorted(set(known_to_transformers()) - OWN_VALUES - _NO_LAYERS)


def scalings_of(name: str) -> dict[str, dict[str, Any]]:
    """Those of :data:`SCALINGS` that transformers has for a type."""
    if name in OWN_SCALING:
        return {"default": SCALINGS["default"]}
    return {kind: words for kind, words in SCALINGS.items() if not refused_by_transformers(name, words)}


def model_config(hf_config: Mapping[str, Any]) -> ModelConfig:
    """As the engine reads ``hf_config`` from a file."""
    spelled = with_every_spelling(hf_config)
    return ModelConfig("tiny", Path(), spelled, {}, 4096, 199, frozenset(), str(hf_config["model_type"]))


def engine_angles(hf_config: Mapping[str, Any]) -> list[Layer]:
    """Of each rotary layer of the model that the engine builds."""
    return _layers(build_abstract_model(model_config(hf_config)))


def mlx_lm_angles(hf_config: Mapping[str, Any]) -> list[Layer]:
    """Of each rotary layer of the model that mlx-lm builds by itself."""
    kind, arguments = _get_classes(dict(hf_config))
    return _layers(kind(arguments.from_dict(dict(hf_config))))


def same_angles(one: Angles, other: Angles) -> bool:
    """Within what float32 powers differ by."""
    return (
        one[0].shape == other[0].shape
        and bool(np.allclose(one[0], other[0], rtol=2e-4, atol=1e-9))
        and abs(one[1] - other[1]) < 2e-4
    )


def turn_as(theirs: Any, layers: Sequence[Layer]) -> bool:
    """Whether each of ``layers`` turns as layers of its kind do by transformers' own functions."""
    return all(any(same_angles(layer.angles, told) for told in _told(theirs, layer)) for layer in layers)


@cache
def saved_cases() -> tuple[tuple[str, str, dict[str, Any], Any], ...]:
    """Type, scaling, configuration as transformers 5 saves it, and its own object: every one that it has."""
    found = []
    for name in compared_types():
        dims = smallest(engine_angles(saved_again(original_config(name, {}), name)[0]))
        for kind, scaling in scalings_of(name).items():
            saved, theirs = saved_again(original_config(name, scaling, dims), name)
            if kind == "yarn of fractions" and theirs.nested_rope_parameter_keys(theirs.rope_parameters):
                continue  # transformers looks for `truncate` beside the kinds of layers, not in them
            found.append((name, kind, saved, theirs))
    return tuple(found)


def outcomes(angles: Callable[[Mapping[str, Any]], list[Layer]]) -> dict[str, dict[str, list[str]]]:
    """Scaling -> ``right``, ``wrong`` or ``fails`` -> the types whose saved configurations come out so."""
    found: dict[str, dict[str, list[str]]] = {kind: {"right": [], "wrong": [], "fails": []} for kind in SCALINGS}
    for name, kind, saved, theirs in saved_cases():
        try:
            result = "right" if turn_as(theirs, angles(copy.deepcopy(saved))) else "wrong"
        except (ModelLoadError, KeyError, TypeError, ValueError, AttributeError):
            result = "fails"
        found[kind][result].append(name)
    return found


def smallest(layers: Sequence[Layer]) -> int:
    """Elements of a head that turn where the fewest do."""
    return 2 * min(layer.angles[0].size for layer in layers)


def _told(theirs: Any, layer: Layer) -> list[Angles]:
    """What a layer of its kind does; where its kind cannot be told, what any does."""
    try:
        by_kind = angles_by_kind(theirs, 2 * layer.angles[0].size)
    except ValueError:  # factors for another number of elements
        return []
    kinds = getattr(theirs, "layer_types", None) or []
    kind = kinds[layer.number] if layer.number is not None and layer.number < len(kinds) else None
    return [by_kind[kind]] if kind in by_kind else list(by_kind.values())


def _layers(model: Any) -> list[Layer]:
    found = [(place.number, angles_of(place.layer)) for place in rotary_layers(model)]
    assert all(angles is not None for _, angles in found), "a rotary layer that does not keep its angles"
    return [Layer(number, angles) for number, angles in found if angles is not None]
