"""``describe``: the text that a language model gets of an object, and who makes it."""

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

from vm_magic.summaries.text import bounded, is_small, plain_text

DEFAULT_LIMIT = 2000
"""Most characters of a description."""
LEAST_LIMIT = 100
METHOD = "__llm__"
"""An object's own description: ``def __llm__(self) -> str``."""
Describer = Callable[[Any], str]
Made = TypeVar("Made", bound=Describer)

_OURS = {
    "pandas.DataFrame": "frames.pandas_frame",
    "pandas.Series": "frames.pandas_series",
    "pandas.Index": "frames.pandas_index",
    "pandas.api.typing.DataFrameGroupBy": "frames.pandas_groups",
    "pandas.api.typing.SeriesGroupBy": "frames.pandas_groups",
    "polars.DataFrame": "frames.polars_frame",
    "polars.LazyFrame": "frames.polars_lazy",
    "polars.Series": "frames.polars_series",
    "pyarrow.Table": "frames.arrow_table",
    "xarray.Dataset": "arrays.own_summary",
    "xarray.DataArray": "arrays.own_summary",
    "numpy.ndarray": "arrays.numpy_array",
    "mlx.core.array": "arrays.mlx_array",
    "torch.Tensor": "arrays.torch_tensor",
    "matplotlib.figure.Figure": "figures.figure",
    "matplotlib.axes.Axes": "figures.axes",
    "sklearn.base.BaseEstimator": "models.estimator",
    "torch.nn.Module": "models.torch_module",
    "mlx.nn.Module": "models.mlx_module",
    "builtins.dict": "python_objects.container",
    "builtins.list": "python_objects.container",
    "builtins.tuple": "python_objects.container",
    "builtins.set": "python_objects.container",
    "builtins.frozenset": "python_objects.container",
    "builtins.bytes": "python_objects.container",
    "builtins.bytearray": "python_objects.container",
    "builtins.BaseException": "python_objects.exception",
    "builtins.function": "python_objects.function",
    "builtins.builtin_function_or_method": "python_objects.function",
    "builtins.method": "python_objects.function",
    "builtins.type": "python_objects.class_",
    "builtins.module": "python_objects.module",
}
"""Types by dotted name, and what describes them: a module of this package and a function of (value, limit)."""
_CONTAINERS = (dict, list, tuple, set, frozenset, bytes, bytearray)


