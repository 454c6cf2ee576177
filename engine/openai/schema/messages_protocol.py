"""Anthropic's Messages API: the fields of its requests."""

from typing import Annotated

from pydantic import Field

from engine.openai.schema.protocol import Effort, JsonObject, ReplyFields, RequestBody, SamplingFields, TemplateFields


class ThinkingOptions(RequestBody):
    """Whether to think, and for how many tokens at most."""

    type: str
    budget_tokens: Annotated[int, Field(ge=0)] | None = None


class OutputOptions(RequestBody):
    """The form of the answer, and how much to think."""

    effort: Effort | None = None
    format: JsonObject | None = None


class CountTokensRequest(TemplateFields):
    """``POST /v1/messages/count_tokens``."""

    model: str | None = None
    messages: list[JsonObject]
    system: str | list[JsonObject] | None = None
    tool_choice: JsonObject | None = None
    thinking: ThinkingOptions | None = None
    output_config: OutputOptions = Field(default_factory=OutputOptions)
    output_format: JsonObject | None = Field(None, description="The older name of `output_config.format`.")


class MessagesRequest(CountTokensRequest, SamplingFields, ReplyFields):
    """``POST /v1/messages``: Anthropic's fields, vLLM's sampling fields and the chat template's."""

    max_tokens: int
    stop_sequences: list[str] = Field(default_factory=list)
    metadata: JsonObject = Field(default_factory=dict)
    service_tier: str | None = None
