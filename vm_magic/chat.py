"""One chat or completion in the notebook: submit, follow the stream, build the Reply."""

import threading
from collections.abc import Callable, Mapping
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.errors import ContextLengthError, RequestError
from engine.outputs import Reply, RequestOutput, Usage
from vm_magic.conversation import Conversation, Message
from vm_magic.display import ReplyView
from vm_magic.errors import Interrupted
from vm_magic.remote.wire import RemoteOutput
from vm_magic.reply_reader import ReplyReader, ReplyText
from vm_magic.session import Session

if TYPE_CHECKING:
    from engine.constraints import Constraints
    from engine.llm import LLM, RequestStream
    from engine.text.output_parser import OutputParser
    from vm_magic.remote.stream import RemoteStream

DRAIN_SECONDS = 0.05
ABORT_SECONDS = 5.0
INTERRUPTED = "⏹ interrupted"
THINKING_SWITCHES = ("enable_thinking", "thinking")
"""What chat templates call it."""


@dataclass(frozen=True)
class ChatOptions:
    """What the flags of one message say. ``schema`` is a JSON schema, or True for any JSON object."""

    sampling: Mapping[str, Any] = field(default_factory=dict)
    conversation: str | None = None
    new: bool = False
    system: str | None = None
    think: bool | None = None
    thinking_token_budget: int | None = None
    schema: Mapping[str, Any] | bool | None = None


class Generation:
    """One request under way, and the conversation that its reply will join (None: a raw completion)."""

    def __init__(
        self,
        session: Session,
        stream: "RequestStream",
        messages: list[Message],
        conversation: Conversation | None,
        parser: "OutputParser | None" = None,
    ) -> None:
        self.stream = stream
        self.session = session
        self._messages = messages
        self.conversation = conversation
        self._reader = ReplyReader(parser)

    def follow(self, view: ReplyView) -> Reply:
        """Show the reply in ``view`` until it ends. ■ aborts this request alone and raises Interrupted.

        The partial text stays on screen and, with the question, in the conversation.
        """
        try:
            self._drain(view)
            reply = self._keep()
        except KeyboardInterrupt:
            reply = self._abort(view)
            tokens = reply.usage.completion_tokens
            raise Interrupted(
                f"stopped after {tokens} tokens; the model stays loaded, the partial reply is kept"
            ) from None
        except BaseException:
            self.stream.abort()
            view.finish(self._reader.shown, "⚠ failed")
            raise
        view.finish(self._reader.shown, INTERRUPTED if reply.finish_reason == "abort" else "")
        return reply

    def _drain(self, view: ReplyView) -> None:
        while True:
            over = self.stream.finished
            deltas = self.stream.drain(DRAIN_SECONDS)
            self._reader.read(deltas)
            view.refresh(self._reader.shown)
            if any(delta.finish_reason for delta in deltas) or (over and not deltas):
                return

    def _abort(self, view: ReplyView) -> Reply:
        self.stream.abort()
        reply = self._keep()
        view.finish(self._reader.shown, INTERRUPTED)
        return reply

    def _keep(self) -> Reply:
        """Wait for the end; the Reply, added to conversation and session (a conversation takes no empty answer)."""
        output = self.stream.result()
        self._reader.read(self.stream.drain(0))
        completion, shown = output.outputs[0], self._reader.shown
        answer: Message = {"role": "assistant", "content": shown.text}
        if shown.reasoning:
            answer["reasoning"] = shown.reasoning
        if shown.tool_calls:
            answer["tool_calls"] = self._reader.tool_calls
        reply = Reply(
            shown.text,
            reasoning=shown.reasoning or None,
            tool_calls=self._reader.tool_calls,
            finish_reason=self._reader.finish_reason or completion.finish_reason,
            usage=_usage(output, shown),
            metrics=output.metrics,
            logprobs=completion.logprobs,
            messages=[*self._messages, answer],
        )
        if self.conversation is not None and (shown.text or shown.tool_calls):
            self.conversation.messages = list(reply.messages)
        self.session.last_reply = reply
        return reply


def _usage(output: RequestOutput, shown: ReplyText) -> Usage:
    if isinstance(output, RemoteOutput):
        return output.usage if output.usage.reasoning_tokens else output.counted(shown.num_reasoning_tokens)
    num_tokens = len(output.outputs[0].token_ids)
    return Usage(len(output.prompt_token_ids), num_tokens, output.num_cached_tokens, shown.num_reasoning_tokens)


