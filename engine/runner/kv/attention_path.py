"""Which way each kind of layer attends to what is kept, and how that is said in one line. No MLX."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from engine.memory.cache_spec import KVCacheSpec, StateSpec

Way = Literal["paged", "reference", "contiguous"]
NO_KERNELS_ON_CPU = "no GPU kernels on a CPU"
_HOW = {
    "paged": "pages read in place by kernels",
    "slots": "states moved on in place by kernels",
    "reference": "MLX's own operations",
    "contiguous": "mlx-lm's contiguous caches",
}


@dataclass(frozen=True, slots=True)
class AttentionPath:
    """Layers of one ``kind`` (as in a plan's groups) and what reads their cache; ``why`` no kernels do, for people."""

    kind: str
    layers: tuple[int, ...]
    backend: Way
    why: str = ""

    @classmethod
    def of_group(cls, group: KVCacheSpec, backend: Way, why: str = "") -> Self:
        """The path of a plan's group. A layer with several caches of one kind counts once."""
        return cls(group.kind, tuple(dict.fromkeys(group.layers)), backend, why)

    def __str__(self) -> str:
        return f"{len(self.layers)} layer{'s' * (len(self.layers) != 1)} {self.kind}"


def describe(paths: Sequence[AttentionPath]) -> str:
    """``paths`` in one line, such as "pages read in place by kernels (36 layers full)"."""
    alike: dict[tuple[str, str], list[AttentionPath]] = {}
    for path in paths:
        how = "slots" if path.backend == "paged" and path.kind == StateSpec.kind else path.backend
        alike.setdefault((how, path.why), []).append(path)
    return "; ".join(_part(how, why, some) for (how, why), some in alike.items())


def _part(how: str, why: str, paths: Sequence[AttentionPath]) -> str:
    if how == "contiguous" and why:  # it names them
        return why
    return f"{_HOW[how]} ({', '.join(map(str, paths))}{': ' * bool(why)}{why})"
