"""The explainer of a loaded model: its tokenizer, its parsers and its cache put together."""

from collections.abc import Callable, Mapping
from typing import Any

from engine.chat.parse_output import collect_reply
from engine.explain.explainer import Explainer, Parsed
from engine.explain.request_log import RequestLog, RequestRecord
from engine.text.parse.output_parser import OutputParser
from engine.text.tokens.tokenizer import Tokenizer


def make_explainer(
    log: RequestLog,
    tokenizer: Tokenizer,
    output_parser: Callable[..., OutputParser],
    *,
    eos_token_ids: frozenset[int],
    block_size: int,
    caching_wanted: bool,
    reuses_prefixes: bool,
    recurrent: bool,
    default_kwargs: Mapping[str, Any],
) -> Explainer:
    """``output_parser`` makes the door's parser anew; ``caching_wanted`` is the flag, ``reuses_prefixes`` what is.

    ``recurrent`` and ``default_kwargs`` as in :class:`Explainer`.
    """
    why = "prefix caching is off (--no-enable-prefix-caching)"
    if caching_wanted and not reuses_prefixes:
        why = "this model runs on mlx-lm's contiguous caches, which keep nothing between requests"

    def parse(record: RequestRecord, text: str) -> Parsed:
        if record.parsing is None:  # where the door does not parse, all is content
            return Parsed(text)
        reply = collect_reply(output_parser(**record.parsing), [text], None)
        return Parsed(reply.text, reply.reasoning, [call["function"] for call in reply.tool_calls])

    return Explainer(
        log=log,
        decode=lambda token_ids: tokenizer.decode(token_ids, skip_special_tokens=False),
        token_text=tokenizer.token_text,
        parse=parse,
        eos_token_ids=eos_token_ids,
        block_size=block_size,
        no_caching="" if reuses_prefixes else why,
        recurrent=recurrent,
        default_kwargs=default_kwargs,
    )
