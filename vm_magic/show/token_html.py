"""Tokens coloured by how likely they were, as HTML that needs neither scripts nor style sheets, and as text.

Colours are half transparent, so that they read on light and on dark pages; styles are those that JupyterLab keeps
in a notebook that it does not trust. Every text is escaped: it comes from a model.
"""

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engine.outputs import Logprob
from engine.text.tokens.whole_characters import REPLACEMENT

PRE_STYLE = (
    "white-space:pre-wrap;overflow-wrap:break-word;margin:2px 0;padding:2px 0;line-height:1.7;font-size:13px;"
    "background:transparent;word-break:normal"
)
_STEPS = ((0.9, ""), (0.5, "#fb8c0026"), (0.2, "#fb8c0059"), (0.05, "#f4511e80"), (0.0, "#d81b6099"))
"""Least probability and colour: pale where the token was expected, strong where it surprised."""
PART = "(part of a character)"
SLIVER = "padding:0 2px"
"""Makes a token seen that has no text of its own."""
_UNLIKELY_SHOWN = 10
_MOST_ALTERNATIVES = 21
"""The 20 that a request may ask for, and the token itself; the whole vocabulary is no tooltip."""


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
    """One position; ``text`` is the chosen token's where it is another than by itself."""
    ranked = sorted(all_of_them, key=lambda one: -one.logprob)[:_MOST_ALTERNATIVES]
    return ScoredToken(
        (chosen.decoded_token or "") if text is None else text,
        chosen.logprob,
        chosen.rank,
        tuple((one.decoded_token or "", one.logprob) for one in ranked),
    )


def tokens_html(tokens: Sequence[ScoredToken]) -> str:
    """A ``<pre>`` of coloured spans, in one line; hovering shows probability, rank and alternatives."""
    return f'<pre style="{PRE_STYLE}">{"".join(map(_span, tokens))}</pre>'


def legend_html() -> str:
    """What the colours mean."""
    names = ("over 90%", "50–90%", "20–50%", "5–20%", "under 5%")
    swatches = "".join(
        f'<span style="background-color:{colour or "transparent"};padding:0 6px;margin:0 6px 0 0;border-radius:3px;'
        f'border:1px solid #80808059">{name}</span>'
        for (_, colour), name in zip(_STEPS, names, strict=True)
    )
    return f'<div style="font-size:11px;margin:4px 0"><span style="opacity:0.7">probability </span>{swatches}</div>'


def unlikely_html(tokens: Sequence[ScoredToken]) -> str:
    """The least likely tokens and what was likelier, folded away: hovering is not possible everywhere."""
    rows = "".join(
        "<tr>" + "".join(f'<td style="text-align:left;padding:1px 12px 1px 0">{escaped(cell)}</td>' for cell in row)
        + "</tr>"
        for row in _unlikely_rows(tokens)
    )  # fmt: skip
    if not rows:
        return ""
    head = "".join(
        f'<th style="text-align:left;padding:1px 12px 1px 0">{name}</th>'
        for name in ("place", "token", "probability", "likelier")
    )
    return (
        '<details style="font-size:12px"><summary style="cursor:pointer">least likely tokens</summary>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></details>"
    )


def unlikely_text(tokens: Sequence[ScoredToken]) -> str:
    """The least likely tokens as a table of text; empty if there are none."""
    rows = [("place", "token", "probability", "likelier"), *_unlikely_rows(tokens)]
    if len(rows) == 1:
        return ""
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(["least likely tokens", *(f"  {line}" for line in lines)])


def escaped(text: str) -> str:
    """``text`` for a page or an attribute, in one line, and without marks that Markdown or MathJax would read."""
    result = html.escape(text, quote=True)
    for mark in "$`*_[]\\|~\n":
        result = result.replace(mark, f"&#{ord(mark)};")
    return result


def percent(logprob: float) -> str:
    """A probability with as many digits as it needs."""
    share = math.exp(logprob) * 100
    return f"{share:.0f}%" if share >= 99.5 else f"{share:.1f}%" if share >= 0.1 else f"{share:.1g}%"


def _span(token: ScoredToken) -> str:
    probability = token.probability
    colour = "" if probability is None else next(colour for least, colour in _STEPS if probability >= least)
    styles = [f"background-color:{colour};border-radius:3px"] if colour else []
    styles += [] if token.text else [SLIVER]
    style = f' style="{";".join(styles)}"' if styles else ""
    return f'<span{style} title="{escaped(_hover(token))}">{escaped(_visible(token.text))}</span>'


def _visible(text: str) -> str:
    """A line end also as a mark, so that its colour is seen."""
    return text.replace("\n", "⏎\n")


def token_name(text: str) -> str:
    """A token's text in quotes, as far as it is one."""
    return PART if not text or REPLACEMENT in text else repr(text)


def _hover(token: ScoredToken) -> str:
    if token.logprob is None:
        return "nothing came before this token"
    lines = [PART] if not token.text else []
    lines += [f"{percent(token.logprob)}  (log {token.logprob:.3f}, rank {token.rank})"]
    return "\n".join([*lines, *(f"{percent(value):>6}  {token_name(text)}" for text, value in token.alternatives)])


def _unlikely_rows(tokens: Sequence[ScoredToken]) -> list[tuple[str, str, str, str]]:
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
