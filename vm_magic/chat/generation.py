"""One chat or completion in the notebook: submit, follow the stream, build the Reply."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from engine.errors import ContextLengthError, RequestError
from engine.outputs import Reply, RequestOutput, Usage
from vm_magic.chat.parsed_reply import parse_reply
from vm_magic.remote.wire import RemoteOutput
from vm_magic.show.errors import Interrupted
from vm_magic.show.reply_text import ReplyReader, ReplyText
from vm_magic.show.reply_view import ReplyView
from vm_magic.state.conversation import Conversation, Message
from vm_magic.state.live_settings import thinking_kwargs
from vm_magic.state.session import Session

if TYPE_CHECKING:
    from engine.chat.request import ChatRequest, PreparedRequest, PromptRequest
    from engine.llm import LLM, RequestStream
    from engine.text.parse.output_parser import ToolChoice
    from vm_magic.chat.tools import NotebookTool
    from vm_magic.remote.stream import RemoteStream
    from vm_magic.state.record import Recorder

DRAIN_SECONDS = 0.05
SOURCE = "flag"
"""What ``explain`` calls the origin of values that a cell's flags give."""
INTERRUPTED = "■ interrupted"
FAILED = "× failed"


@dataclass(frozen=True)
class ChatOptions:
    """What the flags of one message say. ``schema`` is a JSON schema, or True for any JSON object; ``schema_class``
    the pydantic class that it came from, if it did.

    ``fork`` names the conversation whose copy this one begins with; ``tool_choice`` is OpenAI's. ``record``: the Reply
    has what repeats it.
    """

    sampling: Mapping[str, Any] = field(default_factory=dict)
    conversation: str | None = None
    new: bool = False
    system: str | None = None
    think: bool | None = None
    thinking_token_budget: int | None = None
    schema: Mapping[str, Any] | bool | None = None
    schema_class: type | None = None
    fork: str | None = None
    tools: "tuple[NotebookTool, ...]" = ()
    tool_choice: "ToolChoice" = None
    record: bool = False

    @property
    def tool_schemas(self) -> list[Mapping[str, Any]]:
        """OpenAI's tool objects."""
        return [tool.schema for tool in self.tools]

    def after_first_call(self) -> Self:
        """The options of the turns after a call: what was demanded is done, and the model decides."""
        return self if self.tool_choice == "none" else replace(self, tool_choice=None)


class Generation:
    """One request under way, and the conversation that its reply will join (None: a raw completion)."""

    stopped_at_limit = False
    """Whether a limit of tool calls ended it; without tools none does."""
    earlier_replies: "tuple[Reply, ...]" = ()
    """The replies before the last one of this turn; without tools there are none."""

    def __init__(
        self,
        session: Session,
        stream: "RequestStream",
        messages: list[Message],
        conversation: Conversation | None,
        reader: ReplyReader,
        earlier: tuple[ReplyText, ...] = (),
        *,
        options: ChatOptions,
        recorder: "Recorder | None" = None,
    ) -> None:
        self._options = options
        self.stream = stream
        self._recorder = recorder
        self.session = session
        self._earlier = earlier
        self._messages = messages
        self.conversation = conversation
        self._reader = reader

    @property
    def shown(self) -> ReplyText:
        """What there is so far, behind the turns that came before in the same cell."""
        return replace(self._reader.shown, earlier=self._earlier)

    def follow(self, view: ReplyView) -> Reply:
        """Show the reply in ``view`` until it ends. ■ aborts this request alone and raises Interrupted.

        The partial text stays on screen and, with the question, in the conversation.
        """
        reply = self.run(view)
        view.finish(self.shown, INTERRUPTED if reply.finish_reason == "abort" else "")
        return reply

    def run(self, view: ReplyView) -> Reply:
        """:meth:`follow`, but an end that is as it should be is left for the caller to show.

        A reply that calls tools does not join the conversation yet: its calls want answers first.
        """
        try:
            self._drain(view)
            return self.keep()
        except KeyboardInterrupt:
            reply = self._abort(view)
            tokens = reply.usage.completion_tokens
            raise Interrupted(
                f"stopped after {tokens} tokens; the model stays loaded, the partial reply is kept", reply
            ) from None
        except BaseException:
            self.stream.abort()
            view.finish(self.shown, FAILED)
            raise

    def _drain(self, view: ReplyView) -> None:
        over = False
        while not over:
            over = self.take(DRAIN_SECONDS)
            view.refresh(self.shown)

    def take(self, timeout: float) -> bool:
        """Read what came, waiting up to ``timeout`` seconds for something; whether that was the end."""
        over = self.stream.finished
        deltas = self.stream.drain(timeout)
        self._reader.read(deltas)
        return any(delta.finish_reason for delta in deltas) or (over and not deltas)

    def _abort(self, view: ReplyView) -> Reply:
        self.stream.abort()
        reply = self.keep()
        view.finish(self.shown, INTERRUPTED)
        return reply

    def keep(self) -> Reply:
        """Wait for the end; the Reply, added to conversation and session (a conversation takes no empty answer)."""
        output = self.stream.result()
        self._reader.read(self.stream.drain(0))
        reply = self._reader.reply
        answer: Message = {"role": "assistant", "content": reply.text}
        if reply.reasoning:
            answer["reasoning"] = reply.reasoning
        reply.finish_reason = reply.finish_reason or output.outputs[0].finish_reason
        calls = reply.finish_reason == "tool_calls"  # calls that were cut off are not made
        if calls:
            answer["tool_calls"] = reply.tool_calls
        reply.usage = _usage(output, reply.usage.reasoning_tokens)
        reply.metrics, reply.logprobs = output.metrics, output.outputs[0].logprobs
        reply.messages = [*self._messages, answer]
        if self._options.schema is not None:
            parse_reply(reply, self._options.schema_class)
        if self._recorder is not None:
            reply.record = self._recorder.finished(output, reply)
        if self.conversation is not None and reply.text and not calls:
            self.conversation.messages = list(reply.messages)
        self.session.last_reply = reply
        return reply


