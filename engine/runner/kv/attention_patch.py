"""The one place where our attention enters mlx-lm's unmodified models.

Every model module imports ``scaled_dot_product_attention`` by name; while an engine is loaded that
name leads here. Calls with any other cache pass through untouched, and the last engine to close
puts the original back.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base

from engine.runner.kernels.swapped_modules import SwappedModules
from engine.runner.kv.attention_grid import fits_grid, is_planned, on_grid
from engine.runner.kv.kernel_cache import KernelLayerCache
from engine.runner.kv.paged_cache import PagedLayerCache, owner

_NAME = "scaled_dot_product_attention"
_original: Callable[..., mx.array] = base.scaled_dot_product_attention
_users: dict[str, int] = {}
_lock = threading.Lock()
"""Models load and close in threads of their own: a count that is lost would leave one without its attention."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One layer's attention, as it was called."""

    num_heads: int
    dtype: mx.Dtype
    scale: float
    sinks: bool = False
    softcap: float | None = None
    query_dim: int | None = None
    biased: bool = False
    """Whether a mask of numbers is added to the scores: what latent attention does with its rotated part."""


_recorded: dict[int, AttentionCall] | None = None
"""Id of a cache -> how its layer attends, while :func:`recorded` is in force."""


def _attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    biased = isinstance(mask, mx.array) and mask.dtype != mx.bool_
    _, heads, _, dim = queries.shape
    note(cache, AttentionCall(heads, queries.dtype, scale, sinks is not None, query_dim=dim, biased=biased))
    cache = owner(keys) if cache is None else cache
    if isinstance(cache, PagedLayerCache) and cache.flat:
        if isinstance(cache, KernelLayerCache) and cache.latent:
            assert mask is not None, "latent attention without its rotated part"
            return cache.attend_latent(queries, scale, mask)
        return cache.attend(queries, scale, sinks)
    how = {"cache": cache, "scale": scale, "mask": mask, "sinks": sinks}
    planned = isinstance(cache, PagedLayerCache) and is_planned(queries, values) and fits_grid(queries, keys, mask)
    return on_grid(_original, queries, keys, values, **how) if planned else _original(queries, keys, values, **how)


def install(model: nn.Module) -> tuple[str, ...]:
    """Wrap the name in every module that the model's layers come from; gives the modules for :func:`remove`."""
    modules = sorted({type(layer).__module__ for _, layer in model.named_modules()})
    # A module that came with the model itself is not among the imported ones: its attention stays its own.
    wrapped = tuple(name for name in modules if getattr(sys.modules.get(name), _NAME, None) in (_original, _attend))
    with _lock:
        for name in wrapped:
            setattr(sys.modules[name], _NAME, _attend)
            _users[name] = _users.get(name, 0) + 1
    return wrapped


def remove(modules: tuple[str, ...]) -> None:
    """Undo one :func:`install`."""
    with _lock:
        for name in modules:
            _users[name] -= 1
            if not _users[name]:
                del _users[name]
                setattr(sys.modules[name], _NAME, _original)


def note(cache: Any, call: AttentionCall) -> None:
    """A layer attends over ``cache``: said inside :func:`recorded` only."""
    if _recorded is not None:
        _recorded[id(cache)] = call


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[int, AttentionCall]]:
    """How each cache's layer attends in the calls of ``model`` inside; one thread, no other model meanwhile."""
    global _recorded
    modules, calls = install(model), dict[int, AttentionCall]()
    _recorded = calls
    try:
        yield calls
    finally:
        _recorded = None
        remove(modules)


class RowSelector:
    """Keeps only wanted rows between a model's trunk and its head.

    The head (vocabulary-sized) costs more than several layers, and only rows that sample need it.
    ``pick`` maps the trunk's output to the rows wanted; None keeps all.
    """

    def __init__(self, model: nn.Module) -> None:
        self.pick: Callable[[mx.array], mx.array] | None = None
        self._trunk = _trunk(model)
        self._swapped = SwappedModules()
        if self._trunk is not None:
            self._swapped.swap_method(self._trunk, "__call__", _selecting(type(self._trunk), self))

    def apply(self, hidden: mx.array) -> mx.array:
        """The wanted rows of the trunk's output."""
        return hidden if self.pick is None else self.pick(hidden)

    def remove(self) -> None:
        """Leave the trunk as it was."""
        self._swapped.undo()


def _trunk(model: nn.Module) -> nn.Module | None:
    while isinstance(inner := getattr(model, "language_model", None), nn.Module):
        model = inner
    for name in ("model", "transformer", "backbone"):
        trunk = getattr(model, name, None)
        if isinstance(trunk, nn.Module):
            return trunk
    return None


def _selecting(kind: type[nn.Module], selector: RowSelector) -> Callable[..., mx.array]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> mx.array:
        return selector.apply(kind.__call__(self, *args, **kwargs))

    return call
