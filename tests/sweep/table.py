"""``notebooks/supported_models.md``: what the sweep found, as the documentation shows it."""

import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from mlx_lm.utils import MODEL_REMAPPING

from tests.sweep.models import Row, helper_files

TABLE = Path(__file__).resolve().parents[2] / "notebooks" / "supported_models.md"
COMMAND = "python -m tests.sweep"
_KINDS = ("paged", "contiguous", "not runnable")
_HEAD = """\
# Supported models

Every model file of mlx-lm {version}, run with a tiny random configuration on a CPU and compared with mlx-lm's own
greedy tokens: {counts}. Written by `{command}`.

* **Memory**: what layers keep for a sequence. *full*: pages for every token; *sliding*: pages of the last window (or
  chunk); *latent*: compressed pages (MLA); *state*: one slot; *shared*: some layers read others' pages. For contiguous
  models the names of mlx-lm's caches.
* **Paged** models share one pool of pages, with prefix caching. *flat*: one call a step for all requests;
  *rectangles*: one call for all that generate, one for each chunk of a prompt; *sequences*: a call for each request.
* **Contiguous** models run on mlx-lm's own caches behind the same scheduler and port, without prefix caching.

| model type | memory | runs | note |
| --- | --- | --- | --- |
"""


def render(rows: Sequence[Row]) -> str:
    """The file's text for ``rows``."""
    counts = ", ".join(f"{sum(row.how == kind for row in rows)} {kind}" for kind in _KINDS)
    head = _HEAD.format(version=metadata.version("mlx-lm"), counts=counts, command=COMMAND)
    lines = [f"| {_names(row.name)} | {row.groups} | {row.how} | {row.note.replace('|', '/')} |" for row in rows]
    helpers = ", ".join(f"`{name}`" for name in helper_files())
    return head + "\n".join(lines) + f"\n\nHelper files without a model: {helpers}.\n"


def written_version(text: str) -> str | None:
    """The mlx-lm version that a table names."""
    found = re.search(r"model file of mlx-lm (\S+),", text)
    return found[1] if found else None


def written_names(text: str) -> set[str]:
    """Model files that a table has a row for."""
    return set(re.findall(r"^\| `([^`]+)`", text, re.MULTILINE))


def _names(name: str) -> str:
    others = ", ".join(f"`{other}`" for other, file in sorted(MODEL_REMAPPING.items()) if file == name)
    return f"`{name}`" + (f" ({others})" if others else "")