def start_chat(session: Session, text: str, options: ChatOptions) -> Generation:
    """Submit ``text`` as the next message of its conversation."""
    llm = session.require() if session.remote is None else None
    conversation = session.conversation(options.conversation)
    if conversation.busy:
        raise RequestError(f"conversation {conversation.name!r} has a detached reply under way; wait, or use -c NAME")
    if not text.strip():
        raise RequestError("no message: write it after the flags, or in the cell's body", param="messages")
    earlier = Conversation(conversation.name) if options.new else conversation
    messages = earlier.with_turn(text, options.system)
    if llm is None:
        return Generation(session, remote_chat(session, messages, options), messages, conversation)
    prompt = llm.render_chat(messages, chat_template_kwargs=_thinking(llm, options.think))
    parser = llm.output_parser(prompt=prompt)
    try:
        stream = _submit(llm, llm.tokenize(prompt, add_special_tokens=False), options, parser)
    except ContextLengthError as error:
        if "max_tokens" in options.sampling or not earlier.messages:
            raise
        fix = "Start the conversation anew with --new, or load the model with a larger --max-model-len."
        raise ContextLengthError(f"{error} {fix}", param=error.param) from None
    stream.parsing = {"prompt": prompt}
    return Generation(session, stream, messages, conversation, parser)


def start_completion(session: Session, text: str, options: ChatOptions) -> Generation:
    """Submit ``text`` as a raw prompt: no chat template, no conversation, no parser."""
    llm = session.require() if session.remote is None else None
    if not text:
        raise RequestError("no prompt: write it after the flags, or in the cell's body", param="prompt")
    if llm is None:
        return Generation(session, remote_completion(session, text, options), [], None)
    return Generation(session, _submit(llm, text, options, None), [], None)


def remote_chat(session: Session, messages: list[Message], options: ChatOptions) -> "RemoteStream":
    """The same request to the server that the session is connected to; template and parser are the server's."""
    return session.remote_llm().submit_chat(
        messages,
        options.sampling,
        think=options.think,
        thinking_token_budget=options.thinking_token_budget,
        schema=options.schema,
    )


def remote_completion(session: Session, text: str, options: ChatOptions) -> "RemoteStream":
    """A raw prompt for that server."""
    return session.remote_llm().submit_completion(text, options.sampling, schema=options.schema)


def _submit(
    llm: "LLM", prompt: str | list[int], options: ChatOptions, parser: "OutputParser | None"
) -> "RequestStream":
    params = llm.resolve_sampling(source="flag", n=1, **options.sampling).params
    if parser is not None and parser.needs_special_tokens:
        params = params.replace(skip_special_tokens=False)
    return llm.submit(prompt, params, constraints=_constraints(options))


def _constraints(options: ChatOptions) -> "Constraints | None":
    if options.schema is None and options.thinking_token_budget is None:
        return None
    from engine.constraints import Constraints

    any_object, schema = {"json_object": True}, {"json": options.schema}
    structured = None if options.schema is None else any_object if options.schema is True else schema
    return Constraints.from_request(structured_outputs=structured, thinking_token_budget=options.thinking_token_budget)


def _thinking(llm: "LLM", think: bool | None) -> dict[str, Any]:
    """The chat template's variable for ``--think``. Raises RequestError if it has none to turn thinking on."""
    if think is None:
        return {}
    names = [name for name in THINKING_SWITCHES if name in llm.template_variables]
    if think and not names:
        raise RequestError(
            "--think: this model's chat template has no switch for thinking (enable_thinking); leave the flag out",
            param="think",
        )
    return dict.fromkeys(names, think)


class PendingReply:
    """A detached reply: its cell's output goes on filling while other cells run."""

    def __init__(self, generation: Generation, view: ReplyView, done: Callable[[Reply], None]) -> None:
        self._generation = generation
        self._view = view
        self._done = done
        self._reply: Reply | None = None
        self._failure: Exception | None = None
        if generation.conversation is not None:
            generation.conversation.busy = True
        context = copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), name="vm-detached-reply", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._reply = self._generation.follow(self._view)
            self._done(self._reply)
        except Exception as error:  # noqa: BLE001 - the thread ends here; wait() raises it
            self._failure = error
        finally:
            if self._generation.conversation is not None:
                self._generation.conversation.busy = False

    @property
    def done(self) -> bool:
        """Whether the reply is over."""
        return not self._thread.is_alive()

    def wait(self, timeout: float | None = None) -> Reply | None:
        """The Reply once it is there; None if ``timeout`` seconds pass first. Raises what went wrong."""
        self._thread.join(timeout)
        if self._failure is not None:
            raise self._failure
        return self._reply

    def cancel(self) -> None:
        """Stop generating; the partial text is kept."""
        self._generation.stream.abort()

    def __repr__(self) -> str:
        return f"PendingReply({'done' if self.done else 'under way; .wait() for it, .cancel() stops it'})"
