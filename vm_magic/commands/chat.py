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
from vm_magic.chat.generation import ChatOptions, Generation, ask, start_chat, start_completion
from vm_magic.chat.pending_reply import PendingReply
from vm_magic.commands.base import Context, TextCommand
from vm_magic.commands.history import conversation_names
from vm_magic.commands.parser import CommandParser
from vm_magic.show.cards import speed_text
from vm_magic.show.display_handle import can_update, open_handle
from vm_magic.show.errors import Interrupted
from vm_magic.show.reply_bundle import reply_bundle
from vm_magic.show.reply_text import ReplyText
from vm_magic.show.reply_view import WAITING, NotebookView, ReplyView, SilentView, TerminalView
from vm_magic.state.chat_flags import SAMPLING_FLAGS, TOOL_CHOICES, add_chat_flags
from vm_magic.state.conversation import DEFAULT_CONVERSATION, Message, render_prompt
from vm_magic.state.session import Session

if TYPE_CHECKING:
    from vm_magic.chat.tool_loop import ToolLoop
    from vm_magic.chat.tools import NotebookTool

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
        if not parsed.raw:
            text = render_prompt(text, shell.user_ns)
        _check(parsed, shell)
        if parsed.record is None:
            parsed.record = context.record
        generation = self.start(session, text, chat_options(parsed, shell.user_ns), parsed)
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


def _check(parsed: argparse.Namespace, shell: Any) -> None:
    """Refuse flags that exclude each other."""
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
            _file(stopped.reply, parsed, shell)
        raise
    _keep_record(generation, reply, view)
    if not parsed.out:
        _say_how_it_ended(reply, generation, parsed)
        if returned:
            return reply
    _file(reply, parsed, shell)
    return None


def _file(reply: Reply, parsed: argparse.Namespace, shell: Any) -> None:
    """Put the reply where the user finds it: into the variable of --out, else into ``_`` and ``Out``."""
    if parsed.out:
        shell.user_ns[parsed.out] = reply
        return
    shell.displayhook.update_user_ns(reply)
    shell.displayhook.fill_exec_result(reply)


def _detached(generation: Generation, parsed: argparse.Namespace, shell: Any) -> None:
    view = _view(parsed, shell)

    def store(reply: Reply) -> None:
        _keep_record(generation, reply, view)
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
            parsed.format or ("json" if parsed.schema else "markdown"),
            stream=not parsed.no_stream,
        )
    return TerminalView()


def _say_how_it_ended(reply: Reply, generation: Running, parsed: argparse.Namespace) -> None:
    if reply.finish_reason == "length":
        limit = generation.stream.params.max_tokens
        full = limit is None or reply.usage.completion_tokens < limit
        context = "the context is full: start anew with --new, or reload with a larger --max-model-len"
        print(context if full else f"cut off after {limit} tokens: a larger --max-tokens gives more")
    if reply.finish_reason == "repetition":
        print("ended: it repeated itself")
    if generation.stopped_at_limit:
        rounds = f"{parsed.max_tool_rounds} round{'s' * (parsed.max_tool_rounds > 1)}"
        print(f"stopped after {rounds} of tool calls: a larger --max-tool-rounds lets the model go on")
    if parsed.stats:
        print(speed_text(*generation.earlier_replies, reply))


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
        schema=None if parsed.schema is None else _schema(parsed.schema, namespace),
        fork=given.get("fork"),
        tools=tools,
        tool_choice=read_tool_choice(given.get("tool_choice"), tools),
        record=bool(given.get("record")),
    )


def _schema(text: str, namespace: Mapping[str, Any]) -> Mapping[str, Any] | bool:
    from vm_magic.state.schemas import read_schema

    return read_schema(text, namespace)


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
