"""Which architectures there are: mlx-lm's."""

import importlib
from importlib import metadata

from engine.errors import ModelLoadError
from engine.models.model_config import ModelConfig


def check_architecture(config: ModelConfig) -> None:
    """Refuse a model type that mlx-lm does not have."""
    utils = importlib.import_module("mlx_lm.utils")
    if config.hf_config.get("model_file"):
        return
    try:
        utils._get_classes(dict(config.hf_config))
    except ValueError:
        raise ModelLoadError(
            f"{config.name}: model_type {config.model_type!r} is not supported by mlx-lm "
            f"{metadata.version('mlx-lm')}; a newer mlx-lm may have it"
        ) from None
