"""``grid``: one prompt template, comma lists of parameters, rows to run it over."""

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engine.errors import RequestError
from vm_magic.commands.base import Context, TextCommand, file_value
from vm_magic.commands.grid_choice import offer_settings
from vm_magic.commands.parser import CommandParser
from vm_magic.show.choice_view import ChoiceView
from vm_magic.show.errors import Interrupted
from vm_magic.show.grid_view import GridView
from vm_magic.show.progress import DisplayBar, bar_for
from vm_magic.show.terminal import say
from vm_magic.state.chat_flags import SAMPLING_FLAGS, add_json_flag, add_stop_flag, add_think_flag, variable_name
from vm_magic.state.live_settings import thinking_kwargs

if TYPE_CHECKING:
    import pandas

    from engine.llm import LLM
    from vm_magic.remote.llm import RemoteLLM

ONE_ROW: list[dict[str, Any]] = [{}]
"""What a prompt without ``--over`` runs over."""
EXAMPLES = """\
%%vllm_metal grid -t 0,0.7 --top-p 0.9,1     one prompt, four settings
%%vllm_metal grid --over df --max-tokens 60  {{ column }} of a DataFrame, a prompt for each row
%%vllm_metal grid --over city --over style   {{ city }} and {{ style }} from two lists, all combinations
%%vllm_metal grid --over df --choices yes,no  the probability of each answer instead of a text

The cell's body is the prompt template (Jinja2); other {{ names }} are the notebook's variables. The result is a
DataFrame in _ (the line form returns it). The stop button keeps what is done, and --resume goes on from there."""


class Grid(TextCommand):
    """Runs a prompt template over rows and parameters."""

    help = "prompts times parameters as a DataFrame (cell form: the cell's body is the template)"
    body = "prompt"

    def add_arguments(self, parser: CommandParser) -> None:
        """Sampling flags that take lists, rows, and where the result goes."""
        parser.epilog = EXAMPLES
        for names, dest, kind, text in SAMPLING_FLAGS:
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
        add_think_flag(parser)
        add_json_flag(parser, "replies are")
        parser.add_argument(
            "--choices",
            metavar="A,B",
            help="the only answers, with commas, or a list of the notebook: nothing is written, each one's "
            "probability is computed",
        )
        parser.add_argument(
            "--replicas",
            metavar="N",
            type=read_replicas,
            help="copies of the model that share the prompts, or their devices with commas: cuda:0,cuda:1",
        )
        parser.add_argument("--resume", action="store_true", help="take over what the last map or grid has done")
        parser.add_argument(
            "-o",
            "--out",
            metavar="NAME",
            type=variable_name,
            help="store the DataFrame in this variable and show nothing",
        )
        parser.add_argument("text", nargs="?", help="the prompt template, in the line form (after the flags)")

    def execute(self, context: Context, parsed: argparse.Namespace, text: str, *, cell: bool) -> Any:
        """Run the grid. The line form returns the DataFrame, the cell form shows its picture and files it as ``_``.

        ■ files what is done, also as the variable of ``--out``, and raises Interrupted.
        """
        from engine.batch.map import MapInterrupted

        session, shell = context.session, context.shell
        llm = session.remote if session.remote is not None else session.require()
        sampling = [dest for _, dest, _, _ in SAMPLING_FLAGS]
        schema = None
        if parsed.schema is not None:
            from vm_magic.state.schemas import read_schema

            schema = read_schema(parsed.schema, shell.user_ns)
        bar = bar_for(shell, "prompts")
        try:
            frame = run_grid(llm, text.strip("\n"), parsed, shell.user_ns, sampling, schema, use_tqdm=bar or True)
        except MapInterrupted as stopped:
            _file(shell, stopped.result, parsed, bar, returned=False)
            raise Interrupted(
                f"{str(stopped).partition(';')[0]}; {parsed.out or '_'} has what there is, and --resume goes on"
            ) from None
        except BaseException:
            if bar is not None:
                bar.replace({"text/plain": "no prompt was completed"})
            raise
        return _file(shell, frame, parsed, bar, returned=not cell)


def _file(shell: Any, frame: Any, parsed: argparse.Namespace, bar: DisplayBar | None, *, returned: bool) -> Any:
    """Put the picture in the bar's place, or its first line where the DataFrame is shown or stored elsewhere."""
    view = ChoiceView.of(frame) if ChoiceView.shows(frame) else GridView.of(frame)
    if bar is not None:
        bar.replace({"text/plain": view.caption} if parsed.out or returned else view.bundle())
    if parsed.out:
        shell.user_ns[parsed.out] = frame
        return None
    if returned:
        return frame
    if bar is None:
        say(repr(view))
    offer_settings(shell, frame)
    file_value(frame, shell, None)
    return None


def comma_list(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """A reader of ``0,0.7``: a list, or the value alone where there is one."""

    def read(text: str) -> Any:
        try:
            values = [kind(part.strip()) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 0,0.7") from None
        return values if len(values) > 1 else values[0]

    return read


def read_replicas(text: str) -> int | list[str]:
    """``--replicas``: how many, or their devices."""
    return int(text) if text.strip().isdigit() else [part.strip() for part in text.split(",")]


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
        "choices": read_choice_flag(parsed, namespace),
        "schema": schema,
        "chat_template_kwargs": thinking_kwargs(llm, parsed.think),
        "variables": {name: value for name, value in namespace.items() if name not in ("In", "Out")},
        "resume": llm.last_map if parsed.resume else None,
        "use_tqdm": use_tqdm,
    }
    if parsed.replicas is not None:
        run["replicas"] = parsed.replicas
    try:
        return _with_lists(llm.map(rows, template, **run, **params), rows, lists)
    except MapInterrupted as stopped:
        stopped.result = _with_lists(stopped.result, rows, lists)
        raise


def read_choice_flag(parsed: argparse.Namespace, namespace: Mapping[str, Any]) -> Any:
    """The labels of ``--choices``, None without it. Raises RequestError for one word that is no list's name."""
    text = parsed.choices
    if text is None:
        return None
    if parsed.think is not None:
        flag = "--think" if parsed.think else "--no-think"
        raise RequestError(f"{flag}: choices are answers without a thought; leave the flag out", param="think")
    if "," in text:
        return [part.strip() for part in text.split(",")]
    value = namespace.get(text)
    if isinstance(value, list | tuple) or hasattr(value, "tolist"):
        return value
    fix = "give several with commas, or the name of a list in this notebook"
    raise RequestError(f"--choices {text}: {fix}", param="choices")


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
            f"--over {name}: expected a DataFrame, a Series or a list, not {type(value).__name__}", param="over"
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
