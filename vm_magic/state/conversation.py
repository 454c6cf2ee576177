"""Conversations by name, and prompts with ``{{ name }}`` filled in from the notebook."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.errors import RequestError

if TYPE_CHECKING:
    from jinja2 import Environment

DEFAULT_CONVERSATION = "default"
Message = dict[str, Any]


@dataclass
class Conversation:
    """Messages in OpenAI's form. ``busy`` while a detached reply is being generated.

    ``forked_from`` is the name of the conversation that this one began as a copy of.
    """

    name: str
    messages: list[Message] = field(default_factory=list)
    busy: bool = False
    forked_from: str | None = None

    def clear(self) -> None:
        """Forget all messages, the system message too."""
        self.messages = []
        self.forked_from = None

    def with_turn(self, text: str, system: str | None) -> list[Message]:
        """A copy of the messages that ends with the user's ``text``; ``system`` replaces the first message."""
        messages = list(self.messages)
        if system is not None:
            rest = messages[1:] if messages and messages[0]["role"] == "system" else messages
            messages = [{"role": "system", "content": system}, *rest]
        return [*messages, {"role": "user", "content": text}]


def render_prompt(text: str, namespace: Mapping[str, Any], summaries: list[str] | None = None) -> str:
    """Fill in ``{{ expressions }}`` of ``text`` from ``namespace`` with Jinja2.

    With ``summaries``, an object that ``vm_magic.describe`` has a summary of is filled in as that, and what was sent so
    is added to the list; ``{{ df | describe(8000) }}`` gives it more room, ``{{ df | string }}`` is its whole text.
    Single braces and ``$`` stay as typed. Raises RequestError naming an undefined variable.
    """
    if not any(mark in text for mark in ("{{", "{%", "{#")):
        return text
    from jinja2 import TemplateSyntaxError, UndefinedError

    from vm_magic.summaries.text import plain_text

    environment = _environment(summaries)
    try:
        return environment.from_string(text).render(namespace)
    except UndefinedError as error:
        fix = "define it in a cell, or send the text as typed with --raw"
        raise RequestError(f"prompt: {error.message}; {fix}", param="prompt") from None
    except TemplateSyntaxError as error:
        fix = "send the text as typed with --raw"
        raise RequestError(f"prompt, line {error.lineno}: {error.message}; {fix}", param="prompt") from None
    except Exception as error:  # noqa: BLE001 - the user's own objects may raise anything
        raise RequestError(f"prompt: {type(error).__name__}: {plain_text(error)}", param="prompt") from None


def _environment(summaries: list[str] | None) -> "Environment":
    """Jinja2's, in which objects are summarized where the caller keeps ``summaries``."""
    from jinja2 import Environment, StrictUndefined, Undefined

    from vm_magic.summaries.registry import DEFAULT_LIMIT, describe
    from vm_magic.summaries.text import plain_text

    kept: list[str] = [] if summaries is None else summaries

    def summarized(value: Any) -> Any:
        found = describe.summary(value)
        if found is None:  # a text that cannot be made is no reason to lose the message
            return value if isinstance(value, Undefined) else plain_text(value)
        kept.append(found)
        return found

    def described(value: Any, limit: int = DEFAULT_LIMIT) -> str:
        text = describe(value, limit)
        kept.extend([] if isinstance(value, str) else [text])
        return text

    environment = Environment(
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
        finalize=None if summaries is None else summarized,
    )
    environment.filters["describe"] = described
    return environment