class Describe:
    """Callable as ``describe(value)``: what ``{{ value }}`` in a message sends.

    Order: what was registered for the type or a base of it, then its ``__llm__()``, then a summary made here. Text
    and numbers are themselves. Objects of libraries are recognized by name: none is imported.
    """

    def __init__(self) -> None:
        self._registered: dict[type | str, Describer] = {}

    def __call__(self, value: Any, limit: int = DEFAULT_LIMIT) -> str:
        """A text of at most ``limit`` characters; a plain text, whatever its length, as it is."""
        if limit < LEAST_LIMIT:
            raise ValueError(f"limit must be at least {LEAST_LIMIT}, got {limit}")
        if issubclass(type(value), str):
            return plain_text(value, limit)
        text = self.summary(value, limit)
        return bounded(plain_text(value, limit), limit) if text is None else text

    def summary(self, value: Any, limit: int = DEFAULT_LIMIT) -> str | None:
        """The description; None for what has none of its own: text, numbers, small containers, unknown objects."""
        # of its type: what an object says of its class may be anything, an error too
        if value is None or issubclass(type(value), str | bool | int | float | complex):
            return None
        try:
            text = self._own(value)
            if text is None:
                text = _made_here(value, limit)
        except Exception:  # noqa: BLE001 - of a class that says odd things of itself
            return None
        return None if text is None else bounded(text, limit)

    def register(self, kind: type | str, describer: Made | None = None) -> Any:
        """Describe objects of ``kind`` (a type, or its dotted name, such as ``"pandas.DataFrame"``) this way.

        A decorator: ``@describe.register("shapely.Polygon")`` above a function of the object that gives a text. Holds
        for subclasses too, and stays until :meth:`unregister` or the end of the kernel.
        """
        if not isinstance(kind, type) and (not isinstance(kind, str) or "." not in kind):
            raise TypeError(f"register takes a type or its dotted name, such as 'pandas.DataFrame', not {kind!r}")

        def keep(function: Made) -> Made:
            if not callable(function):
                raise TypeError(f"a function that gives a text is expected, not {function!r}")
            self._registered[kind] = function
            return function

        return keep if describer is None else keep(describer)

    def unregister(self, kind: type | str) -> None:
        """Forget what :meth:`register` was told of ``kind``. Raises KeyError if that was nothing."""
        if kind not in self._registered:
            known = ", ".join(str(one) for one in self._registered) or "none"
            raise KeyError(f"{kind} is not registered; registered: {known}")
        del self._registered[kind]

    def _own(self, value: Any) -> str | None:
        """What the user's function or the object's own method says."""
        for base in type(value).__mro__:
            for kind, function in self._registered.items():
                if base is kind or (isinstance(kind, str) and _is_named(base, kind)):
                    return _checked(function, value, f"the function registered for {kind}")
        method = getattr(type(value), METHOD, None)
        return None if method is None else _checked(method, value, f"{type(value).__name__}.{METHOD}")

    def __repr__(self) -> str:
        return "describe(value, limit=2000): the text that a model gets of value; .register(type or 'module.Type')"


def _checked(function: Describer, value: Any, what: str) -> str | None:
    """What ``function`` gives; None, with a warning, where it fails: a message goes out all the same."""
    try:
        text: Any = function(value)
        if isinstance(text, str):
            return str(text)
        problem = f"gave {type(text).__name__}, not a text"
    except Exception as error:  # noqa: BLE001 - the function is the user's
        problem = f"raised {type(error).__name__}: {plain_text(error)}"
    warnings.warn(f"{what} {problem}; vm_magic's own description is sent", stacklevel=2)
    return None


def _made_here(value: Any, limit: int) -> str | None:
    place = next((found for base in type(value).__mro__ if (found := _place(base))), None)
    if place is None and _is_plain_dataclass(value):
        place = "python_objects.dataclass"
    if place is None:
        return None
    if isinstance(value, _CONTAINERS) and place.endswith(".container") and _fits(value, limit):
        return None
    module, _, name = place.partition(".")
    try:
        text: str = getattr(import_module(f"{__package__}.{module}"), name)(value, limit)
    except Exception:  # noqa: BLE001 - an odd object, or a library's new version: never the end of a cell
        return plain_text(value, limit)
    return text


def _place(base: type) -> str | None:
    return next((place for name, place in _OURS.items() if _is_named(base, name)), None)


def _is_named(base: type, name: str) -> bool:
    """Whether ``name`` means ``base``: where it was made, or where its library shows it. Imports nothing."""
    module, _, last = name.rpartition(".")
    if f"{base.__module__}.{base.__qualname__}" == name:
        return True
    loaded = sys.modules.get(module)
    return base.__module__.partition(".")[0] == module.partition(".")[0] and (
        loaded is not None and vars(loaded).get(last) is base
    )


def _is_plain_dataclass(value: Any) -> bool:
    """A dataclass's instance; one that says itself what its text is keeps that."""
    kind = type(value)
    own_text = any("__str__" in vars(base) for base in kind.__mro__[:-1])
    return hasattr(kind, "__dataclass_fields__") and not own_text


def _fits(value: Any, limit: int) -> bool:
    """Whether a container's whole text is short enough to be sent."""
    try:
        return is_small(value, limit) and len(str(value)) <= limit
    except Exception:  # noqa: BLE001 - an item's repr may raise anything
        return False


describe = Describe()
