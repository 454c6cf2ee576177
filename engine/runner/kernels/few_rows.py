"""Products of few rows, swapped into a model's modules where measuring chose another way than MLX's own.

A module keeps its weights and its place; only its class is exchanged for one that looks at the number of rows first,
which is known while MLX traces a compiled step.
"""

from collections.abc import Callable, Container, Sequence

import mlx.core as mx
import mlx.nn as nn

from engine.runner.kernels.product_choice import Choice, Choices, choose, launch_kernels
from engine.runner.kernels.products import (
    METHODS,
    Candidate,
    Flattened,
    Modules,
    OwnKernels,
    Unpacked,
    plain,
    sibling_products,
    single_products,
)
from engine.runner.kernels.swapped_modules import SwappedModules


def candidates_for(device_kind: str) -> tuple[Candidate, ...]:
    """Ways to compute a product that may beat MLX's own on a device. None on a CPU."""
    if device_kind == "cuda":
        return (OwnKernels(), Flattened(), Unpacked())
    # On Metal MLX makes one matrix of rows that are contiguous by itself: a look at a few of them is enough.
    return (Flattened(max_rows=8),) if device_kind == "metal" else ()


class FewRowProducts:
    """The ways that a loaded model's products of few rows are computed.

    ``join_siblings``: queries, keys and values in one launch, and gates with ups, where that is faster. Their weights
    stay where they are. ``skip`` has the ids of modules that are left alone.
    """

    def __init__(
        self,
        model: nn.Module,
        device_kind: str,
        *,
        join_siblings: bool = True,
        candidates: Sequence[Candidate] | None = None,
        skip: Container[int] = (),
    ) -> None:
        self._model = model
        self._skip = skip
        self._candidates = tuple(candidates_for(device_kind) if candidates is None else candidates)
        self._join_siblings = join_siblings
        self._swapped = SwappedModules()
        self.choices = Choices()

    def launch_kernels(self) -> None:
        """Launch the kernels that :meth:`choose` will try; where kernels are only collected, say what to compile."""
        launch_kernels(self._model, self._candidates, siblings=self._join_siblings)

    def choose(self, progress: Callable[[int, int], None] | None = None) -> Choices:
        """Check and measure what this device offers; ``progress(done, total)`` counts products."""
        if self._candidates:
            self.choices = choose(
                self._model, self._candidates, siblings=self._join_siblings, progress=progress, skip=self._skip
            )
        return self.choices

    def install(self, choices: Choices | None = None) -> None:
        """Swap what was chosen, by :meth:`choose` or in ``choices``, into the model's modules."""
        self.remove()
        self.choices = choices or self.choices
        singles = {choice.product: choice for choice in self.choices.singles if choice.chosen}
        families = {choice.product: choice for choice in self.choices.siblings if choice.chosen}
        member: dict[int, tuple[_Siblings, int]] = {}
        for product, modules in sibling_products(self._model, self._skip):
            if product in families:
                siblings = _Siblings(modules, families[product])
                member |= {id(module): (siblings, place) for place, module in enumerate(modules)}
        for product, (module,) in single_products(self._model, self._skip):
            if product in singles or id(module) in member:
                self._swap(module, singles.get(product), *member.get(id(module), (None, 0)))

    def remove(self) -> None:
        """Leave every module as it was."""
        self._swapped.undo()

    def _swap(self, module: nn.Module, choice: Choice | None, siblings: "_Siblings | None", place: int) -> None:
        def multiply(self: nn.Module, x: mx.array) -> mx.array:
            if siblings is not None and (result := siblings.result(place, x)) is not None:
                return result
            way = choice.way(x) if choice is not None else None
            return plain(self, x) if way is None else way.compute((self,), x)[0]

        self._swapped.swap_method(module, METHODS[type(module)], multiply)


class _Siblings:
    """Modules that take the same rows: the first that is asked computes for all, and the others take their results.

    The rows are the same if they are the same array. A model whose modules turn out to get different rows is computed
    module by module from then on.
    """

    def __init__(self, modules: Modules, choice: Choice) -> None:
        self._modules = modules
        self._choice: Choice | None = choice
        self._x: mx.array | None = None
        self._results: dict[int, mx.array] = {}

    def result(self, place: int, x: mx.array) -> mx.array | None:
        """What the module at ``place`` gives for ``x``; None if it shall compute that itself."""
        if x is not self._x:
            if self._results:
                self._choice = None
            self._x, self._results = None, {}
            way = self._choice.way(x) if self._choice is not None else None
            if way is None:
                return None
            self._x, self._results = x, dict(enumerate(way.compute(self._modules, x)))
        result = self._results.pop(place, None)
        if not self._results:
            self._x = None
        return result
