"""Names of a GGUF model in several files: ``NAME-00001-of-00003.gguf`` and so on."""

import re
from collections.abc import Iterable

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)


def parts_of(name: str) -> list[str]:
    """All files of the model that ``name`` is one file of, the first one first; of a whole file only itself."""
    match = _PART.search(name)
    if match is None:
        return [name]
    start, suffix = name[: match.start()], name[-len(".gguf") :]
    return [f"{start}-{number:05d}-of-{match[2]}{suffix}" for number in range(1, int(match[2]) + 1)]


def one_name_each(names: Iterable[str]) -> list[str]:
    """The models that these files are: each by its first file, whether that is among them or not."""
    return list(dict.fromkeys(parts_of(name)[0] for name in names))
