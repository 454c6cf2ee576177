"""A request on its way to the engine: what was asked, whoever asked, and what the engine gets.

All entry points (``LLM.chat``, ``LLM.map``, ``%%chat``, chat completions, Responses, Messages) translate into a
:class:`ChatRequest` or a :class:`PromptRequest`; :meth:`ChatPreparer.prepare` makes the :class:`PreparedRequest`
that ``LLM.submit`` takes. Nowhere else do messages meet the template, the parser and the limits.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.errors import RequestError
from engine.params.sampling_defaults import MODEL_SOURCES
from engine.params.sampling_params import SamplingParams
from engine.params.settings import Settings
from engine.params.structured_outputs import Constraints, RepetitionDetection, StructuredOutput
from engine.text.parse.output_parser import OutputParser, ToolChoice
from engine.text.parse.parser_choice import MakeParser, ParserChoice
from engine.text.template.chat_template import ChatTemplate
from engine.text.template.system_messages import fold_system_messages
from engine.text.tokens.tokenizer import Tokenizer

Message = Mapping[str, Any]
Layer = tuple[str, Mapping[str, Any]]
"""The name of a source, and the values that come from it."""
_FOLDED = "a system message stood where this model's template refuses it: joined to the first one, or to its turn"


@dataclass(frozen=True)
class TemplateOptions:
    """How messages become a prompt.

    ``kwargs`` are vLLM's ``chat_template_kwargs``; ``reasoning_effort`` and ``documents`` are variables of the
    template too, an effort also switches thinking on or off where ``kwargs`` do not. ``shown_tools`` are those that the
    prompt shows, None: all that can be called. ``chat_template`` is a template of the model by name, or Jinja text.
    ``folds_system``: system messages where the template refuses them are joined to what it takes.
    """

    chat_template: str | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    reasoning_effort: str | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    shown_tools: Sequence[Mapping[str, Any]] | None = None
    folds_system: bool = False

    def variables(self) -> dict[str, Any]:
        """All that the request itself gives the template."""
        found = dict(self.kwargs)
        if self.documents is not None:
            found["documents"] = self.documents
        if self.reasoning_effort is not None:
            found.setdefault("reasoning_effort", self.reasoning_effort)
            found.setdefault("enable_thinking", self.reasoning_effort != "none")
        return found


@dataclass(frozen=True)
class Truncation:
    """vLLM's ``truncate_prompt_tokens`` (-1: what fits beside the output) and ``truncation_side``."""

    limit: int
    side: Literal["left", "right"] = "left"

    def cut(self, token_ids: list[int], max_tokens: int | None, max_model_len: int) -> list[int]:
        """The tokens that stay. Raises RequestError for a limit that no prompt may have."""
        limit = max(1, max_model_len - (max_tokens or 1)) if self.limit == -1 else self.limit
        if limit > max_model_len:
            raise RequestError(
                f"truncate_prompt_tokens value ({limit}) is greater than max_model_len ({max_model_len}). "
                "Please request a smaller truncation size.",
                param="truncate_prompt_tokens",
            )
        return token_ids[:limit] if self.side == "right" else token_ids[max(0, len(token_ids) - limit) :]


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What all requests may ask for. ``source`` is what ``explain`` calls the origin of their values.

    ``notes`` are lines for ``explain``: what was left out of the request, or read otherwise than it says. ``tools`` and
    ``tool_choice`` have OpenAI's forms; a demanded call constrains the output of a raw prompt too.
    """

    sampling: SamplingParams
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool = True
    structured_outputs: StructuredOutput | Mapping[str, Any] | None = None
    response_format: Mapping[str, Any] | None = None
    thinking_token_budget: int | None = None
    repetition_detection: RepetitionDetection | Mapping[str, Any] | None = None
    truncation: Truncation | None = None
    source: str = "request"
    notes: Sequence[str] = ()

    def constraints(self) -> Constraints | None:
        """What constrains the output, beside what ``sampling`` says. Raises RequestError."""
        return Constraints.from_request(
            structured_outputs=self.structured_outputs,
            response_format=self.response_format,
            tools=self.tools or None,
            tool_choice=self.tool_choice,
            parallel_tool_calls=self.parallel_tool_calls,
            thinking_token_budget=self.thinking_token_budget,
            repetition_detection=self.repetition_detection,
        )

    def all_notes(self, constraints: Constraints | None) -> tuple[str, ...]:
        """``notes``, and what ``constraints`` leave out of the request."""
        structured = None if constraints is None else constraints.structured
        given = self.response_format is not None and self.response_format.get("type") != "text"
        if structured is None or structured.tool_calls is None or not given:
            return tuple(self.notes)
        return (*self.notes, "response_format: left out, since tool_choice demands a call")


@dataclass(frozen=True, kw_only=True)
class ChatRequest(_Request):
    """A conversation to reply to; ``messages`` have OpenAI's form."""

    messages: Sequence[Message]
    template: TemplateOptions = TemplateOptions()


