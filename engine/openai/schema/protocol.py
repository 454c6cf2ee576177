"""Request bodies. Names are OpenAI's and vLLM's; a field sent as null counts as not sent."""

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, GetCoreSchemaHandler, create_model, model_validator
from pydantic_core import CoreSchema
from pydantic_core.core_schema import DictSchema

from engine.params.sampling_params import COMMON, PARAMETERS, names_of

TokenId = Annotated[int, Field(ge=0)]
JsonObject = dict[str, Any]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
KEEPS_THOUGHTS = {"preserve_thinking": True, "clear_thinking": False, "truncate_history_thinking": False}
"""What templates call it when the thoughts of earlier turns stay in the prompt."""

SAMPLING_FIELDS = names_of(lambda known: known.wire != "own")
"""Fields that go to ``SamplingParams`` under the same name."""


_FAIL_FAST = {"list"} | ({"dict"} if "fail_fast" in DictSchema.__annotations__ else set())


def _fail_fast(schema: Any) -> None:
    if isinstance(schema, dict):
        kind = schema.get("type")
        if isinstance(kind, str) and kind in _FAIL_FAST:
            schema["fail_fast"] = True
        for inner in schema.values():
            _fail_fast(inner)
    elif isinstance(schema, list | tuple):
        for inner in schema:
            _fail_fast(inner)


class RequestBody(BaseModel):
    """Base of all bodies: unknown fields are kept for the log, nulls dropped."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Of a list only the first wrong item is told: errors for a million cost a hundred times their body."""
        schema = handler(source)
        _fail_fast(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class StreamOptions(RequestBody):
    """What a stream reports besides its text."""

    include_usage: bool = True
    continuous_usage_stats: bool = False


class TemplateFields(RequestBody):
    """How messages become a prompt."""

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template: str | None = None
    chat_template_kwargs: JsonObject = Field(default_factory=dict)
    documents: list[JsonObject] | None = None
    reasoning_effort: Effort | None = None
    tools: list[JsonObject] = Field(default_factory=list)


def _with_sampling_values(body: type[RequestBody]) -> type[RequestBody]:
    """``body`` with the fields that go to ``SamplingParams`` as they are, made from what is known of each."""
    values = sorted(names_of(lambda known: known.wire == "all"), key=lambda name: name not in COMMON)
    types: dict[str, Any] = {name: (PARAMETERS[name].kind.type | None, None) for name in values}
    return create_model(body.__name__, __base__=body, __module__=body.__module__, __doc__=body.__doc__, **types)


@_with_sampling_values
class SamplingValues(RequestBody):
    """What every generating route takes under the name that ``SamplingParams`` has for it."""

    model: str | None = None
    stream: bool = False
    user: str | None = None


class SamplingFields(SamplingValues):
    """What every generating route takes, under vLLM's names."""

    logit_bias: dict[str, float] | None = None
    structured_outputs: JsonObject | None = None
    repetition_detection: JsonObject | None = Field(
        None,
        description="max_pattern_size, min_pattern_size and min_count. A reply that repeats itself ends with "
        "finish_reason `repetition`; inside a thought only the thought is ended (the choice's `thinking_cut` says so), "
        "and the answer follows.",
    )
    thinking_token_budget: int | None = Field(
        None, validation_alias=AliasChoices("thinking_token_budget", "thinking_budget", "reasoning_max_tokens")
    )

    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] = "left"
    priority: int = 0
    request_id: str | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None


class GenerationFields(SamplingFields):
    """What chat and plain completions share."""

    stream_options: StreamOptions | None = None
    n: int = 1
    response_format: JsonObject | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False


class ReplyFields(RequestBody):
    """How a chat's reply is split into reasoning, text and tool calls."""

    parallel_tool_calls: bool = True
    include_reasoning: bool = True


class ChatFields(GenerationFields, TemplateFields, ReplyFields):
    """A chat without its messages."""

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tool_choice: str | JsonObject | None = None
    return_prompt_text: bool = False
    echo: bool = False


class ChatCompletionRequest(ChatFields):
    """``POST /v1/chat/completions``."""

    messages: list[JsonObject]


class BatchChatCompletionRequest(ChatFields):
    """``POST /v1/chat/completions/batch``: one choice per conversation."""

    messages: Annotated[list[list[JsonObject]], Field(min_length=1)]


class CompletionRequest(GenerationFields):
    """``POST /v1/completions``. ``prompt`` is a string, token ids, or a list of either."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    max_tokens: int | None = None
    echo: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True


class TokenizeRequest(TemplateFields):
    """``POST /tokenize``: a ``prompt`` (special tokens are added) or ``messages`` (they are not)."""

    model: str | None = None
    prompt: str | None = None
    messages: list[JsonObject] | None = None
    return_token_strs: bool = False


class DetokenizeRequest(RequestBody):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: list[TokenId]
