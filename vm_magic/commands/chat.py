"""``chat`` and ``complete``: from a line and a cell's body to a reply that is shown, filed or stored."""

import argparse
import inspect
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Union

from IPython.core.error import UsageError
from IPython.core.getipython import get_ipython

from engine.errors import RequestError
from engine.outputs import Reply
from vm_magic.chat.end_notes import end_notes
from vm_magic.chat.generation import ChatOptions, Generation, ask, start_chat, start_completion
from vm_magic.chat.pending_reply import PendingReply
from vm_magic.commands.base import Context, TextCommand, file_value
from vm_magic.commands.compare import compare_candidates, run_comparison
from vm_magic.commands.history import conversation_names
from vm_magic.commands.parser import CommandParser
from vm_magic.show.code_blocks import code_of
from vm_magic.show.display_handle import Bundle, can_update, open_handle
from vm_magic.show.errors import Interrupted
from vm_magic.show.reply_bundle import reply_bundle
from vm_magic.show.reply_text import ReplyText
from vm_magic.show.reply_view import WAITING, NotebookView, ReplyView, SilentView, TerminalCodeView, TerminalView
from vm_magic.show.sent_view import sent_bundle
from vm_magic.show.terminal import publish, say
from vm_magic.state.chat_flags import SAMPLING_FLAGS, TOOL_CHOICES, add_chat_flags, reply_format
from vm_magic.state.conversation import DEFAULT_CONVERSATION, Message, render_prompt
from vm_magic.state.schemas import read_schema, schema_class
from vm_magic.state.session import Session

if TYPE_CHECKING:
    from vm_magic.chat.tool_loop import ToolLoop
    from vm_magic.chat.tools import NotebookTool

EXAMPLES = """\
%%chat -t 0                            the cell's body is the message; %chat -t 0 TEXT does it in one line
{{ df }} What is this table about?     {{ name }} in a message is a variable of the notebook
%%chat --error                         why did the last cell fail? (a message of your own is not needed)
%%chat -f code --to-cell               the code of the reply goes into the next cell; you run it
%%chat --compare temperature=0,0.7     two replies side by side

Flags stand on the magic's line, before the text. %vllm_metal set temperature=0.2 sets a value for every message."""
_SAMPLING = (*(dest for _, dest, _, _ in SAMPLING_FLAGS), "stop", "logprobs")
Running = Union[Generation, "ToolLoop"]


class _Generate(TextCommand):
    """What ``chat`` and ``complete`` share."""

    body = "message"

    def execute(self, context: Context, parsed: argparse.Namespace, text: str, *, cell: bool) -> Any:
        """Both forms: a cell streams and files its Reply, a line returns it."""
        session, shell = context.session, context.shell
        if cell:
            text = self.from_cell(text)
        summaries: list[str] = []
        if not parsed.raw:
            text = render_prompt(text, shell.user_ns, summaries)
        _check(parsed, shell)
        text, sent = with_context(context, parsed, text, summaries)
        if parsed.record is None:
            parsed.record = context.record and not getattr(parsed, "compare", None)
        options = chat_options(parsed, shell.user_ns)
        if getattr(parsed, "compare", None):
            return run_comparison(context, parsed, text, options, sent, cell=cell)
        generation = self.start(session, text, options, parsed)
        if sent is not None and not parsed.out:
            publish(shell, sent)
        if parsed.detach:
            assert isinstance(generation, Generation), "checked: tools are not detached"
            return _detached(generation, parsed, shell)
        if not cell:
            return _followed(generation, parsed, shell, SilentView(), returned=True)
        return _followed(generation, parsed, shell, _view(parsed, shell), returned=False)

    @abstractmethod
    def from_cell(self, body: str) -> str:
        """The text that a cell's body is."""

    @abstractmethod
    def start(self, session: Session, text: str, options: ChatOptions, parsed: argparse.Namespace) -> Running:
        """Submit ``text``."""