@dataclass(frozen=True, kw_only=True)
class PromptRequest(_Request):
    """A raw prompt to continue: text or token ids. Its output is not parsed."""

    prompt: str | Sequence[int]
    add_special_tokens: bool = True


@dataclass(frozen=True)
class Account:
    """What ``explain`` shows of a request beside its values; known before it is submitted.

    ``template`` is what the chat template was given, the lower layer first; None where none was rendered.
    ``make_parser`` makes the parser of one completion, None: all output is the answer. ``notes`` are the request's.
    """

    source: str = "request"
    template: tuple[Layer, ...] | None = None
    make_parser: MakeParser | None = None
    notes: tuple[str, ...] = ()

    def new_parser(self) -> OutputParser | None:
        """A parser for one completion; None where all output is the answer."""
        return None if self.make_parser is None else self.make_parser()


@dataclass(frozen=True)
class PreparedRequest:
    """A request that the engine can take. ``prompt`` is the text of ``token_ids``, None where it is not known.

    ``scored_from``: the first prompt token that ``prompt_logprobs`` are wanted of. ``remembered``: for ``explain``.
    """

    prompt: str | None
    token_ids: list[int]
    params: SamplingParams
    constraints: Constraints | None = None
    account: Account = Account()
    scored_from: int = 1
    remembered: bool = True

    def new_parser(self) -> OutputParser | None:
        """A parser for one completion; None where all output is the answer."""
        return self.account.new_parser()


