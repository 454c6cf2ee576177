"""Which classes of mlx-lm a configuration is for, and what they say without being built."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import mlx.nn as nn


@dataclass(frozen=True, slots=True)
class ModelClasses:
    """The model's class and that of its arguments."""

    model: type[Any]
    arguments: type[Any]

    @property
    def module(self) -> str:
        """The file of mlx-lm that has them: ``llama``."""
        return self.model.__module__.rpartition(".")[2]

    def default(self, name: str) -> Any:
        """What the argument ``name`` is where a configuration leaves it out; None if there is no such default."""
        found = fields(self.arguments) if is_dataclass(self.arguments) else ()
        value = next((field.default for field in found if field.name == name), None)
        return value if isinstance(value, int | float | str) else None


def model_classes(config: Mapping[str, Any]) -> ModelClasses:
    """The classes that mlx-lm takes for ``config``. Raises ValueError for a type that it has not or cannot run."""
    utils = importlib.import_module("mlx_lm.utils")
    try:
        return ModelClasses(*utils._get_classes(dict(config)))
    except SystemExit:  # see check_architecture
        raise ValueError(f"{config['model_type']} needs a package that is not installed") from None


def num_parameters(model: nn.Module) -> int:
    """Parameters, of packed weights those that they stand for."""
    utils = importlib.import_module("mlx_lm.utils")
    return int(utils.get_total_parameters(model))
