"""A reply that goes on while other cells run: ``--detach``."""

from collections.abc import Callable
from contextvars import copy_context

from engine.handover import BackgroundThread
from engine.outputs import Reply
from vm_magic.chat.generation import Generation
from vm_magic.show.reply_view import ReplyView


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
        self._thread = BackgroundThread(context.run, "vm-detached-reply", (self._run,))
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