class ChatPreparer:
    """Makes prompts, parsers and constraints for one model. Runs in the caller's thread; thread-safe.

    ``settings`` are the live ones.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, parsers: ParserChoice, settings: Settings) -> None:
        self.template = template
        self.parsers = parsers
        self._tokenizer = tokenizer
        self._settings = settings

    @property
    def takes_tools(self) -> bool:
        """Whether tools can be used: the chat template shows them, and a parser reads the model's calls."""
        return self.template.takes_tools and self.parsers.tool_call_parser is not None

    def prepare(self, request: ChatRequest | PromptRequest, max_model_len: int) -> PreparedRequest:
        """Render, tokenize, truncate; choose the parser; check the constraints. Raises RequestError."""
        constraints = request.sampling.constraints(request.constraints())
        if constraints is not None and isinstance(request, ChatRequest):
            constraints = constraints.with_possible_calls(
                request.tools, request.tool_choice, parallel=request.parallel_tool_calls
            )
        if isinstance(request, PromptRequest):
            text, whole = self._prompt(request, max_model_len)
            account = Account(request.source, notes=request.all_notes(constraints))
        else:
            text, whole, account = self._chat(request, constraints, max_model_len)
        params, token_ids = request.sampling, whole
        parser = account.new_parser()
        if parser is not None and parser.needs_special_tokens:
            params = params.with_special_tokens()
        if request.truncation is not None:
            token_ids = request.truncation.cut(whole, params.max_tokens, max_model_len)
        known = text if len(token_ids) == len(whole) else None
        return PreparedRequest(known, token_ids, params, constraints, account)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: TemplateOptions = TemplateOptions(),
    ) -> str:
        """The prompt's text. Raises RequestError, also for what the template refuses."""
        return self._render(messages, tools, options)[0]

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        options: TemplateOptions,
        source: str = "request",
    ) -> tuple[str, list[Layer], list[str]]:
        """The prompt's text, what the template was given, and notes for ``explain``."""
        shown = tools if options.shown_tools is None else options.shown_tools
        template = self.template.chosen(options.chat_template, with_tools=bool(shown))
        layers = self._layers(template, options, source)  # once: live settings may change meanwhile
        given: dict[str, Any] = {}
        for _, values in layers[1:]:  # the template has its defaults
            given |= values
        known, notes = [_known_role(message) for message in messages], []
        if options.folds_system:
            known, moved = fold_system_messages(known, template.system_place(with_tools=bool(shown)))
            notes = [_FOLDED] if moved else []
        text = template.render(
            known,
            tools=[_ordered(tool) for tool in shown] if shown else None,
            add_generation_prompt=options.add_generation_prompt,
            continue_final_message=options.continue_final_message,
            **given,
        )
        return text, layers, notes

    def _chat(
        self, request: ChatRequest, constraints: Constraints | None, max_model_len: int
    ) -> tuple[str, list[int], Account]:
        options = request.template
        text, layers, notes = self._render(request.messages, request.tools, options, request.source)
        make_parser = functools.partial(
            self.parsers.make,
            tools=request.tools or None,
            tool_choice=request.tool_choice,
            prompt=text,
            parallel_tool_calls=request.parallel_tool_calls,
            calls_in_thoughts=constraints is None or constraints.structured is None or constraints.calls is not None,
        )
        token_ids = self._encode(text, options.add_special_tokens, request, max_model_len)
        told = (*request.all_notes(constraints), *notes)
        return text, token_ids, Account(request.source, tuple(layers), make_parser, told)

    def _prompt(self, request: PromptRequest, max_model_len: int) -> tuple[str | None, list[int]]:
        if isinstance(text := request.prompt, str):
            return text, self._encode(text, request.add_special_tokens, request, max_model_len)
        return None, [int(token_id) for token_id in request.prompt]

    def _encode(self, text: str, add_special_tokens: bool, request: _Request, max_model_len: int) -> list[int]:
        """The tokens of ``text``; one far too long is refused before, unless it is to be cut."""
        if request.truncation is None:
            params = request.sampling
            asked = None if params.sources.get("max_tokens") in MODEL_SOURCES else params.max_tokens
            self._tokenizer.check_text(text, asked, max_model_len)
        return self._tokenizer.encode(text, add_special_tokens)

    def _layers(self, template: ChatTemplate, options: TemplateOptions, source: str) -> list[Layer]:
        """What the template gets: its defaults, then the live settings' switch, then the request's own."""
        return [
            ("--default-chat-template-kwargs", template.default_kwargs),
            ("set", self._settings.template_kwargs(template.variables)),
            (source, options.variables()),
        ]


def _ordered(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """``tool`` with its names in OpenAI's order, as vLLM shows it: most templates print a tool as it is."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping):
        return tool
    first = [name for name in ("name", "description", "parameters") if name in function]
    ordered = {name: function[name] for name in [*first, *(name for name in function if name not in first)]}
    return {"type": "function", **tool, "function": ordered}


def _known_role(message: Message) -> Message:
    """``developer`` is OpenAI's newer word for ``system``; most templates know only the older one."""
    if isinstance(message, Mapping) and message.get("role") == "developer":
        return {**message, "role": "system"}
    return message