class Chat(_Generate):
    """Sends a message."""

    help = "send a message (cell form: the cell's body, streamed)"

    def add_arguments(self, parser: CommandParser) -> None:
        """Sampling, conversation, tools, and how the reply is shown."""
        add_chat_flags(parser, chat=True)
        parser.epilog = EXAMPLES

    def from_cell(self, body: str) -> str:
        """The body without empty lines around it."""
        return body.strip("\n")

    def start(self, session: Session, text: str, options: ChatOptions, parsed: argparse.Namespace) -> Running:
        """Submit the message, with the tools that it may call."""
        return _with_tools(start_chat(session, text, options), options, parsed)

    def flag_values(self, flag: str, words: Sequence[str], fragment: str) -> Iterable[str]:
        """Conversations and functions of the notebook, besides what flags allow."""
        if flag == "--fork":
            return conversation_names()
        if flag in ("-c", "--conversation"):
            return conversation_names(DEFAULT_CONVERSATION)
        if flag == "--tools":
            return _function_names(fragment)
        if flag == "--compare":
            return compare_candidates(fragment)
        if flag == "--cells":
            return ("1", "3", "5")
        if flag == "--tool-choice":
            return [*TOOL_CHOICES, *_named_tools(words)]
        return super().flag_values(flag, words, fragment)


class Complete(_Generate):
    """Continues a raw prompt."""

    help = "continue a raw prompt (cell form: the cell's body, streamed)"

    def add_arguments(self, parser: CommandParser) -> None:
        """Sampling, and how the reply is shown."""
        add_chat_flags(parser, chat=False)

    def from_cell(self, body: str) -> str:
        """The body without the line end that every cell has."""
        return body.removesuffix("\n")

    def start(self, session: Session, text: str, options: ChatOptions, parsed: argparse.Namespace) -> Running:  # noqa: ARG002
        """Submit the prompt."""
        return start_completion(session, text, options)


def with_context(
    context: Context, parsed: argparse.Namespace, text: str, summaries: Sequence[str]
) -> tuple[str, Bundle | None]:
    """The message with what ``--cells`` and ``--error`` send before it, and a bundle that shows what was sent along."""
    from vm_magic.chat.notebook_context import WHY, notebook_context

    session, error = context.session, getattr(parsed, "error", False)
    found = notebook_context(context.shell, session, getattr(parsed, "cells", None), error)
    if not text.strip() and error:
        text = WHY
    names = [summary.partition("\n")[0] for summary in summaries]
    parts = list(summaries)
    if found is not None and text.strip():  # an empty message is refused as ever
        text = found.before(text)
        names, parts = [*found.names, *names], [found.text, *parts]
    if not names:
        return text, None
    server = None if session.remote is None else session.remote.base_url
    return text, sent_bundle(names, "\n\n".join(parts), server)


def _check(parsed: argparse.Namespace, shell: Any) -> None:
    """Refuse flags that exclude each other."""
    if parsed.detach and parsed.to_cell:
        raise UsageError("--to-cell does not go with --detach: the next cell is made when this one ends; leave one out")
    if parsed.detach and not parsed.out and not can_update(shell):
        raise UsageError("--detach needs a notebook; in a terminal add --out NAME")
    if not getattr(parsed, "tools", None):
        return
    for flag in ("detach", "schema"):
        if getattr(parsed, flag):
            name = "json" if flag == "schema" else flag
            raise UsageError(f"--tools does not go with --{name}: leave one of them out")


