"""Tables and columns of pandas, polars and Arrow. Costs are bounded: a long table is read in a sample."""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from vm_magic.summaries.text import cell_text, count, fitting, names_text, number, table_lines

SAMPLE_ROWS = 100_000
"""Rows that facts about columns come from; more are read in even steps."""
_MOST_COLUMNS = 25
_HEAD_COLUMNS = 10
_HEAD_ROWS = 5
_KINDS = 1000
"""Values of an untyped column that are looked at."""
_NUMERIC, _TIMES = "iuf", "mM"


def pandas_frame(frame: Any, limit: int) -> str:
    """Shape, index, columns with types, missing values and ranges, first rows."""
    rows, columns = frame.shape
    sample = _sample(frame, rows)
    head = [f"pandas DataFrame: {count(rows, 'row')} × {count(columns, 'column')}", _pandas_index_line(frame.index)]
    facts = [
        (cell_text(_label(name)), str(dtype), _pandas_facts(sample.iloc[:, i]))
        for i, (name, dtype) in enumerate(islice(zip(frame.columns, frame.dtypes, strict=True), _MOST_COLUMNS))
    ]
    if frame.columns.has_duplicates:
        head.append("some column names stand twice")
    shown = frame.iloc[:_HEAD_ROWS, :_HEAD_COLUMNS]
    header = ["", *(cell_text(_label(name)) for name in shown.columns)]
    body = [
        [cell_text(_label(label)), *map(cell_text, row)]
        for label, row in zip(shown.index, shown.itertuples(index=False, name=None), strict=True)
    ]
    return _table_text(head, facts, columns, (header, body), rows, limit)


def pandas_series(series: Any, limit: int) -> str:
    """Name, type, length, index, missing values, range, first values."""
    name = "" if series.name is None else f" {cell_text(series.name)!r}"
    facts = _pandas_facts(_sample(series, len(series)))
    lines = [
        f"pandas Series{name}: {count(len(series), 'value')} of {series.dtype}",
        _pandas_index_line(series.index),
        *([_with_sample(facts, len(series))] if facts else []),
    ]
    few = series.iloc[:10]
    rows = [f"  {cell_text(_label(key))}  {cell_text(value)}" for key, value in zip(few.index, few, strict=True)]
    return "\n".join([*lines, f"first {count(len(rows), 'value')}:", *_within(rows, lines, limit)])


def pandas_index(index: Any, limit: int) -> str:
    """An index as a line, and its first labels."""
    labels = [f"  {cell_text(_label(label))}" for label in index[:10]]
    head = [f"pandas {_pandas_index_line(index)}"]
    return "\n".join([*head, *_within(labels, head, limit)])


def pandas_groups(groups: Any, limit: int) -> str:
    """What is grouped by what, and the sizes of the first groups."""
    sizes = groups.size()
    if hasattr(sizes, "columns"):  # as_index=False
        sizes = sizes.set_index(list(sizes.columns[:-1]))[sizes.columns[-1]]
    by = names_text([name for name in sizes.index.names if name is not None] or ["a function"], 5)
    columns = getattr(groups.obj, "columns", None)
    of = f" of columns {names_text(list(columns), 10)}" if columns is not None else ""
    head = [f"{type(groups).__name__} by {by}: {count(len(sizes), 'group')}{of}", "rows in the first groups:"]
    lines = [f"  {cell_text(_label(key))}  {size:,}" for key, size in islice(sizes.items(), 10)]
    return "\n".join([*head, *_within(lines, head, limit)])


