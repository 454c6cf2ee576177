"""The ``chat`` and ``complete`` commands: from a line and a cell's body to a reply that is shown, filed or stored."""

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Union

from IPython.core.error import UsageError

from engine.errors import RequestError
from engine.outputs import Reply
from vm_magic.chat.generation import ChatOptions, Generation, ask, start_chat, start_completion
from vm_magic.chat.pending_reply import PendingReply
from vm_magic.commands.arguments import command_parser, split_text
from vm_magic.commands.cards import speed_text
from vm_magic.show.display import WAITING, NotebookView, ReplyView, SilentView, TerminalView, can_update, open_handle
from vm_magic.show.errors import Interrupted
from vm_magic.show.reply_bundle import reply_bundle
from vm_magic.show.reply_text import ReplyText
from vm_magic.state.chat_flags import SAMPLING_FLAGS, TOOL_CHOICES
from vm_magic.state.conversation import Message, render_prompt
from vm_magic.state.session import Session

if TYPE_CHECKING:
    from vm_magic.chat.tool_loop import ToolLoop
    from vm_magic.chat.tools import NotebookTool

_SAMPLING = (*(dest for _, dest, _, _ in SAMPLING_FLAGS), "stop", "logprobs")
Talk = Union[Generation, "ToolLoop"]


def talk(session: Session, shell: Any, command: str, line: str, cell: str | None) -> Any:
    """Both forms: a cell streams and files its Reply, a line returns it."""
    parser = command_parser(command)
    words, text = split_text(parser, line)
    parsed = parser.read(words)
    if cell is not None:
        if text:
            raise UsageError(f"{text!r} is no flag; the message goes into the cell's body")
        text = cell.strip("\n") if command == "chat" else cell.removesuffix("\n")
    if not parsed.raw:
        text = render_prompt(text, shell.user_ns)
    _check(parsed, shell)
    options = chat_options(parsed, shell.user_ns)
    if command == "chat":
        under_way = _with_tools(start_chat(session, text, options), options, parsed)
    else:
        under_way = start_completion(session, text, options)
    if parsed.detach:
        assert isinstance(under_way, Generation), "checked: tools are not detached"
        return _detached(under_way, parsed, shell)
    if cell is None:
        return _followed(under_way, parsed, shell, SilentView(), returned=True)
    return _followed(under_way, parsed, shell, _view(parsed, shell), returned=False)


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


def _with_tools(first: Generation, options: ChatOptions, parsed: argparse.Namespace) -> Talk:
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


def _followed(under_way: Talk, parsed: argparse.Namespace, shell: Any, view: ReplyView, *, returned: bool) -> Any:
    try:
        reply = under_way.follow(view)
    except Interrupted as stopped:
        if stopped.reply is not None:
            _file(stopped.reply, parsed, shell)
        raise
    if not parsed.out:
        _say_how_it_ended(reply, under_way, parsed)
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
    def store(reply: Reply) -> None:
        if parsed.out:
            shell.user_ns[parsed.out] = reply

    pending = PendingReply(generation, _view(parsed, shell), store)
    if not parsed.out:
        shell.displayhook.update_user_ns(pending)


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


def _say_how_it_ended(reply: Reply, under_way: Talk, parsed: argparse.Namespace) -> None:
    if reply.finish_reason == "length":
        limit = under_way.stream.params.max_tokens
        full = limit is None or reply.usage.completion_tokens < limit
        context = "the context is full: start anew with --new, or reload with a larger --max-model-len"
        print(context if full else f"cut off after {limit} tokens: a larger --max-tokens gives more")
    if reply.finish_reason == "repetition":
        print("ended: it repeated itself")
    if under_way.stopped_at_limit:
        rounds = f"{parsed.max_tool_rounds} round{'s' * (parsed.max_tool_rounds > 1)}"
        print(f"stopped after {rounds} of tool calls: a larger --max-tool-rounds lets the model go on")
    if parsed.stats:
        print(speed_text(*under_way.earlier_replies, reply))


def chat_options(parsed: argparse.Namespace, namespace: Mapping[str, Any]) -> ChatOptions:
    """What the flags of one message say. Raises RequestError for schemas and tools that are none."""
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