def _usage(output: RequestOutput, num_reasoning_tokens: int) -> Usage:
    if isinstance(output, RemoteOutput):
        return output.usage if output.usage.reasoning_tokens else output.counted(num_reasoning_tokens)
    num_tokens = len(output.outputs[0].token_ids)
    return Usage(len(output.prompt_token_ids), num_tokens, output.num_cached_tokens, num_reasoning_tokens)


def start_chat(session: Session, text: str, options: ChatOptions) -> Generation:
    """Submit ``text`` as the next message of its conversation."""
    earlier, conversation = begin_turn(session, text, options)
    return ask(session, earlier.with_turn(text, options.system), conversation, options)


def begin_turn(session: Session, text: str, options: ChatOptions) -> tuple[Conversation, Conversation]:
    """What a message goes on from, and the conversation that its reply is to join. Raises RequestError."""
    conversation = session.conversation(options.conversation)
    if conversation.busy:
        raise RequestError(f"conversation {conversation.name!r} has a detached reply under way; wait, or use -c NAME")
    if not text.strip():
        raise RequestError("no message: write it after the flags, or in the cell's body", param="messages")
    earlier = Conversation(conversation.name) if options.new else conversation
    if options.fork is not None:
        earlier = session.forked(options.fork, earlier)
    return earlier, conversation


def ask(
    session: Session,
    messages: list[Message],
    conversation: Conversation | None,
    options: ChatOptions,
    earlier: tuple[ReplyText, ...] = (),
    *,
    here: bool = False,
    model: str | None = None,
) -> Generation:
    """Submit ``messages``; ``earlier`` are the turns that the same cell shows already.

    ``here``: to this kernel's model, also while connected; ``model`` is which of the server's, if not its chosen one.
    """
    if session.remote is not None and not here:
        options = _remote_seed(session, options)
        asked: Any = remote_chat(session, messages, options, model)
        recorder = _remote_recorder(session, options, asked, messages=messages)
        return Generation(
            session, asked, messages, conversation, ReplyReader(), earlier, options=options, recorder=recorder
        )
    from engine.chat.request import ChatRequest, TemplateOptions

    llm = session.require()
    if options.tools and not llm.takes_tools:
        raise RequestError(
            "--tools: this model's chat template has no known form for tools; take a model that calls "
            "functions (Qwen3, Gemma 4, Llama 3.1 …), or load with --chat-template FILE and --tool-call-parser NAME",
            param="tools",
        )
    template_kwargs = thinking_kwargs(llm, options.think)
    request = ChatRequest(
        messages=messages,
        tools=options.tool_schemas or None,
        tool_choice=options.tool_choice,
        thinking_token_budget=options.thinking_token_budget,
        template=TemplateOptions(kwargs=template_kwargs),
        **_common(llm, options),
    )
    try:
        prepared = llm.prepare(request)
        stream = llm.submit(prepared)
    except ContextLengthError as error:
        if "max_tokens" in options.sampling or len(messages) < 3:
            raise
        fix = "Start the conversation anew with --new, or load the model with a larger --max-model-len."
        raise ContextLengthError(f"{error} {fix}", param=error.param) from None
    reader = ReplyReader(prepared.new_parser(), llm.tokenizer)
    recorder = _recorder(llm, request, prepared, stream, options)
    return Generation(session, stream, messages, conversation, reader, earlier, options=options, recorder=recorder)


