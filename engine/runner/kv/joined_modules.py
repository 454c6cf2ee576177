"""Modules of a loaded model that compute otherwise over joined weights: each kind is tried on one of its modules."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, Literal, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from engine.errors import error_line
from engine.runner.device.devices import DeviceKind
from engine.runner.kernels.swapped_modules import SwappedModules

Fused = TypeVar("Fused")
OwnProducts = Literal["all", "few", "none"]
"""Which products are this project's kernels: of few rows and those that split K, of few rows alone, or none."""


class JoinedModules(ABC, Generic[Fused]):
    """Choose, then install before a step is compiled. ``name`` and ``counted`` are said in :attr:`note`."""

    name: str
    counted: str
    left_out: Mapping[OwnProducts, str]
    """What is to be said where a way is wrong, in the order in which ways are tried."""
    unjoined: str
    """The same where there is no memory to join a module's weights."""

    def __init__(self, modules: Iterable[nn.Module], device_kind: DeviceKind) -> None:
        self.modules: list[Any] = list(modules)
        self._ways: tuple[OwnProducts, ...] = tuple(self.left_out) if device_kind == "cuda" else ("none",)
        self.fused: list[Fused | None] = []
        """Of each module, once chosen; None where it computes as it did."""
        self.swapped = SwappedModules()
        self.problems: tuple[str, ...] = ()
        """Why modules are as they were, or not with all kernels: a line each."""

    @abstractmethod
    def refused(self, module: Any) -> str | None:
        """Why the weights of ``module`` cannot be joined, None if they can."""

    @abstractmethod
    def join(self, module: Any, own: OwnProducts) -> Fused:
        """What computes in its place; joins its weights. Raises RuntimeError where there is no memory for that."""

    @abstractmethod
    def wrong(self, module: Any, fused: Fused) -> str | None:
        """What ``fused`` gives otherwise than mlx-lm's own code, on random rows."""

    @abstractmethod
    def swap(self) -> None:
        """Swap what was chosen into the model."""

    def joined(self, module: Any) -> list[nn.Module]:
        """The modules within ``module`` whose products are computed otherwise."""
        return [one for _, one in module.named_modules()]

    def kind(self, module: Any) -> tuple[object, ...]:
        """What modules have in common that are computed by the same kernels."""
        shapes = [(name, value.shape, value.dtype) for name, value in tree_flatten(module.parameters())]
        packed = [(getattr(one, "bits", 0), getattr(one, "group_size", 0)) for _, one in module.named_modules()]
        return type(module), *shapes, *packed

    @property
    def chosen(self) -> list[tuple[Any, Fused]]:
        """The modules that compute otherwise, and by what."""
        both = zip(self.modules, self.fused, strict=False)
        return [(module, fused) for module, fused in both if fused is not None]

    def choose(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Try one module of each kind, and join the weights of those that are right. Raises nothing.

        ``progress(done, total)`` counts modules.
        """
        found: dict[tuple[object, ...], tuple[str | None, OwnProducts]] = {}
        problems: dict[str, None] = {}
        self.fused = []
        for number, module in enumerate(self.modules, 1):
            kind = self.kind(module)
            if kind not in found:
                found[kind] = self._tried(module, problems)
            problem, own = found[kind]
            right = problem is None and self.refused(module) is None
            self.fused.append(self._joined(module, own, problems) if right else None)
            if progress is not None:
                progress(number, len(self.modules))
        self.problems = tuple(problems)

    @property
    def note(self) -> str | None:
        """One line for people; None where there are no such modules."""
        if not self.modules:
            return None
        return "; ".join([f"{self.name}: {len(self.chosen)} of {len(self.modules)}{self.counted}", *self.problems])

    @property
    def products(self) -> frozenset[int]:
        """Ids of the modules whose products are not computed for few rows any more.

        Packed weights stay out: MLX's product of them starts slowly, and short prompts go by them.
        """
        joined = [one for module, _ in self.chosen for one in self.joined(module)]
        return frozenset(id(one) for one in joined if type(one) is nn.Linear)

    def install(self) -> None:
        """Swap what was chosen into the model."""
        self.remove()
        self.swap()

    def remove(self) -> None:
        """Leave every module as it was; its weights stay slices of joined ones."""
        self.swapped.undo()

    def _tried(self, module: Any, problems: dict[str, None]) -> tuple[str | None, OwnProducts]:
        """Why modules like this one are as they were, and which kernels of products are right."""
        said: str | None = None
        for own in self._ways:
            problem = self._problem(module, own)
            if problem is None:
                break
            said = f"{self.left_out[own]}: {problem}"
        if said is not None:
            problems[said] = None
        return problem, own

    def _problem(self, module: Any, own: OwnProducts) -> str | None:
        try:
            return self.refused(module) or self.wrong(module, self._join(module, own))
        except Exception as error:  # noqa: BLE001  (whatever stops it, the modules have mlx-lm's own way)
            return error_line(error)

    def _join(self, module: Any, own: OwnProducts) -> Fused:
        fused = self.join(module, own)
        mx.clear_cache()  # of the weights that are joined now
        return fused

    def _joined(self, module: Any, own: OwnProducts, problems: dict[str, None]) -> Fused | None:
        """A module like one that was right, with its weights joined, if there is memory for that."""
        try:
            return self._join(module, own)
        except RuntimeError as error:
            problems[f"{self.unjoined}: {' '.join(str(error).split())[:160]}"] = None
            return None


def each_once(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """A module that stands in several places is joined once."""
    return list({id(module): module for module in modules}.values())
