"""``%vllm_metal grid``: one prompt template, comma lists of parameters, rows to run it over."""

import argparse
import html
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import RequestError
from vm_magic.show.safe_markdown import plain_html
from vm_magic.state.chat_flags import add_stop_flag, variable_name
from vm_magic.state.live_settings import thinking_kwargs

if TYPE_CHECKING:
    import pandas

    from engine.llm import LLM
    from vm_magic.remote.llm import RemoteLLM

MAX_ROWS = 40
"""Rows that the picture shows; the DataFrame has all."""
MAX_TEXT = 700
_CELL = "text-align:left;vertical-align:top;white-space:pre-wrap;max-width:48em;padding:3px 12px 3px 0"
_RESULT_COLUMNS = (
    *("prompt", "text", "reasoning", "tokens", "prompt_tokens", "cached_tokens", "time", "finish_reason", "error"),
)
ONE_ROW: list[dict[str, Any]] = [{}]
"""What a prompt without ``--over`` runs over."""
SamplingFlag = tuple[tuple[str, ...], str, Callable[[str], Any], str]
EXAMPLES = """\
%%vllm_metal grid -t 0,0.7 --top-p 0.9,1     one prompt, four settings
%%vllm_metal grid --over df --max-tokens 60  {{ column }} of a DataFrame, a prompt for each row
%%vllm_metal grid --over city --over style   {{ city }} and {{ style }} from two lists, all combinations

The cell's body is the prompt template (Jinja2); other {{ names }} are the notebook's variables. The result is a
DataFrame in _ (the line form returns it). The stop button keeps what is done, and --resume goes on from there."""


def add_grid_flags(parser: argparse.ArgumentParser, sampling: Sequence[SamplingFlag]) -> None:
    """Give ``parser`` the flags of ``grid``; those of ``sampling`` take lists with commas."""
    parser.epilog = EXAMPLES
    for names, dest, kind, text in sampling:
        parser.add_argument(
            *names, dest=dest, type=comma_list(kind), metavar="N,N", help=f"{text}; several with commas",
            default=argparse.SUPPRESS,
        )  # fmt: skip
    add_stop_flag(parser)
    parser.add_argument(
        "-s",
        "--system",
        action="append",
        metavar="TEXT",
        default=argparse.SUPPRESS,
        help="system message; several by repeating",
    )
    parser.add_argument(
        "--over",
        action="append",
        metavar="NAME",
        default=[],
        help="a DataFrame, Series or list of the notebook: a prompt for each row; may be repeated",
    )
    parser.add_argument("--complete", action="store_true", help="prompts are raw text: no chat template")
    parser.add_argument(
        "--think",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="turns thinking on or off in the chat template (enable_thinking)",
    )
    parser.add_argument(
        "--json",
        dest="schema",
        metavar="SCHEMA",
        help="replies are JSON of this schema: JSON text, a variable (dict or pydantic model), a file, or: object",
    )
    parser.add_argument("--resume", action="store_true", help="take what the last map or grid has done from there")
    parser.add_argument(
        "-o", "--out", metavar="NAME", type=variable_name, help="store the DataFrame in this variable and show nothing"
    )
    parser.add_argument("text", nargs="?", help="the prompt template, in the line form (after the flags)")


