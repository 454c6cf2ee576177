"""What reads the weights of one format into an mlx-lm model. To add a format, write one of these."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import mlx.nn as nn

from engine.models.local import ResolvedModel
from engine.models.model_config import ModelConfig
from engine.models.pypi import Progress
from engine.params.engine_args import EngineArgs
from engine.runner.device.devices import Device
from engine.runner.load.abstract_model import AbstractModel


@dataclass(frozen=True, slots=True)
class PreparedWeights:
    """Weights that are about to be read: ``num_bytes`` of them on the device.

    ``abstract`` gives the model without them; ``read`` reads them, tells its progress in bytes and gives the model;
    ``describe`` describes in a few words how that model holds them.
    """

    num_bytes: int
    abstract: Callable[[], nn.Module]
    read: Callable[[Progress], nn.Module]
    describe: Callable[[nn.Module], str]


class WeightReader(ABC):
    """Reads the weights of one format, in the element type that runs best on a device or in ``--dtype``."""

    @abstractmethod
    def abstract(self, resolved: ResolvedModel, config: ModelConfig, args: EngineArgs, device: Device) -> AbstractModel:
        """The model as :meth:`prepare` and a load would give it, and its bytes, from headers alone."""

    @abstractmethod
    def prepare(
        self, resolved: ResolvedModel, config: ModelConfig, args: EngineArgs, device: Device
    ) -> PreparedWeights:
        """Decide on element types and bytes; read no weights."""
