"""Replies to one message side by side: submitted at once, followed together, kept on request."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from engine.errors import RequestError
from engine.outputs import Reply
from vm_magic.chat.generation import DRAIN_SECONDS, INTERRUPTED, ChatOptions, Generation, ask, begin_turn
from vm_magic.show.compare_view import CompareView, VariantShown, compare_bundle
from vm_magic.show.reply_bundle import Format
from vm_magic.state import session as sessions
from vm_magic.state.compare_flags import Variant
from vm_magic.state.conversation import Conversation, Message
from vm_magic.state.session import Session

if TYPE_CHECKING:
    import pandas

_ENDS = {"length": "stopped at max_tokens", "repetition": "ended: it repeated itself", "abort": INTERRUPTED}
"""Ends of a reply that are worth a word."""
HERE, REMOTE = "here:", "remote:"
"""What may stand before a model's name, where this kernel and the server have models of one name."""


@dataclass
class _Branch:
    """One variant's request, and what became of it."""

    variant: Variant
    generation: Generation
    reply: Reply | None = None
    failure: Exception | None = None

    @property
    def over(self) -> bool:
        return self.reply is not None

    def shown(self) -> VariantShown:
        """The column as it is now."""
        label, text = self.variant.label, self.generation.shown
        if self.reply is None:
            return VariantShown(label, text, f"{self.generation.stream.num_tokens:,} tokens …")
        if self.failure is not None:
            return VariantShown(label, text, reply_facts(self.reply), f"⚠ {self.failure}", over=True)
        mark = _ENDS.get(self.reply.finish_reason or "", "")
        return VariantShown(label, text, reply_facts(self.reply), mark, over=True)

    def step(self, timeout: float) -> None:
        """Take what came; at the end the reply."""
        try:
            if self.generation.take(timeout):
                self.reply = self.generation.keep()
        except Exception as error:  # noqa: BLE001 - this variant's column says it, the others go on
            self.failure = error
            self.reply = Reply(self.generation.shown.text, finish_reason="error")


def reply_facts(reply: Reply) -> str:
    """``48 tokens · 20.3 tokens/s``."""
    tokens = reply.usage.completion_tokens
    rate = None if reply.metrics is None else reply.metrics.decode_rate(tokens)
    return f"{tokens:,} token{'s' * (tokens != 1)}" + (f" · {rate:.1f} tokens/s" if rate else "")


class ComparedChat:
    """Several requests under way, and the conversation that one of their replies may join."""

    def __init__(self, branches: Sequence[_Branch], conversation: Conversation, format: Format) -> None:
        self._branches = branches
        self._conversation, self._before = conversation, list(conversation.messages)
        self._format: Format = format
        self.interrupted = False

    def follow(self, view: CompareView) -> "Comparison":
        """Show all replies in ``view`` until the last one ends. ■ ends them all and keeps what there is.

        Raises what went wrong if it did for every one of them.
        """
        try:
            while waiting := [branch for branch in self._branches if not branch.over]:
                for branch in waiting:
                    branch.step(DRAIN_SECONDS / len(waiting))
                view.refresh(self._shown())
        except KeyboardInterrupt:
            self.interrupted = True
            try:
                self.abort()
            except KeyboardInterrupt:  # pressed twice: all of them are ending already
                self.abort()
        view.finish(self._shown())
        failures = [branch.failure for branch in self._branches if branch.failure is not None]
        if len(failures) == len(self._branches):
            raise failures[0]
        return self._comparison()

    def abort(self) -> None:
        """End all requests; what they wrote stays."""
        waiting = [branch for branch in self._branches if not branch.over]
        for branch in waiting:
            branch.generation.stream.abort()
        for branch in waiting:
            while not branch.over:
                branch.step(DRAIN_SECONDS)

    def _shown(self) -> list[VariantShown]:
        return [branch.shown() for branch in self._branches]

    def _comparison(self) -> "Comparison":
        replies = [branch.reply for branch in self._branches if branch.reply is not None]
        variants = [branch.variant for branch in self._branches]
        return Comparison(variants, replies, self._shown(), self._conversation.name, self._before, self._format)


