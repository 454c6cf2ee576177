"""The format of llama.cpp's models: a GGUF file with everything in it (or its parts), alone or several in a folder."""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ModelNotFoundError
from engine.models.gguf_split import one_name_each, parts_of
from engine.models.weight_format import TOKENIZER_FILES, CachedModel, TokenizerSource, Wanted, WeightFormat

if TYPE_CHECKING:
    from engine.models.gguf_file import GGUFFile

_SUFFIX = ".gguf"
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""Keys under ``general.sampling.``, and what ``generation_config.json`` calls them."""
_QUANT = re.compile(r"(?:^|[-._])((?:I?Q\d|TQ\d|BF16|F16|FP16|F32|MXFP4)\w*)(?=[-.]|$)", re.IGNORECASE)


class GGUFFormat(WeightFormat):
    """A GGUF file. The library that reads it is imported when one is read."""

    kind = "gguf"
    file_suffix = _SUFFIX
    sampling_source = "general.sampling"

    def claims(self, folder: Path, wanted: Wanted) -> bool:
        """Where a quantization is named, or the folder has GGUF files and nothing else."""
        return bool(wanted.quant) or (not (folder / "config.json").is_file() and any(_found(folder)))

    def missing(self, folder: Path, wanted: Wanted) -> list[str]:
        """A file of the quantization; of a folder without one, a tokenizer's own files."""
        if quant := wanted.quant:
            files = _files(folder)
            own = [name for name in files if quant.lower() in name.lower()]
            parts = {part for name in own for part in parts_of(name)}
            return sorted(parts.difference(files)) if own else [f"*{quant}*{_SUFFIX}"]
        if wanted.part == "tokenizer":
            return [] if any((folder / name).is_file() for name in TOKENIZER_FILES) else ["tokenizer.json"]
        return []

    def open(self, folder: Path, wanted: Wanted) -> Path:
        """The one file that is meant, of several parts the first."""
        return folder / pick_gguf(wanted.model, _files(folder), wanted.quant)

    def to_download(self, files: Sequence[str], wanted: Wanted) -> list[str] | None:
        """The one file that is meant, with all its parts."""
        ggufs = [name for name in files if name.endswith(_SUFFIX)]
        return parts_of(pick_gguf(wanted.model, ggufs, wanted.quant)) if wanted.quant or ggufs else None

    def cached(self, name: str, folder: Path) -> Iterator[CachedModel]:
        """Each file, by its quantization where it is not alone."""
        files = [file for file in _files(folder) if not Path(file).name.lower().startswith("mmproj")]
        ggufs = one_name_each(files)
        alone = len(ggufs) == 1 and not (folder / "config.json").is_file()
        for file in ggufs:
            size = sum((folder / part).stat().st_size for part in parts_of(file) if (folder / part).is_file())
            yield CachedModel(name if alone else f"{name}:{_quant_of(file)}", folder / file, size, self.kind)

    def config(self, path: Path) -> dict[str, Any]:
        """Made from the file's metadata."""
        from engine.models.gguf_config import gguf_config

        return gguf_config(_open(path))

    def generation_config(self, path: Path) -> dict[str, Any]:
        """The sampling values that the file's header recommends; llama.cpp's converter copies them there."""
        metadata = _open(path).metadata
        named = {ours: metadata.get(f"general.sampling.{key}") for key, ours in _SAMPLING.items()}
        numbers = {ours: value for ours, value in named.items() if isinstance(value, int | float)}
        values = {ours: _short(value) for ours, value in numbers.items() if math.isfinite(value)}
        if "temperature" in values:
            values["temperature"] = max(values["temperature"], 0)  # below 0 is greedy there, too
        return values

    def tokenizer_source(self, path: Path) -> TokenizerSource:
        """The file's metadata."""
        return TokenizerSource(path.parent, _open(path).metadata)

    def end_token_ids(self, path: Path) -> frozenset[int]:
        """The file's own, and control tokens with a turn-ending name."""
        return _open(path).end_token_ids()


def pick_gguf(model: str, names: Sequence[str], quant: str) -> str:
    """The one GGUF file name that carries ``quant`` (or the only one), of several parts the first's.

    Errors name what there is.
    """
    files = one_name_each(name for name in names if not Path(name).name.lower().startswith("mmproj"))
    mark = re.compile(rf"(?<![A-Za-z0-9]){re.escape(quant)}(?![A-Za-z0-9_])", re.IGNORECASE)
    matching = [name for name in files if not quant or mark.search(Path(name).name)]
    if len(matching) == 1:
        return matching[0]
    base = model.removesuffix(f":{quant}") if quant else model
    choices = ", ".join(f"{base}:{name}" for name in sorted({_quant_of(file) for file in files})) or "none"
    problem = f"{'several' if matching else 'no'} GGUF files{f' of {quant}' if quant else ''}"
    raise ModelNotFoundError(f"{model}: {problem}; there are: {choices}")


def _short(value: float) -> float:
    """A float32 of the header as the decimal number that was written: 0.95, not 0.949999988."""
    return value if isinstance(value, int) else float(f"{value:.7g}")


def _open(path: Path) -> "GGUFFile":
    from engine.models.gguf_file import open_gguf

    return open_gguf(path)


def _files(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in _found(folder))


def _found(folder: Path) -> Iterator[Path]:
    """Files in ``folder`` and in its folders, where hubs put quantizations of many parts: not the whole disk."""
    return itertools.chain.from_iterable(folder.glob(f"{above}*{_SUFFIX}") for above in ("", "*/", "*/*/"))


def _quant_of(name: str) -> str:
    """The quantization in a GGUF file's name (``Q4_K_M``), or its stem."""
    marks = _QUANT.findall(Path(name).name.removesuffix(_SUFFIX))
    return str(marks[-1]) if marks else Path(name).stem
