"""``/tokenize``, ``/detokenize`` and, where the user wants it, ``/tokenizer_info``."""

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request

from engine.errors import RequestError
from engine.openai.schema.protocol import DetokenizeRequest, TokenizeRequest
from engine.openai.schema.validation import check_extra_fields
from engine.openai.serving.backend import ServedEngine
from engine.openai.serving.chat_preparation import template_options
from engine.openai.serving.generation import port_of
from engine.text.tokens.tokenizer import Tokenizer

router = APIRouter(tags=["tokens"])
info_router = APIRouter(tags=["tokens"])
_FILES = ("vocab_file", "merges_file", "tokenizer_file", "special_tokens_map_file", "name_or_path")
"""What a configuration says about the machine that it was written on."""


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """Token ids of a prompt or of a rendered chat."""
    port = port_of(request)
    port.check_model(body.model)
    check_extra_fields(body)
    port.check_template(body.chat_template, body.chat_template_kwargs)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("Give either `prompt` or `messages`.", param="prompt")
    token_ids = await asyncio.to_thread(_token_ids, port.engine, body)
    hf = port.engine.tokenizer.hf
    return {
        "count": len(token_ids),
        "max_model_len": port.engine.plan.max_model_len,
        "tokens": token_ids,
        "token_strs": [hf.id_to_token(token_id) for token_id in token_ids] if body.return_token_strs else None,
    }


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
    tokenizer = port.engine.tokenizer
    unknown = next((token_id for token_id in body.tokens if not _is_known(tokenizer, token_id)), None)
    if unknown is not None:
        raise RequestError(f"Token id {unknown} is out of vocabulary.", param="tokens")
    return {"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)}


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
