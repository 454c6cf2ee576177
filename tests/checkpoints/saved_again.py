"""Configurations as transformers 5 writes them, and the angles that its own functions give for them.

Those functions want PyTorch, of which they use a dozen names; NumPy stands in.
"""

import copy
import json
import logging
import warnings
from contextlib import AbstractContextManager
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from transformers import modeling_rope_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.sweep.configurations import tiny_config
from tests.sweep.models import model_files

BASE = 54321.0
_ORIGINAL, _LENGTH = 1024, 4096
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": _ORIGINAL},
    "yarn of fractions": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": _ORIGINAL, "truncate": False,
        "attention_factor": 1.25,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": _ORIGINAL,
    },
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": _ORIGINAL},
}  # fmt: skip
"""Name -> ``rope_scaling``. The factors of longrope follow from the layers."""

Angles = tuple[NDArray[np.float64], float]


@cache
def known_to_transformers() -> tuple[str, ...]:
    """Model files of mlx-lm whose type transformers has too, and can make from a tiny configuration."""
    return tuple(name for name in model_files() if _their_type(name) in CONFIG_MAPPING and _can_be_made(name))


def original_config(name: str, scaling: dict[str, Any], dims: int = 0) -> dict[str, Any]:
    """``config.json`` of a tiny model as authors wrote it before transformers 5, with ``dims`` elements that turn."""
    config = tiny_config(name)
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    for entry in ("rope_parameters", "rope_scaling"):
        text.pop(entry, None)
    words = dict(scaling)
    if "stral" in name:
        words |= {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": _ORIGINAL}
    if scaling.get("rope_type") == "longrope":
        words |= {"short_factor": [1.0] * (dims // 2), "long_factor": [1 + 0.3 * i for i in range(dims // 2)]}
        if name in ("phi3", "phimoe"):
            words["type"] = "longrope"
            text["original_max_position_embeddings"] = _ORIGINAL
        if name == "phimoe":
            words |= {"short_mscale": 1.0954451150103321, "long_mscale": 1.0954451150103321}
    text |= {"rope_theta": BASE, "max_position_embeddings": _LENGTH} | ({"rope_scaling": words} if words else {})
    if name == "gpt_neox":
        text |= {"rotary_emb_base": text.pop("rope_theta"), "rotary_pct": 0.25}
    if name in ("glm", "phi"):
        text["partial_rotary_factor"] = 0.5
    if name == "exaone4":
        text["layer_types"] = ["sliding_attention", "full_attention"] * 2
    if name.startswith("gemma4"):
        text["layer_types"] = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    return config


def saved_again(config: dict[str, Any], name: str) -> tuple[dict[str, Any], Any]:
    """``config.json`` as transformers 5 writes it after reading ``config``, and its own object for the text model."""
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it remarks on the size of a tiny model
    with warnings.catch_warnings(action="ignore"):
        theirs = CONFIG_MAPPING[_their_type(name)](**copy.deepcopy(config))
        saved: dict[str, Any] = json.loads(theirs.to_json_string())
        return {**saved, "model_type": config["model_type"]}, theirs.get_text_config()


def angles_by_kind(theirs: Any, dims: int) -> dict[str | None, Angles]:
    """By kind of layers: radians per position for ``dims`` elements that turn, and the factor of attention."""
    theirs, found = copy.deepcopy(theirs), {}
    if theirs.is_heterogeneous:
        theirs.allow_global_per_layer_attribute_access = True
    for kind in theirs.nested_rope_parameter_keys(theirs.rope_parameters) or [None]:
        words = theirs.rope_parameters if kind is None else theirs.rope_parameters[kind]
        if words["rope_type"] == "default":
            found[kind] = words["rope_theta"] ** -(np.arange(0, dims, 2) / dims), 1.0
            continue
        if words["rope_type"] != "proportional":
            words["partial_rotary_factor"] = 1.0
        theirs.head_dim = theirs.global_head_dim = dims
        longer = {"seq_len": _LENGTH} if words["rope_type"] == "longrope" else {}
        with _numpy_for_torch():
            function = modeling_rope_utils.ROPE_INIT_FUNCTIONS[words["rope_type"]]
            inverse, factor = function(theirs, None, layer_type=kind, **longer)
        found[kind] = np.asarray(inverse, np.float64), float(factor)
    return found


class _Tensor(np.ndarray):
    def to(self, *_: Any, **__: Any) -> "_Tensor":
        return self.astype(np.float64).view(_Tensor)

    def float(self) -> "_Tensor":
        return self.to()


def _tensor(values: Any, **_: Any) -> _Tensor:
    return np.asarray(values, np.float64).view(_Tensor)


def _numpy_for_torch() -> AbstractContextManager[Any]:
    stand_in = SimpleNamespace(
        float=float, float32=float, int64=int, Tensor=_Tensor, tensor=_tensor,
        arange=lambda *bounds, **_: _tensor(np.arange(*bounds)),
        where=lambda wanted, one, other: _tensor(np.where(wanted, one, other)),
        clamp=lambda values, low, high: _tensor(np.clip(values, low, high)),
        cat=lambda parts, **_: _tensor(np.concatenate(parts)),
        zeros=lambda size, **_: _tensor(np.zeros(size)),
    )  # fmt: skip
    return patch.object(modeling_rope_utils, "torch", stand_in, create=True)


def _their_type(name: str) -> str:
    return name if name in CONFIG_MAPPING else name.replace("-", "_")


def _can_be_made(name: str) -> bool:
    try:
        theirs = saved_again(original_config(name, {}), name)[1]
    except (Exception, SystemExit):  # noqa: BLE001  (either library may refuse a tiny shape in any way)
        return False
    return bool(getattr(theirs, "rope_parameters", None))


def refused_by_transformers(name: str, scaling: dict[str, Any]) -> bool:
    """Whether transformers itself has no such model."""
    try:
        saved_again(original_config(name, scaling, 8), name)
    except Exception:  # noqa: BLE001  (its checks raise errors of many kinds)
        return True
    return False
