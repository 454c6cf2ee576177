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
from vm_magic.session import Session

if TYPE_CHECKING:
    from engine.llm import RequestStream

DRAIN_SECONDS = 0.05
ABORT_SECONDS = 5.0
INTERRUPTED = "⏹ interrupted"


@dataclass(frozen=True)
class ChatOptions:
    """What the flags of one message say."""

    sampling: Mapping[str, Any] = field(default_factory=dict)
    conversation: str | None = None
    new: bool = False
    system: str | None = None
    think: bool | None = None


class Generation:
    """One request under way, and the conversation that its reply will join (None: a raw completion)."""

    def __init__(
        self, session: Session, stream: "RequestStream", messages: list[Message], conversation: Conversation | None
    ) -> None:
        self.stream = stream
        self.session = session
        self._messages = messages
        self.conversation = conversation
        self._text = ""

    def follow(self, view: ReplyView) -> Reply:
        """Show the reply in ``view`` until it ends. ■ aborts this request alone and raises Interrupted.

        The partial text stays on screen and, with the question, in the conversation.
        """
        try:
            self._drain(view)
            reply = self._keep(self.stream.result())
        except KeyboardInterrupt:
            reply = self._abort(view)
            tokens = reply.usage.completion_tokens
            raise Interrupted(
                f"stopped after {tokens} tokens; the model stays loaded, the partial reply is kept"
            ) from None
        except BaseException:
            self.stream.abort()
            view.finish(self._text, "⚠ failed")
            raise
        view.finish(reply.text, INTERRUPTED if reply.finish_reason == "abort" else "")
        return reply

    def _drain(self, view: ReplyView) -> None:
        while True:
            over = self.stream.finished
            deltas = self.stream.drain(DRAIN_SECONDS)
            self._text += "".join(delta.text for delta in deltas if delta.index == 0)
            view.refresh(self._text)
            if any(delta.finish_reason for delta in deltas) or (over and not deltas):
                return

    def _abort(self, view: ReplyView) -> Reply:
        self.stream.abort()
        reply = self._keep(self.stream.result())
        view.finish(reply.text, INTERRUPTED)
        return reply

    def _keep(self, output: RequestOutput) -> Reply:
        """The Reply of ``output``, added to conversation and session (a conversation takes no empty answer)."""
        completion = output.outputs[0]
        answer: Message = {"role": "assistant", "content": completion.text}
        reply = Reply(
            completion.text,
            finish_reason=completion.finish_reason,
            usage=Usage(len(output.prompt_token_ids), len(completion.token_ids), output.num_cached_tokens),
            metrics=output.metrics,
            logprobs=completion.logprobs,
            messages=[*self._messages, answer],
        )
        if self.conversation is not None and completion.text:
            self.conversation.messages = list(reply.messages)
        self.session.last_reply = reply
        return reply


def start_chat(session: Session, text: str, options: ChatOptions) -> Generation:
    """Submit ``text`` as the next message of its conversation."""
    llm = session.require()
    conversation = session.conversation(options.conversation)
    if conversation.busy:
        raise RequestError(f"conversation {conversation.name!r} has a detached reply under way; wait, or use -c NAME")
    if not text.strip():
        raise RequestError("no message: write it after the flags, or in the cell's body", param="messages")
    earlier = Conversation(conversation.name) if options.new else conversation
    messages = earlier.with_turn(text, options.system)
    template = {} if options.think is None else {"enable_thinking": options.think}
    prompt = llm.render_chat(messages, chat_template_kwargs=template)
    token_ids = llm.tokenize(prompt, add_special_tokens=False)
    try:
        stream = llm.submit(token_ids, llm.sampling_params(n=1, **options.sampling))
    except ContextLengthError as error:
        if "max_tokens" in options.sampling or not earlier.messages:
            raise
        fix = "Start the conversation anew with --new, or load the model with a larger --max-model-len."
        raise ContextLengthError(f"{error} {fix}", param=error.param) from None
    return Generation(session, stream, messages, conversation)


def start_completion(session: Session, text: str, options: ChatOptions) -> Generation:
    """Submit ``text`` as a raw prompt: no chat template, no conversation."""
    llm = session.require()
    if not text:
        raise RequestError("no prompt: write it after the flags, or in the cell's body", param="prompt")
    stream = llm.submit(text, llm.sampling_params(n=1, **options.sampling))
    return Generation(session, stream, [], None)


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
