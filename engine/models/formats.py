"""The formats of models that there are."""

from pathlib import Path

from engine.models.folder import FolderFormat
from engine.models.gguf import GGUFFormat
from engine.models.weight_format import Wanted, WeightFormat

FORMATS: tuple[WeightFormat, ...] = (GGUFFormat(), FolderFormat())
"""In the order in which they are asked whether a folder is theirs; the last one takes any. Downloads prefer the
last. To add one: a :class:`WeightFormat` and a line here, a reader of its weights and a line in runner/load."""


def format_of_kind(kind: str) -> WeightFormat:
    """The format that is called ``kind``."""
    return next(one for one in FORMATS if one.kind == kind)


def format_of_folder(folder: Path, wanted: Wanted) -> WeightFormat:
    """The format that ``folder`` is read as."""
    return next(one for one in FORMATS if one.claims(folder, wanted))


def format_of_file(name: str) -> WeightFormat | None:
    """The format of which a file called ``name`` is a whole model."""
    return next((one for one in FORMATS if one.file_suffix and name.endswith(one.file_suffix)), None)
