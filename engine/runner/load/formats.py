"""The readers of weights, by the ``kind`` of the format (``engine/models/formats.py``)."""

from engine.runner.load.folder import FolderWeights
from engine.runner.load.gguf import GGUFWeights
from engine.runner.load.weight_reader import WeightReader

WEIGHT_READERS: dict[str, WeightReader] = {"folder": FolderWeights(), "gguf": GGUFWeights()}
