"""``/tokenize``, ``/detokenize`` and, where the user wants it, ``/tokenizer_info``."""

import asyncio
import json
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import APIRouter, Request, Response

from engine.errors import RequestError
from engine.openai.http.json_body import JSONRoute
from engine.openai.schema.protocol import DetokenizeRequest, TokenizeRequest
from engine.openai.schema.validation import check_extra_fields
from engine.openai.serving.backend import ServedEngine
from engine.openai.serving.chat_preparation import template_options
from engine.openai.serving.generation import port_of
from engine.text.tokens.tokenizer import Tokenizer

router = APIRouter(tags=["tokens"], route_class=JSONRoute)
info_router = APIRouter(tags=["tokens"], route_class=JSONRoute)
_PIECE = 1 << 14
"""Values of a list that become JSON at once."""
_FILES = ("vocab_file", "merges_file", "tokenizer_file", "special_tokens_map_file", "name_or_path")
"""What a configuration says about the machine that it was written on."""


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """Token ids of a prompt or of a rendered chat."""
    port = port_of(request)
    port.check_model(body.model)
    check_extra_fields(body)
    port.check_template(body.chat_template, body.chat_template_kwargs)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("Give either `prompt` or `messages`.", param="prompt")
    return await asyncio.to_thread(_tokenized, port.engine, body)


def _tokenized(engine: ServedEngine, body: TokenizeRequest) -> Response:
    """The whole answer, made in a thread: of a long text its JSON alone would hold up other clients."""
    token_ids, hf = _token_ids(engine, body), engine.tokenizer.hf
    texts = [hf.id_to_token(token_id) for token_id in token_ids] if body.return_token_strs else None
    begin = {"count": len(token_ids), "max_model_len": engine.plan.max_model_len}
    parts = [json.dumps(begin)[:-1], ', "tokens": ', *_listed(token_ids), ', "token_strs": ', *_listed(texts), "}"]
    return Response("".join(parts), media_type="application/json")


def _listed(values: list[Any] | None) -> Iterator[str]:
    """JSON of a list piece by piece: ``json`` holds Python's lock until it is through."""
    if values is None:
        yield "null"
        return
    yield "["
    for start in range(0, len(values), _PIECE):
        yield ("," if start else "") + json.dumps(values[start : start + _PIECE])[1:-1]
    yield "]"


def _token_ids(engine: ServedEngine, body: TokenizeRequest) -> list[int]:
    if body.messages is None:
        special = body.add_special_tokens if "add_special_tokens" in body.model_fields_set else True
        return engine.tokenizer.encode(body.prompt or "", special)
    text = engine.preparer.render(body.messages, body.tools, template_options(body))
    return engine.tokenizer.encode(text, body.add_special_tokens)


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, str]:
    """Text of token ids, special tokens included."""
    port = port_of(request)
    port.check_model(body.model)
    check_extra_fields(body)
    return {"prompt": await asyncio.to_thread(_detokenized, port.engine.tokenizer, body.tokens)}


def _detokenized(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    unknown = next((token_id for token_id in token_ids if not _is_known(tokenizer, token_id)), None)
    if unknown is not None:
        raise RequestError(f"Token id {unknown} is out of vocabulary.", param="tokens")
    return tokenizer.decode(token_ids, skip_special_tokens=False)


def _is_known(tokenizer: Tokenizer, token_id: int) -> bool:
    # The tokenizer takes 32 bits; a larger number is not a token either.
    return token_id < 2**32 and tokenizer.hf.id_to_token(token_id) is not None


@info_router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> dict[str, Any]:
    """The tokenizer's configuration as its files say it, tokens as texts; the chat template in use (vLLM's form)."""
    engine = port_of(request).engine
    config = {name: _as_text(value) for name, value in engine.tokenizer.config.items() if name not in _FILES}
    names: dict[str, Any] = dict.fromkeys(("bos_token", "eos_token", "pad_token"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    return names | kind | config | {"chat_template": engine.preparer.template.source}


def _as_text(value: Any) -> Any:
    if isinstance(value, Mapping):
        content = value.get("content")
        return content if isinstance(content, str) else {name: _as_text(inner) for name, inner in value.items()}
    return [_as_text(inner) for inner in value] if isinstance(value, list) else value
