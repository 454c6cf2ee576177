"""``…/render``: what a request would send to the engine, without running it."""

import asyncio
import uuid
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from engine.chat.request import PreparedRequest
from engine.openai.http.json_body import JSONRoute
from engine.openai.routes.completions import completion_prompts
from engine.openai.schema.protocol import ChatCompletionRequest, CompletionRequest, GenerationFields
from engine.openai.schema.validation import check_generation
from engine.openai.serving.chat_preparation import prepare_chat
from engine.openai.serving.generation import port_of
from engine.params.sampling_params import names_of

router = APIRouter(tags=["OpenAI"], route_class=JSONRoute)
_SHOWN = names_of(lambda known: not known.constraint)
"""The port keeps what constrains a request apart from its sampling values."""


@router.post("/v1/chat/completions/render", response_model=None)
async def render_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
    """A chat's tokens and the sampling values that apply (vLLM's GenerateRequest)."""
    prepared = await prepare_chat(port_of(request), body, [body.messages])
    shown = _generate_request(request, body, prepared[0], "chatcmpl")
    if body.return_prompt_text:
        shown["prompt_text"] = prepared[0].prompt
    return JSONResponse(shown)


@router.post("/v1/completions/render", response_model=None)
async def render_completion(body: CompletionRequest, request: Request) -> Response:
    """The same for each prompt of a completion."""
    port = port_of(request)
    port.check_model(body.model)
    check_generation(body)
    prompts = await asyncio.to_thread(completion_prompts, port.engine, body)
    return JSONResponse([_generate_request(request, body, prompt, "cmpl") for prompt in prompts])


def _generate_request(request: Request, body: GenerationFields, prompt: PreparedRequest, prefix: str) -> dict[str, Any]:
    engine, params = port_of(request).engine, prompt.params
    # Without a limit the engine goes to the end of the context; here that is said in tokens.
    room = max(1, engine.plan.max_model_len - len(prompt.token_ids))
    values = {name: getattr(params, name) for name in _SHOWN}
    values["logit_bias"] = {str(token): value for token, value in params.logit_bias.items()}
    return {
        "request_id": f"{prefix}-{uuid.uuid4().hex}",
        "token_ids": prompt.token_ids,
        "features": None,
        "sampling_params": {**values, "max_tokens": params.max_tokens or room},
        "model": engine.args.names[0],
        "stream": body.stream,
        "stream_options": body.stream_options.model_dump() if body.stream_options else None,
        "cache_salt": body.cache_salt,
        "priority": body.priority,
    }
