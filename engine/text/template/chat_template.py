"""Chat templates: messages to prompt text, in Jinja's sandbox, with what transformers' templates expect."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, Self

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from engine.errors import ConfigError, RequestError, error_line
from engine.format.text import shortened
from engine.params.engine_args import EngineArgs
from engine.text.template.bounded import BoundedEnvironment
from engine.text.template.budget import Budget, TooMuchError, compiling, render_within, within
from engine.text.template.chat_messages import (
    ContentFormat,
    MessageForm,
    detect_content_format,
    normalise_messages,
    tests_for_string,
    to_json,
)
from engine.text.template.probes import Probes, SystemPlace
from engine.text.tokens.tokenizer import Tokenizer

RESERVED_VARIABLES = frozenset(
    ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template")
)
"""Names that ``chat_template_kwargs`` may not set: they have their own fields."""

_LONGEST_REFUSAL = 1000
"""Characters of what a template says where it refuses."""
_NOT_COMPILED = (SyntaxError, RecursionError, MemoryError, ValueError, OverflowError, jinja2.TemplateError)
"""What Python and Jinja raise for a source that is too deep or too large for them."""
_UNNAMED = "chat template that was given"
_PROBING = 2.0
"""Seconds of processor time for all probes of a template together: each renders two or three messages."""
_END_MARK = "<<vm-magic:end-of-the-final-message>> "
"""Appended to the message that is continued; the space at its end shows whether the template trims."""


class _TemplateRaised(jinja2.TemplateError):
    """The template called ``raise_exception``."""


class _IgnoreGeneration(Extension):
    """``{% generation %}``: marks the assistant's tokens for training; here only its body matters."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads a class attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The block's body, unwrapped."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def load_template(flag_value: str, named: Mapping[str, str] = MappingProxyType({})) -> str:
    """The text of the template that ``--chat-template`` gives: one of ``named``, a file, or the text itself.

    Raises ConfigError for a file that is not there and for text that is not valid Jinja.
    """
    source = named.get(flag_value) or _read_template(flag_value, named)
    try:
        _compile(source)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(
            f"--chat-template: line {error.lineno}: {error.message}", flag="chat_template", value=flag_value
        ) from None
    except _NOT_COMPILED as error:
        raise ConfigError(
            f"--chat-template cannot be compiled: {error_line(error)}", flag="chat_template", value=flag_value
        ) from None
    return source


def parse_template(source: str) -> nodes.Template:
    """The syntax tree of a template, to look at. Raises jinja2.TemplateSyntaxError."""
    return _environment().parse(source)


def _read_template(value: str, named: Mapping[str, str]) -> str:
    if _is_jinja(value):
        return value
    path = Path(value).expanduser()
    if path.is_file():
        return path.read_text(encoding="utf-8")
    names = f", nor a template of the model ({', '.join(sorted(named))})" if named else ""
    raise ConfigError(
        f"--chat-template {value}: no such file, and not Jinja text either (it would contain {{{{ or {{%){names}",
        flag="chat_template",
        value=value,
    )


