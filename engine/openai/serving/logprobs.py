"""Log-probabilities in the shapes of the two APIs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.outputs import Logprob, LogprobsAtPosition

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON lacks (vLLM's number)."""
TokenText = Callable[[int], str]


@dataclass(frozen=True)
class TokenNames:
    """How tokens are written: as text, or as ``token_id:N`` where a client asks for it."""

    token_text: TokenText
    as_token_ids: bool = False

    def of(self, token_id: int, logprob: Logprob | None = None) -> str:
        """The token's name."""
        if self.as_token_ids:
            return f"token_id:{token_id}"
        if logprob is not None and logprob.decoded_token is not None:
            return logprob.decoded_token
        return self.token_text(token_id)


def chat_logprobs(
    token_ids: Sequence[int], positions: Sequence[LogprobsAtPosition], num_top: int, names: TokenNames
) -> dict[str, Any]:
    """The chat API's ``logprobs``: one entry per token with its ``num_top`` most likely ones (-1: all)."""
    return {
        "content": [
            {
                **_chat_entry(token_id, at[token_id], names),
                "top_logprobs": [_chat_entry(other, logprob, names) for other, logprob in _top(at, num_top)],
            }
            for token_id, at in zip(token_ids, positions, strict=True)
        ],
        "refusal": None,
    }


def completion_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[LogprobsAtPosition | None],
    num_top: int,
    names: TokenNames,
    *,
    text_offset: int = 0,
) -> dict[str, Any]:
    """The completion API's ``logprobs``: parallel lists. A position without values (a prompt's first) is null."""
    tokens: list[str] = []
    offsets: list[int] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    for token_id, at in zip(token_ids, positions, strict=True):
        sampled = at[token_id] if at else None
        tokens.append(names.of(token_id, sampled))
        offsets.append(text_offset)
        text_offset += len(tokens[-1])
        token_logprobs.append(_finite(sampled.logprob) if sampled else None)
        top_logprobs.append(_by_name(token_id, at, num_top, names) if at else None)
    return {
        "text_offset": offsets,
        "token_logprobs": token_logprobs,
        "tokens": tokens,
        "top_logprobs": top_logprobs,
    }


def prompt_logprobs(positions: Sequence[LogprobsAtPosition | None] | None) -> list[dict[str, Any] | None] | None:
    """vLLM's ``prompt_logprobs``: token id -> logprob, rank and text, at each position."""
    if positions is None:
        return None
    return [
        {
            str(token_id): {
                "logprob": _finite(logprob.logprob),
                "rank": logprob.rank,
                "decoded_token": logprob.decoded_token,
            }
            for token_id, logprob in at.items()
        }
        if at
        else None
        for at in positions
    ]


def _chat_entry(token_id: int, logprob: Logprob, names: TokenNames) -> dict[str, Any]:
    token = names.of(token_id, logprob)
    return {"token": token, "logprob": _finite(logprob.logprob), "bytes": list(token.encode())}


def _by_name(token_id: int, at: LogprobsAtPosition, num_top: int, names: TokenNames) -> dict[str, float]:
    chosen = {**dict(_top(at, num_top)), token_id: at[token_id]}
    return {names.of(other, logprob): _finite(logprob.logprob) for other, logprob in chosen.items()}


def _top(at: LogprobsAtPosition, num_top: int) -> list[tuple[int, Logprob]]:
    ordered = sorted(at.items(), key=lambda item: -item[1].logprob)
    return ordered if num_top < 0 else ordered[:num_top]


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