def start_completion(session: Session, text: str, options: ChatOptions) -> Generation:
    """Submit ``text`` as a raw prompt: no chat template, no conversation, no parser."""
    llm = session.require() if session.remote is None else None
    if not text:
        raise RequestError("no prompt: write it after the flags, or in the cell's body", param="prompt")
    if llm is None:
        options = _remote_seed(session, options)
        asked: Any = remote_completion(session, text, options)
        recorder = _remote_recorder(session, options, asked, prompt=text)
        return Generation(session, asked, [], None, ReplyReader(), options=options, recorder=recorder)
    from engine.chat.request import PromptRequest

    request = PromptRequest(prompt=text, **_common(llm, options))
    prepared = llm.prepare(request)
    stream = llm.submit(prepared)
    recorder, reader = _recorder(llm, request, prepared, stream, options), ReplyReader(None, llm.tokenizer)
    return Generation(session, stream, [], None, reader, options=options, recorder=recorder)


def remote_chat(
    session: Session, messages: list[Message], options: ChatOptions, model: str | None = None
) -> "RemoteStream":
    """The same request to the server that the session is connected to; template and parser are the server's."""
    return session.remote_llm().submit_chat(
        messages,
        options.sampling,
        think=options.think,
        thinking_token_budget=options.thinking_token_budget,
        schema=options.schema,
        tools=options.tool_schemas or None,
        tool_choice=options.tool_choice,
        model=model,
    )


def remote_completion(session: Session, text: str, options: ChatOptions) -> "RemoteStream":
    """A raw prompt for that server."""
    return session.remote_llm().submit_completion(text, options.sampling, schema=options.schema)


def _common(llm: "LLM", options: ChatOptions) -> dict[str, Any]:
    """What a chat and a raw prompt ask for alike."""
    from engine.params.structured_outputs import StructuredOutput

    sampling = llm.defaults.resolve({"n": 1, **options.sampling}, SOURCE)
    if options.record:
        from vm_magic.state.record import with_seed

        sampling = with_seed(sampling)
    return {
        "sampling": sampling,
        "structured_outputs": StructuredOutput.from_schema(options.schema),
        "source": SOURCE,
    }


def _recorder(
    llm: "LLM",
    request: "ChatRequest | PromptRequest",
    prepared: "PreparedRequest",
    stream: "RequestStream",
    options: ChatOptions,
) -> "Recorder | None":
    if not options.record:
        return None
    from vm_magic.state.record import Recorder

    return Recorder.of_local(llm, request, prepared, stream, options.schema)


def _remote_recorder(session: Session, options: ChatOptions, stream: "RemoteStream", **asked: Any) -> "Recorder | None":
    if not options.record:
        return None
    from vm_magic.state.record import Recorder

    remote = session.remote_llm()
    thinking = remote.settings.thinking()
    switch = options.think if options.think is not None else thinking.get("enable_thinking")
    asked |= {
        "tools": options.tool_schemas or None,
        "tool_choice": options.tool_choice,
        "schema": options.schema,
        "thinking_token_budget": options.thinking_token_budget or thinking.get("thinking_token_budget"),
        "template_kwargs": thinking_kwargs(remote, switch) or None,
    }
    given = {**remote.settings.snapshot(), **options.sampling}
    return Recorder.of_remote(remote, asked, stream, given)


def _remote_seed(session: Session, options: ChatOptions) -> ChatOptions:
    """``options`` with a seed, where they are recorded and neither they nor the settings have one."""
    if not options.record or "seed" in {**session.remote_llm().settings.snapshot(), **options.sampling}:
        return options
    from vm_magic.state.record import draw_seed

    return replace(options, sampling={**options.sampling, "seed": draw_seed()})