def polars_frame(frame: Any, limit: int) -> str:
    """Shape, columns with types, missing values and ranges, first rows."""
    rows, columns = frame.shape
    sample = frame if rows <= SAMPLE_ROWS else frame.gather_every(-(-rows // SAMPLE_ROWS))
    names = frame.columns[:_MOST_COLUMNS]
    facts = [(cell_text(name), str(frame.schema[name]), _polars_facts(sample[name])) for name in names]
    header = [cell_text(name) for name in names[:_HEAD_COLUMNS]]
    body = [[*map(cell_text, row)] for row in frame[:, :_HEAD_COLUMNS].head(_HEAD_ROWS).rows()]
    head = [f"polars DataFrame: {count(rows, 'row')} × {count(columns, 'column')}"]
    return _table_text(head, facts, columns, (header, body), rows, limit)


def polars_lazy(frame: Any, limit: int) -> str:  # noqa: ARG001 - every describer is called alike
    """That it is a plan: it is not run for this."""
    return f"polars {type(frame).__name__}: a query that was not run; .head(5).collect() would be its first rows"


def polars_series(series: Any, limit: int) -> str:
    """Name, type, length, missing values, range, first values."""
    sample = series if len(series) <= SAMPLE_ROWS else series.gather_every(-(-len(series) // SAMPLE_ROWS))
    facts = _polars_facts(sample)
    lines = [
        f"polars Series {cell_text(series.name)!r}: {count(len(series), 'value')} of {series.dtype}",
        *([_with_sample(facts, len(series))] if facts else []),
    ]
    rows = [f"  {cell_text(value)}" for value in series.head(10).to_list()]
    return "\n".join([*lines, f"first {count(len(rows), 'value')}:", *_within(rows, lines, limit)])


def arrow_table(table: Any, limit: int) -> str:
    """Shape, columns with types and missing values, first rows."""
    fields = list(table.schema)
    facts = [
        (cell_text(field.name), str(field.type), _missing(table.column(i).null_count))
        for i, field in enumerate(fields[:_MOST_COLUMNS])
    ]
    few = table.slice(0, _HEAD_ROWS)
    columns = [few.column(i).to_pylist() for i in range(min(len(fields), _HEAD_COLUMNS))]
    header = [cell_text(field.name) for field in fields[:_HEAD_COLUMNS]]
    body = [[*map(cell_text, row)] for row in zip(*columns, strict=True)]
    head = [f"pyarrow Table: {count(table.num_rows, 'row')} × {count(len(fields), 'column')}"]
    return _table_text(head, facts, len(fields), (header, body), min(table.num_rows, SAMPLE_ROWS), limit)


def _table_text(
    head: Sequence[str],
    facts: Sequence[tuple[str, str, str]],
    num_columns: int,
    shown: tuple[list[str], list[list[str]]],
    num_rows: int,
    limit: int,
) -> str:
    """All parts of a table's text; the first rows get what the columns leave, at least a third."""
    header, body = shown
    sampled = f" (facts from a sample of {SAMPLE_ROWS:,} rows)" if num_rows > SAMPLE_ROWS else ""
    lines = [*head, f"columns{sampled}:"]
    column_lines = [f"  {line}" for line in table_lines(["name", "type", "values"], facts)] if facts else []
    room = limit * 2 // 3 - sum(len(line) + 1 for line in lines)
    lines += fitting(column_lines, room, "columns", num_columns + 1 if column_lines else 0)
    if body:
        rows = table_lines(header, body)
        wider = f", {_HEAD_COLUMNS} columns" if num_columns > _HEAD_COLUMNS else ""
        lines.append(f"first {count(len(body), 'row')}{wider}:")
        lines += _within([f"  {row}" for row in rows], lines, limit)
    return "\n".join(lines)


def _within(rows: list[str], before: Sequence[str], limit: int) -> list[str]:
    return fitting(rows, limit - sum(len(line) + 1 for line in before) - 20, "of them", len(rows))


def _sample(table: Any, rows: int) -> Any:
    return table if rows <= SAMPLE_ROWS else table.iloc[:: -(-rows // SAMPLE_ROWS)]


def _with_sample(facts: str, rows: int) -> str:
    return facts if rows <= SAMPLE_ROWS else f"{facts} (from a sample of {SAMPLE_ROWS:,})"


def _label(label: Any) -> Any:
    """A label of an index; those of several levels as ``a / b``."""
    return " / ".join(str(part) for part in label) if isinstance(label, tuple) else label


def _pandas_index_line(index: Any) -> str:
    name = type(index).__name__
    names = [str(one) for one in index.names if one is not None]
    called = f" ({names_text(names, 5)})" if names else ""
    ends = f", {cell_text(_label(index[0]))} … {cell_text(_label(index[-1]))}" if len(index) else ""
    twice = int(index.duplicated().sum()) if name != "RangeIndex" and len(index) <= SAMPLE_ROWS else 0
    repeated = f", {count(twice, 'repeated label')}" if twice else ""
    return f"index: {name}{called} of {count(len(index), 'label')}{ends}{repeated}"


def _missing(number_missing: int) -> str:
    return f"{number_missing:,} missing" if number_missing else ""


def _pandas_facts(column: Any) -> str:
    """Missing values, then the range of numbers and times, or the first different values."""
    parts = [_missing(int(column.isna().sum()))]
    kind = column.dtype.kind
    if kind in _NUMERIC and len(column):
        parts += _range(column.min(), column.max(), column.mean())
    elif kind in _TIMES and len(column):
        parts += _range(column.min(), column.max())
    elif kind == "b":
        parts.append(f"{int(column.sum()):,} true")
    else:
        parts.append(_different(column.dropna().iloc[:_KINDS].tolist(), len(column) > _KINDS))
    return ", ".join(filter(None, parts))


def _polars_facts(column: Any) -> str:
    parts = [_missing(column.null_count())]
    if column.dtype.is_numeric() and len(column):
        parts += _range(column.min(), column.max(), column.mean())
    elif column.dtype.is_temporal() and len(column):
        parts += _range(column.min(), column.max())
    elif str(column.dtype) == "Boolean":
        parts.append(f"{column.sum() or 0:,} true")
    else:
        parts.append(_different(column.drop_nulls().head(_KINDS).to_list(), len(column) > _KINDS))
    return ", ".join(filter(None, parts))


def _range(low: Any, high: Any, mean: Any = None) -> list[str]:
    if low != low or low is None:  # all are missing
        return []
    show: Callable[[Any], str] = number
    middle = [] if mean is None else [f"mean {show(float(mean))}"]
    return [f"{show(_item(low))} … {show(_item(high))}", *middle]


def _item(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _different(values: list[Any], more: bool) -> str:
    """``3 different: a, b, c`` of texts and the like; types of what cannot be compared."""
    if not values:
        return ""
    kinds = {type(value).__name__ for value in values}
    try:
        different = list(dict.fromkeys(values))
    except TypeError:  # lists, dicts, arrays
        return f"objects ({names_text(sorted(kinds), 4)})"
    mixed = f" ({names_text(sorted(kinds), 4)})" if len(kinds) > 1 else ""
    about = f" in the first {_KINDS:,}" if more else ""
    return f"{len(different):,} different{about}{mixed}: {names_text([cell_text(one) for one in different], 3)}"
