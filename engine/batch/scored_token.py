"""A token and how likely it was, as text. Pictures are the notebook's (``vm_magic.show.token_html``)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.format.text import REPLACEMENT, aligned
from engine.outputs import Logprob

PART = "(part of a character)"
UNLIKELY_HEADER = ("place", "token", "probability", "likelier")
_UNLIKELY_SHOWN = 10
_MOST_ALTERNATIVES = 21
"""The 20 that a request may ask for, and the token itself; the whole vocabulary is too much for a tooltip."""


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token's text and log-probability (None: nothing came before it), and the likeliest tokens at its place.

    The text is empty where a character goes on in the tokens that follow; it is theirs.
    """

    text: str
    logprob: float | None
    rank: int | None = None
    alternatives: tuple[tuple[str, float], ...] = ()

    @property
    def probability(self) -> float | None:
        """Between 0 and 1."""
        return None if self.logprob is None else math.exp(self.logprob)


def scored_token(chosen: Logprob, all_of_them: Iterable[Logprob], text: str | None = None) -> ScoredToken:
    """One position; ``text`` is the chosen token's, where it differs from the token's own."""
    ranked = sorted(all_of_them, key=lambda one: -one.logprob)[:_MOST_ALTERNATIVES]
    return ScoredToken(
        (chosen.decoded_token or "") if text is None else text,
        chosen.logprob,
        chosen.rank,
        tuple((one.decoded_token or "", one.logprob) for one in ranked),
    )


def unlikely_text(tokens: Sequence[ScoredToken]) -> str:
    """The least likely tokens as a table of text; empty if there are none."""
    rows = [UNLIKELY_HEADER, *unlikely_rows(tokens)]
    if len(rows) == 1:
        return ""
    return "\n".join(["least likely tokens", *(f"  {line}" for line in aligned(rows))])


def percent(logprob: float) -> str:
    """A probability with as many digits as it needs."""
    share = math.exp(logprob) * 100
    return f"{share:.0f}%" if share >= 99.5 else f"{share:.1f}%" if share >= 0.1 else f"{share:.1g}%"


def token_name(text: str) -> str:
    """A token's text in quotes; a part of a character is named as such."""
    return PART if not text or REPLACEMENT in text else repr(text)


def unlikely_rows(tokens: Sequence[ScoredToken]) -> list[tuple[str, str, str, str]]:
    """The tokens that were not the likeliest, the most surprising first."""
    places = [i for i, token in enumerate(tokens) if token.logprob is not None and token.rank != 1]
    places.sort(key=lambda i: tokens[i].logprob or 0.0)
    rows = []
    for i in places[:_UNLIKELY_SHOWN]:
        token = tokens[i]
        assert token.logprob is not None
        likelier = [
            f"{token_name(text)} {percent(value)}" for text, value in token.alternatives if value > token.logprob
        ][:3]
        rows.append((str(i), token_name(token.text), percent(token.logprob), ", ".join(likelier)))
    return rows
