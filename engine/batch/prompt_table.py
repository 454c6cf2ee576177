"""Prompts from a table: one Jinja2 template per row, lists of parameters as a grid. Knows no model."""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, UndefinedError, meta

from engine.errors import ConfigError, RequestError
from engine.text.template.bounded import BoundedEnvironment
from engine.text.template.budget import TooMuchError, compiling, render_within, within

PLAIN_VARIABLE = "text"
"""What a row of a plain list, or of a Series without a name, is called in a template."""
LIST_VALUED = frozenset(("stop", "stop_token_ids", "bad_words", "allowed_token_ids"))
"""Parameters whose value is a list anyway: only a list of lists makes a grid of them."""


@dataclass(frozen=True)
class PromptTable:
    """Rows as template variables. ``labels`` are the rows' index; ``columns`` is None where rows may differ."""

    rows: Iterable[Mapping[str, Any]]
    labels: Iterable[Any]
    total: int | None
    columns: frozenset[str] | None = None
    index_name: Any = None


@dataclass(frozen=True, slots=True)
class Task:
    """One prompt with one combination of parameters. ``error`` says why the template gave no prompt."""

    label: Any
    prompt: str
    params: Mapping[str, Any]
    error: str | None = None

    @property
    def key(self) -> str:
        """Equal for tasks that ask for the same."""
        return task_key(self.prompt, self.params)


def import_pandas() -> Any:
    """The pandas module; raises ConfigError naming how to get it."""
    try:
        import pandas
    except ImportError:
        raise ConfigError("tables of prompts need pandas: pip install pandas", flag="pandas") from None
    return pandas


def read_table(source: Any) -> PromptTable:
    """Rows of a DataFrame, a Series, or any iterable of mappings or of plain values.

    Missing values (None, NaN) are left out of a row, so that ``{{ name }}`` fails there and
    ``{{ name | default("…") }}`` works. Raises RequestError for what is not a table.
    """
    if type(source).__module__.partition(".")[0] == "pandas":
        return _read_pandas(source)
    if isinstance(source, str | bytes | Mapping) or not isinstance(source, Iterable):
        raise RequestError(
            f"map takes a DataFrame, a Series or a list of rows (mappings or strings), got {type(source).__name__}",
            param="rows",
        )
    total = len(source) if isinstance(source, Sequence) else None
    return PromptTable(map(_plain_row, source), itertools.count(), total)


def _plain_row(row: Any) -> dict[str, Any]:
    values = {str(name): value for name, value in row.items()} if isinstance(row, Mapping) else {PLAIN_VARIABLE: row}
    return _present(values)


def _read_pandas(source: Any) -> PromptTable:
    pandas = import_pandas()
    if isinstance(source, pandas.Series):
        source = source.to_frame(source.name if source.name is not None else PLAIN_VARIABLE)
    if not isinstance(source, pandas.DataFrame):
        raise RequestError(f"map takes a DataFrame or a Series, got {type(source).__name__}", param="rows")
    names = [str(name) for name in source.columns]
    rows = (_present(dict(zip(names, row, strict=True))) for row in source.itertuples(index=False, name=None))
    return PromptTable(rows, source.index, len(source), frozenset(names), source.index.name)


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without None, NaN, NaT and pandas' NA; all columns by any name are in ``row``."""
    kept = {name: value for name, value in values.items() if not is_missing(value)}
    return {"row": kept, **kept}


def is_missing(value: Any) -> bool:
    """Whether ``value`` stands for none: None, NaN, NaT, pandas' NA."""
    if value is None:
        return True
    try:
        return bool(value != value)  # NaN and NaT are unequal to themselves
    except (TypeError, ValueError):  # pandas' NA has no truth value; neither has an array, which is there
        return type(value).__name__ == "NAType"


def combinations(params: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The grid: every combination of the parameters' values, the last parameter running fastest."""
    axes = [[(name, value) for value in _values(name, given)] for name, given in params.items()]
    return [dict(point) for point in itertools.product(*axes)]


def _values(name: str, given: Any) -> Sequence[Any]:
    many = isinstance(given, list | tuple | range) or type(given).__module__.partition(".")[0] in ("numpy", "pandas")
    if many and hasattr(given, "tolist"):
        given = given.tolist()
    if not isinstance(given, list | tuple | range):
        return [given]
    if name in LIST_VALUED and not (given and isinstance(given[0], list | tuple)):
        return [list(given)]
    if not given:
        raise RequestError(f"{name}=[]: give at least one value, or leave it out", param=name)
    return given


@dataclass
class Prompts:
    """Renders ``templates`` for every row. Templates run in Jinja2's sandbox; ``variables`` lie below a row's own."""

    templates: Sequence[str]
    variables: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        environment = BoundedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        self._known = {"row", *environment.globals, *self.variables}
        self._compiled: list[tuple[Template, set[str]]] = []
        for source in self.templates:
            if not isinstance(source, str):
                raise RequestError(f"template: must be a string, got {type(source).__name__}", param="template")
            try:
                names = meta.find_undeclared_variables(environment.parse(source))
                with within(compiling()):
                    template = environment.from_string(source, globals=dict(self.variables))
            except TemplateSyntaxError as error:
                raise RequestError(f"template, line {error.lineno}: {error.message}", param="template") from None
            self._compiled.append((template, names))

    def tasks(self, table: PromptTable, grid: Sequence[Mapping[str, Any]]) -> Iterator[Task]:
        """All tasks, row by row; raises RequestError for a variable that no row can have."""
        for label, row in zip(table.labels, table.rows, strict=False):
            for compiled, names in self._compiled:
                prompt, error = self._render(compiled, row)
                if error is not None:
                    self._check_names(names, table)
                for params in grid:
                    yield Task(label, prompt, params, error)

    @staticmethod
    def _render(compiled: Template, row: Mapping[str, Any]) -> tuple[str, str | None]:
        try:
            return render_within(compiled, row), None
        except TooMuchError as error:
            return "", f"template: stopped on this row: {error.message}"
        except UndefinedError as error:
            return "", f"template: {error.message} in this row (a missing value, or no such name)"
        except Exception as error:  # noqa: BLE001 - the row's own objects may raise anything; only this row fails
            return "", f"template: {type(error).__name__}: {error}"

    def _check_names(self, names: Iterable[str], table: PromptTable) -> None:
        if table.columns is None:
            return
        unknown = sorted(set(names) - table.columns - self._known)
        if unknown:
            raise RequestError(
                f"template: {', '.join(unknown)} is not a column; the columns are: {', '.join(sorted(table.columns))}",
                param="template",
            )


def task_key(prompt: str, params: Mapping[str, Any]) -> str:
    """Prompt and parameters as one text, in which 1 and 1.0 are the same, as after a trip through a file."""
    return json.dumps([prompt, sorted((name, _plain(value)) for name, value in params.items())], default=str)


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
    return float(value)