def _with_tools(first: Generation, options: ChatOptions, parsed: argparse.Namespace) -> Running:
    if not options.tools:
        return first
    from vm_magic.chat.tool_loop import ToolLoop
    from vm_magic.chat.tools import MAX_RESULT_LENGTH

    assert first.conversation is not None, "a chat has a conversation"
    conversation, session = first.conversation, first.session
    later = options.after_first_call()

    def ask_again(messages: list[Message], earlier: tuple[ReplyText, ...]) -> Generation:
        return ask(session, messages, conversation, later, earlier)

    # a character is at most about a token, so that a result always leaves room for an answer
    limit = session.require().plan.max_model_len if session.remote is None else MAX_RESULT_LENGTH
    longest = min(MAX_RESULT_LENGTH, limit // 2)
    return ToolLoop(first, ask_again, options.tools, parsed.max_tool_rounds, longest)


def _followed(generation: Running, parsed: argparse.Namespace, shell: Any, view: ReplyView, *, returned: bool) -> Any:
    try:
        reply = generation.follow(view)
    except Interrupted as stopped:
        if stopped.reply is not None:
            _keep_record(generation, stopped.reply, view)
            file_value(stopped.reply, shell, parsed.out)
        raise
    _settle(reply, generation, parsed, view)
    if parsed.to_cell:
        put_code_into_cell(reply, shell)
    if returned and not parsed.out:
        return reply
    file_value(reply, shell, parsed.out)
    return None


def _settle(reply: Reply, generation: Running, parsed: argparse.Namespace, view: ReplyView) -> None:
    """What a reply that came to its end gets: how it is shown, what is said below it, its record."""
    reply.shown_as = reply_format(parsed)
    _note(reply, generation, parsed, view)
    _keep_record(generation, reply, view)


def put_code_into_cell(reply: Reply, shell: Any) -> None:
    """Give the next cell (in a terminal: the next prompt) the code of ``reply``. Nothing runs it but the user."""
    code = code_of(reply.text)
    if code is None:
        say("no code in the reply: no cell was made")
        return
    shell.set_next_input(code.cell())


def _detached(generation: Generation, parsed: argparse.Namespace, shell: Any) -> None:
    view = _view(parsed, shell)

    def store(reply: Reply) -> None:
        _settle(reply, generation, parsed, view)
        if parsed.out:
            shell.user_ns[parsed.out] = reply

    pending = PendingReply(generation, view, store)
    if not parsed.out:
        shell.displayhook.update_user_ns(pending)


def _keep_record(generation: Running, reply: Reply, view: ReplyView) -> None:
    """What ``--record`` made of the model's turns goes into the session, and into the metadata of what is shown."""
    records = [one.record for one in (*generation.earlier_replies, reply) if one.record is not None]
    if records:
        from vm_magic.state.record import KEY, kept

        generation.session.records.append(records)
        if isinstance(view, NotebookView):
            view.annotate({KEY: kept(records)})


def _view(parsed: argparse.Namespace, shell: Any) -> ReplyView:
    if parsed.out:
        return SilentView()
    if can_update(shell):
        return NotebookView(
            open_handle(shell, reply_bundle(WAITING, "markdown")),
            reply_format(parsed),
            stream=not parsed.no_stream,
        )
    return TerminalCodeView() if reply_format(parsed) == "code" else TerminalView()


def _note(reply: Reply, generation: Running, parsed: argparse.Namespace, view: ReplyView) -> None:
    """Say below the reply, and wherever it is shown later, how it ended."""
    rounds = vars(parsed).get("max_tool_rounds", 0)
    reply.notes = end_notes(reply, generation, stats=parsed.stats, max_tool_rounds=rounds)
    if reply.notes:
        view.add_notes(reply.notes)


def chat_options(parsed: argparse.Namespace, namespace: Mapping[str, Any]) -> ChatOptions:
    """What the flags of one message say. Raises RequestError for a wrong schema or tool."""
    given = vars(parsed)
    tools: tuple[NotebookTool, ...] = ()
    if given.get("tools"):
        from vm_magic.chat.tools import read_tools

        tools = read_tools(given["tools"], namespace)
    return ChatOptions(
        sampling={name: given[name] for name in _SAMPLING if name in given},
        conversation=given.get("conversation"),
        new=given.get("new", False),
        system=given.get("system"),
        think=given.get("think"),
        thinking_token_budget=given.get("thinking_token_budget"),
        schema=None if parsed.schema is None else read_schema(parsed.schema, namespace),
        schema_class=None if parsed.schema is None else schema_class(parsed.schema, namespace),
        fork=given.get("fork"),
        tools=tools,
        tool_choice=read_tool_choice(given.get("tool_choice"), tools),
        record=bool(given.get("record")),
    )


def read_tool_choice(choice: str | None, tools: "Sequence[NotebookTool]") -> str | dict[str, Any] | None:
    """OpenAI's ``tool_choice`` for a flag's value. Raises RequestError for a name that is not among ``tools``."""
    if choice is None or choice in TOOL_CHOICES:
        if choice is not None and not tools:
            raise RequestError("--tool-choice goes with --tools: name the functions there", param="tool_choice")
        return choice
    names = [tool.name for tool in tools]
    if choice not in names:
        raise RequestError(
            f"--tool-choice {choice}: auto, none, required or one of --tools ({', '.join(names) or 'none given'})",
            param="tool_choice",
        )
    return {"type": "function", "function": {"name": choice}}


def _function_names(fragment: str) -> list[str]:
    """The notebook's functions, imported ones too, behind the names that ``fragment`` has already."""
    shell: Any = get_ipython()
    done = fragment[: fragment.rfind(",") + 1]
    taken = done.split(",")
    found = ((name, value) for name, value in shell.user_ns.items() if name not in shell.user_ns_hidden)
    names = [name for name, value in found if inspect.isroutine(value) and not name.startswith("_")]
    return [done + name for name in names if name not in taken]


def _named_tools(words: Sequence[str]) -> list[str]:
    places = [i for i, word in enumerate(words[:-1]) if word == "--tools"]
    return [name for i in places for name in words[i + 1].split(",")]