class Comparison:
    """The replies of a comparison: a sequence, also by label. None is part of the conversation until :meth:`keep`."""

    def __init__(
        self,
        variants: Sequence[Variant],
        replies: Sequence[Reply],
        shown: Sequence[VariantShown],
        conversation: str,
        before: Sequence[Message],
        format: Format = "markdown",
    ) -> None:
        self.variants, self.replies = tuple(variants), tuple(replies)
        self.kept: int | None = None
        """The place of the reply that was kept."""
        self._shown, self._format = tuple(shown), format
        self._conversation, self._before = conversation, list(before)
        self._on_keep: list[Callable[[int], None]] = []

    @property
    def labels(self) -> tuple[str, ...]:
        """What differs, one for each reply: ``temperature=0.7``."""
        return tuple(variant.label for variant in self.variants)

    def __len__(self) -> int:
        return len(self.replies)

    def __iter__(self) -> Iterator[Reply]:
        return iter(self.replies)

    def __getitem__(self, which: int | str) -> Reply:
        return self.replies[self._place(which)]

    def keep(self, which: int | str, conversation: str | None = None) -> Reply:
        """Let reply ``which`` (a place from 0, or a label) join the conversation; gives it.

        Another choice later takes its place, as long as the conversation did not go on. ``conversation`` names
        another one, which must be new. Raises RequestError.
        """
        place = self._place(which)
        reply = self.replies[place]
        if not reply.text:
            raise RequestError(f"{self.labels[place]} has no answer to keep", param="keep")
        name = conversation or self._conversation
        target = sessions.current_session().conversation(name)
        mine = [one.messages for one in self.replies]
        if target.busy or target.messages not in ([] if conversation else self._before, *mine):
            fix = "keep it under another name: .keep(…, conversation='second')"
            raise RequestError(f"conversation {name!r} went on since this comparison; {fix}", param="keep")
        target.messages = list(reply.messages)
        sessions.current_session().last_reply = reply
        self.kept = place
        for tell in self._on_keep:
            tell(place)
        return reply

    def on_keep(self, tell: Callable[[int], None]) -> None:
        """Call ``tell(place)`` whenever a reply is kept."""
        self._on_keep.append(tell)

    def to_frame(self) -> "pandas.DataFrame":
        """A row for each reply: what differs, its text, tokens, seconds and why it ended. Needs pandas."""
        from engine.batch.prompt_table import import_pandas

        rows = [
            {
                **variant.values,
                "text": reply.text,
                "reasoning": reply.reasoning,
                "tokens": reply.usage.completion_tokens,
                "time": _seconds(reply),
                "finish_reason": reply.finish_reason,
            }
            for variant, reply in zip(self.variants, self.replies, strict=True)
        ]
        frame: pandas.DataFrame = import_pandas().DataFrame(rows)
        return frame

    def __repr__(self) -> str:
        text: str = compare_bundle(self._shown, self._format)["text/plain"]
        return text

    def _repr_markdown_(self) -> str:
        text: str = compare_bundle(self._shown, self._format)["text/markdown"]
        return text

    def _place(self, which: int | str) -> int:
        if isinstance(which, str):
            if which not in self.labels:
                raise RequestError(f"no variant {which!r}; there are: {', '.join(self.labels)}", param="keep")
            return self.labels.index(which)
        if not -len(self.replies) <= which < len(self.replies):
            raise IndexError(f"there are {len(self.replies)} replies, from 0 on; got {which}")
        return which % len(self.replies)


def _seconds(reply: Reply) -> float | None:
    metrics = reply.metrics
    if metrics is None or metrics.last_token_time is None:
        return None
    return metrics.last_token_time - metrics.arrival_time


def start_comparison(
    session: Session, text: str, options: ChatOptions, variants: Sequence[Variant], format: Format
) -> ComparedChat:
    """Submit ``text`` once for each of ``variants``. Raises RequestError; then nothing is under way."""
    earlier, conversation = begin_turn(session, text, options)
    places = [_place_of(session, variant.model) for variant in variants]
    branches: list[_Branch] = []
    compared = ComparedChat(branches, conversation, format)
    try:
        for variant, (here, model) in zip(variants, places, strict=True):
            own = _options(options, variant)
            messages = earlier.with_turn(text, own.system)
            branches.append(_Branch(variant, ask(session, messages, None, own, here=here, model=model)))
    except BaseException:
        compared.abort()
        raise
    return compared


def _options(options: ChatOptions, variant: Variant) -> ChatOptions:
    given: Mapping[str, Any] = {
        name: getattr(variant, name)
        for name in ("think", "thinking_token_budget", "system")
        if getattr(variant, name) is not None
    }
    return replace(options, sampling={**options.sampling, **variant.sampling}, **given)


def _place_of(session: Session, name: str | None) -> tuple[bool, str | None]:
    """Whether a model is this kernel's, and which of the server's. Raises RequestError for one out of reach."""
    if name is None:
        return False, None
    here = [] if session.loaded is None else list(session.loaded.args.names)
    served = [] if session.remote is None else [model.name for model in session.remote.models()]
    plain = name.removeprefix(HERE).removeprefix(REMOTE)
    in_kernel = plain in here and not name.startswith(REMOTE)
    on_server = plain in served and not name.startswith(HERE)
    if in_kernel and on_server:
        raise RequestError(
            f"--compare model={name}: this kernel and the server both have it; write {HERE}{name} or {REMOTE}{name}",
            param="compare",
        )
    if in_kernel or on_server:
        return in_kernel, None if in_kernel else plain
    kernel = f"this kernel has {', '.join(here)}" if here else "no model is loaded here"
    if session.remote is None:
        reach = "%vllm_metal connect URL brings those of a server within reach, LoRA adapters too"
    else:
        reach = f"{session.remote.base_url} serves {', '.join(served) or 'none'}"
    raise RequestError(f"--compare model={name}: out of reach; {kernel}, {reach}", param="compare")