def comma_list(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """A reader of ``0,0.7``: a list, or the value alone where there is one."""

    def read(text: str) -> Any:
        try:
            values = [kind(part.strip()) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no list such as 0,0.7") from None
        return values if len(values) > 1 else values[0]

    return read


def run_grid(
    llm: "LLM | RemoteLLM",
    template: str,
    parsed: argparse.Namespace,
    namespace: Mapping[str, Any],
    sampling: Sequence[str],
    schema: Mapping[str, Any] | bool | None,
    use_tqdm: Any = True,
) -> "pandas.DataFrame":
    """Run the grid that ``parsed`` says. Raises RequestError, or MapInterrupted with what is done."""
    from engine.batch.map import MapInterrupted

    if not template.strip():
        raise RequestError("no prompt: write it after the flags, or in the cell's body", param="prompt")
    given = vars(parsed)
    rows, lists = read_over(parsed.over, namespace)
    params = {name: given[name] for name in ("system", *sampling, "stop") if name in given}
    if parsed.resume and llm.last_map is None:
        raise RequestError("--resume: there was no map or grid yet with this model", param="resume")
    run = {
        "raw": parsed.complete,
        "schema": schema,
        "chat_template_kwargs": thinking_kwargs(llm, parsed.think),
        "variables": {name: value for name, value in namespace.items() if name not in ("In", "Out")},
        "resume": llm.last_map if parsed.resume else None,
        "use_tqdm": use_tqdm,
    }
    try:
        return _with_lists(llm.map(rows, template, **run, **params), rows, lists)
    except MapInterrupted as stopped:
        stopped.result = _with_lists(stopped.result, rows, lists)
        raise


def read_over(names: Sequence[str], namespace: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """Rows for ``--over`` and the names of plain lists among them; a single DataFrame stays one, index and all."""
    if not names:
        return ONE_ROW, []
    axes, lists = [], []
    for name in names:
        if name not in namespace:
            raise RequestError(f"--over {name}: no such variable; define it in a cell", param="over")
        value = namespace[name]
        rows, plain = _axis(name, value)
        lists += [name] if plain else []
        if len(names) == 1:
            return rows, lists
        axes.append(rows.to_dict("records") if hasattr(rows, "to_dict") else rows)
    return [{key: item for row in point for key, item in row.items()} for point in itertools.product(*axes)], lists


def _axis(name: str, value: Any) -> tuple[Any, bool]:
    """Rows of one ``--over``, and whether they are plain values under its name."""
    if type(value).__name__ == "DataFrame" and hasattr(value, "itertuples"):
        return value, False
    if type(value).__name__ == "Series" and hasattr(value, "to_frame"):
        return value.to_frame(name), True
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise RequestError(
            f"--over {name}: a DataFrame, a Series or a list is wanted, not {type(value).__name__}", param="over"
        )
    items = list(value)
    if items and all(isinstance(item, Mapping) for item in items):
        return items, False
    return [{name: item} for item in items], True


def _with_lists(frame: "pandas.DataFrame", rows: Any, lists: Sequence[str]) -> "pandas.DataFrame":
    """``frame`` with the values of plain lists as its first columns; rows of a single prompt are counted."""
    if rows is ONE_ROW:
        return frame.reset_index(drop=True)
    records = rows.to_dict("records") if hasattr(rows, "to_dict") else rows
    labels = dict(
        zip(
            rows.index if hasattr(rows, "index") and hasattr(rows, "to_dict") else range(len(records)),
            records,
            strict=True,
        )
    )
    for name in reversed(lists):
        frame.insert(0, name, [labels[label][name] for label in frame.index])
    return frame


@dataclass(frozen=True)
class GridView:
    """A picture of a grid's DataFrame: whole texts, and only the columns in which rows differ."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    @classmethod
    def of(cls, frame: "pandas.DataFrame") -> "GridView":
        """The picture of ``frame``, a map's or grid's result."""
        before = [name for name in frame.columns if name not in _RESULT_COLUMNS]
        varied = [name for name in before if frame[name].astype(str).nunique() > 1]
        same = [f"{name}={frame[name].iloc[0]}" for name in before if name not in varied and len(frame)]
        if frame["prompt"].nunique() > 1 and all(frame[name].dtype.kind in "biuf" for name in varied):
            varied.append("prompt")
        failed = int(frame["error"].notna().sum())
        cut = int((frame["finish_reason"] == "abort").sum())
        parts = [
            f"{len(frame) - failed - cut} prompts done"
            + (f", {failed} failed" if failed else "")
            + (f", {cut} cut off" if cut else ""),
            f"{int(frame['tokens'].fillna(0).sum())} tokens",
            *same,
        ]
        rows = tuple(_view_row(row, varied) for row in frame.head(MAX_ROWS).to_dict("records"))
        hidden = len(frame) - len(rows)
        note = f"… and {hidden} more rows; the DataFrame in _ has all" if hidden else ""
        return cls(" · ".join(parts), (*varied, "text", "tokens", "seconds", "finish"), rows, note)

    def __repr__(self) -> str:
        short = [tuple(_short(" ".join(cell.split()), 60) for cell in row) for row in (self.header, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*short, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in short]
        return "\n".join([self.caption, *lines, *([self.note] if self.note else [])])

    def bundle(self) -> dict[str, Any]:
        """Both forms, for a display."""
        return {"text/plain": repr(self), "text/html": self._repr_html_()}

    def _repr_html_(self) -> str:
        head = "".join(f'<th style="text-align:left">{html.escape(name)}</th>' for name in self.header)
        body = "".join(
            "<tr>" + "".join(f'<td style="{_CELL}">{plain_html(cell)}</td>' for cell in row) + "</tr>"
            for row in self.rows
        )
        caption, note = html.escape(self.caption), html.escape(self.note)
        return (
            f"<div>{caption}</div><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><div>{note}</div>"
        )


def _view_row(row: Mapping[Any, Any], varied: Sequence[str]) -> tuple[str, ...]:
    failed = isinstance(row["error"], str)
    text = row["error"] if failed else str(row["text"])
    numbers = (
        ("", "") if failed else (str(row["tokens"]), f"{float(row['time']):.2f}" if row["time"] == row["time"] else "")
    )
    first = (_short(str(row[name]), MAX_TEXT // 3) for name in varied)
    return (*first, _short(text, MAX_TEXT), *numbers, "error" if failed else str(row["finish_reason"]))


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
