"""``notebooks/checkpoints.md``: which folders load, and which are refused in which words."""

import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from tests.checkpoints.folders import LAYOUTS, SAVED
from tests.checkpoints.quantized import CHECKPOINTS, Checkpoint
from tests.checkpoints.ropes import compared_types, engine_angles, mlx_lm_angles, outcomes

TABLE = Path(__file__).resolve().parents[2] / "notebooks" / "checkpoints.md"
COMMAND = "python -m tests.checkpoints"
_LIBRARIES = ("mlx-lm", "transformers", "gguf")
_HEAD = """\
# What checkpoints load

Folders and files as today's tools write them, made tiny and random by `tests/checkpoints/` and tried in every run of
the tests on a CPU: each is planned, loaded, and gives mlx-lm's greedy tokens, or is refused in one line before a weight
is read. Tables of mlx-lm {mlx_lm}, transformers {transformers} and gguf {gguf}; written by `{command}`. What was
understood of a model of your own: `%vllm_metal inspect MODEL`.
"""
_CONFIGURATIONS = """
## Configurations

transformers 5 renames entries when it saves a `config.json`, and mlx-lm reads the names that authors wrote. The engine
reads every spelling and hands mlx-lm all of them; then it asks the model's own rotary layers for their angles, and puts
exact ones in where a model file cannot be told ({count} model types, compared with transformers' own functions):

| RoPE as saved | mlx-lm by itself: right | other angles, without a word | fails | here: right | refused |
| --- | --- | --- | --- | --- | --- |
"""
_CONFIGURATION_NOTES = """
* `longrope` turns short sequences by other factors than long ones. mlx-lm has one set: here the longest sequence that
  may come decides, so `--max-model-len` up to the original length takes the short factors (a line says which).
* `dynamic` changes its angles beyond the stated length, and with them what is cached: contexts end there.
* Refused by name: a type that is not known, layers that do not repeat where mlx-lm can only repeat a pattern, entries
  of single layers (`per_layer_config`) but for the heads of Gemma 4, longrope for gpt-oss.

Saved again and compared token for token:
{saved}.
"""


def render() -> str:
    """The page's text."""
    versions = {name.replace("-", "_"): version for name, version in installed_versions().items()}
    head = _HEAD.format(command=COMMAND, **versions)
    return (
        head + _configurations() + _kinds("Layouts", LAYOUTS) + _kinds("Element types and quantizations", CHECKPOINTS)
    )


def written_versions(text: str) -> dict[str, str]:
    """The libraries of which a page tells."""
    found = re.search(r"Tables of mlx-lm (\S+), transformers (\S+) and gguf (\S+);", text)
    return dict(zip(_LIBRARIES, found.groups(), strict=True)) if found else {}


def installed_versions() -> dict[str, str]:
    """Those that are here."""
    return {name: metadata.version(name) for name in _LIBRARIES}


def _configurations() -> str:
    by_itself, here = outcomes(mlx_lm_angles), outcomes(engine_angles)
    rows = []
    for kind in by_itself:
        alone, ours = ({how: len(names) for how, names in found[kind].items()} for found in (by_itself, here))
        numbers = (alone["right"], alone["wrong"], alone["fails"], ours["right"], ours["fails"])
        assert not ours["wrong"], f"{kind}: {here[kind]['wrong']}"
        rows.append(f"| {kind} | {' | '.join(map(str, numbers))} |")
    saved = ",\n".join(f"`{name}` ({kind})" for name, kind in SAVED.items())
    head = _CONFIGURATIONS.format(count=len(compared_types()))
    return head + "\n".join(rows) + "\n" + _CONFIGURATION_NOTES.format(saved=saved)


def _kinds(title: str, kinds: Mapping[str, Checkpoint]) -> str:
    return f"\n## {title}\n\n| folder | |\n| --- | --- |\n" + "\n".join(_rows(kinds)) + "\n"


def _rows(kinds: Mapping[str, Checkpoint]) -> Iterable[str]:
    for name, kind in kinds.items():
        yield f"| {name} | {'loads' if kind.refused is None else f'refused: {kind.refused}'} |"