def _is_jinja(value: str) -> bool:
    return any(mark in value for mark in "{}\n")


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and the variables that it always gets.

    ``source`` may be None: the model has no template and :meth:`render` says how to give one. ``named`` are the model's
    templates by name; ``for_tools`` is used in place of ``source`` where tools are shown. ``special_tokens`` are
    variables by their names, such as ``bos_token``. ``wanted_format`` None: the content's format is detected in the
    template.
    """

    source: str | None
    named: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    for_tools: str | None = field(default=None, kw_only=True)
    special_tokens: Mapping[str, str] = field(default_factory=dict, kw_only=True)
    default_kwargs: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    wanted_format: ContentFormat | None = field(default=None, kw_only=True)

    @classmethod
    def of_model(cls, args: EngineArgs, tokenizer: Tokenizer) -> Self:
        """The template that ``--chat-template`` names, else the tokenizer's own: for tools its ``tool_use``, if any."""
        wanted = args.chat_template_content_format
        named = tokenizer.named_templates
        given = None if args.chat_template is None else load_template(args.chat_template, named)
        return cls(
            given or named.get("default"),
            named=named,
            for_tools=None if given else named.get("tool_use"),
            special_tokens=tokenizer.named_tokens,
            default_kwargs=args.default_chat_template_kwargs,
            wanted_format=None if wanted == "auto" else wanted,  # type: ignore[arg-type]
        )

    def chosen(self, wanted: str | None, *, with_tools: bool) -> Self:
        """The template of a request, as transformers chooses: the ``wanted`` one (a name or Jinja text), else that for
        tools where they are shown. Raises RequestError for an unknown name.
        """
        if wanted is None:
            return self._with_source(self.for_tools) if with_tools and self.for_tools else self
        if wanted not in self.named and not _is_jinja(wanted):
            names = ", ".join(sorted(self.named)) or "none"
            raise RequestError(
                f"chat_template {wanted!r} is neither Jinja text nor a template of this model; it has: {names}.",
                param="chat_template",
            )
        return self._with_source(self.named.get(wanted, wanted))

    def _with_source(self, source: str) -> Self:
        return replace(self, source=source, for_tools=None)

    def system_place(self, *, with_tools: bool) -> SystemPlace:
        """Where the template shows system messages, of a prompt with tools or without."""
        self._compiled()
        return _system_place(str(self.source), self._form, with_tools)

    @property
    def content_format(self) -> ContentFormat:
        """Whether the template gets ``content`` as a string or as parts to loop over."""
        return self.wanted_format or self._compiled().content_format

    @property
    def variables(self) -> frozenset[str]:
        """Names that the template reads, besides those that every template gets; empty without a template."""
        return self._compiled().variables if self.source else frozenset()

    @property
    def takes_tools(self) -> bool:
        """Whether the template shows the model the tools of a request."""
        used = self.chosen(None, with_tools=True)
        return bool(used.source) and used._compiled().takes_tools

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt for ``messages``; ``kwargs`` go to the template over ``default_kwargs``.

        ``continue_final_message`` ends the prompt inside the last message (then
        ``add_generation_prompt`` must be false). Raises RequestError, also for what the template
        itself refuses.
        """
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "Cannot set both `continue_final_message` and `add_generation_prompt` to True.",
                param="continue_final_message",
            )
        for name in RESERVED_VARIABLES.intersection(kwargs):
            raise RequestError(f"chat_template_kwargs cannot set {name!r}.", param="chat_template_kwargs")
        compiled = self._compiled()
        has_calls = any(isinstance(message, Mapping) and message.get("tool_calls") for message in messages)
        form = _call_form(str(self.source), self._form) if has_calls else self._form
        conversation = normalise_messages(messages, form)
        if continue_final_message:
            _mark_end(conversation[-1])
        variables = {
            **self.special_tokens,
            "documents": None,
            **self.default_kwargs,
            **kwargs,
            "messages": conversation,
            "tools": list(tools) if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        text = _run(compiled.template, variables, self._name)
        return _cut_at_mark(text) if continue_final_message else text

    @property
    def _name(self) -> str:
        """What an error calls the template."""
        return next((f"chat template {name!r}" for name, text in self.named.items() if text == self.source), _UNNAMED)

    @property
    def _form(self) -> MessageForm:
        """The form that the template's text shows; what calls are to look like only a probe tells."""
        compiled = self._compiled()
        as_parts = compiled.strings_as_parts if self.wanted_format is None else self.wanted_format == "openai"
        return MessageForm(self.wanted_format or compiled.content_format, as_parts)

    def _compiled(self) -> "_Compiled":
        if not self.source:
            if self.named:
                raise RequestError(
                    "This model has several chat templates and none of them is the default: name one with "
                    f"--chat-template ({', '.join(sorted(self.named))}).",
                    param="chat_template",
                )
            raise RequestError(
                "This model has no chat template: give one with --chat-template FILE, or send a prompt to "
                "/v1/completions (in a notebook, %vllm_metal complete).",
                param="messages",
            )
        try:
            return _compile(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise RequestError(
                f"The chat template is not valid Jinja: line {error.lineno}: {error.message}", param="chat_template"
            ) from None
        except _NOT_COMPILED as error:
            raise RequestError(
                f"The {self._name} cannot be compiled ({error_line(error)}): name another with --chat-template.",
                param="chat_template",
            ) from None


@dataclass(frozen=True)
class _Compiled:
    template: jinja2.Template
    content_format: ContentFormat
    strings_as_parts: bool
    variables: frozenset[str]
    takes_tools: bool


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> _Compiled:
    environment = _environment()
    tree = environment.parse(source)
    with within(compiling()):
        template = environment.from_string(source)
    content_format = detect_content_format(tree)
    variables = frozenset(meta.find_undeclared_variables(tree))
    return _Compiled(
        template=template,
        content_format=content_format,
        strings_as_parts=content_format == "openai" and not tests_for_string(tree),
        variables=variables - RESERVED_VARIABLES,
        takes_tools="tools" in variables,
    )


@functools.lru_cache(maxsize=16)
def _call_form(source: str, base: MessageForm) -> MessageForm:
    return _probes(source, base).call_form()


@functools.lru_cache(maxsize=16)
def _system_place(source: str, base: MessageForm, with_tools: bool) -> SystemPlace:
    return _probes(source, base).system_place(with_tools=with_tools)


def _probes(source: str, base: MessageForm) -> Probes:
    template, allowed = _compile(source).template, Budget(seconds=_PROBING)
    return Probes(lambda variables: render_within(template, variables, allowed), base)


@functools.cache
def _environment() -> BoundedEnvironment:
    environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_IgnoreGeneration, loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which no model was trained on.
    return to_json(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise _TemplateRaised(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _run(template: jinja2.Template, variables: Mapping[str, Any], name: str) -> str:
    try:
        return render_within(template, variables)
    except TooMuchError as error:
        raise RequestError(
            f"The {name} was stopped: {error.message}. Name another with --chat-template, or send a prompt to "
            "/v1/completions (in a notebook, %vllm_metal complete).",
            param="chat_template",
        ) from None
    except _TemplateRaised as error:
        message = shortened(error.message or "The chat template refused these messages.", _LONGEST_REFUSAL)
        raise RequestError(message, param="messages") from None
    except Exception as error:
        # A template is a program: on odd messages it can fail with any of Python's errors.
        raise RequestError(
            f"The chat template failed on these messages: {error_line(error, _LONGEST_REFUSAL)}", param="messages"
        ) from error


def _mark_end(message: dict[str, Any]) -> None:
    content = message["content"]
    if isinstance(content, str):
        message["content"] = content + _END_MARK
    elif content:
        content[-1] = {**content[-1], "text": content[-1]["text"] + _END_MARK}
    else:
        raise RequestError("The final message has no text to continue.", param="continue_final_message")


def _cut_at_mark(text: str) -> str:
    position = text.rfind(_END_MARK.strip())
    if position < 0:
        raise RequestError(
            "The final message does not appear in the prompt: this chat template cannot continue it.",
            param="continue_final_message",
        )
    kept = text[:position]
    trims = not text.startswith(_END_MARK, position)
    return kept.rstrip() if trims else kept
