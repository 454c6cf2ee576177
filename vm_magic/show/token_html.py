"""Tokens coloured by how likely they were, as HTML that needs neither scripts nor style sheets.

Colours are half transparent, so that they read on light and on dark pages; styles are those that JupyterLab keeps
in a notebook that it does not trust. Every text is escaped: it comes from a model.
"""

import html
from collections.abc import Sequence

from engine.batch.score import Score
from engine.batch.scored_token import PART, UNLIKELY_HEADER, ScoredToken, percent, token_name, unlikely_rows
from vm_magic.show.tables import row_html, table_html

PRE_STYLE = (
    "white-space:pre-wrap;overflow-wrap:break-word;margin:2px 0;padding:2px 0;line-height:1.7;font-size:13px;"
    "background:transparent;word-break:normal"
)
_STEPS = ((0.9, ""), (0.5, "#fb8c0026"), (0.2, "#fb8c0059"), (0.05, "#f4511e80"), (0.0, "#d81b6099"))
"""Least probability and colour: pale where the token was expected, strong where it surprised."""
_CELL = "text-align:left;padding:1px 12px 1px 0"
SLIVER = "padding:0 2px"
"""Makes a token without text of its own visible."""


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
    rows = [row_html(map(escaped, row), _CELL) for row in unlikely_rows(tokens)]
    if not rows:
        return ""
    table = table_html(rows, row_html(UNLIKELY_HEADER, _CELL, tag="th"))
    return (
        '<details style="font-size:12px"><summary style="cursor:pointer">least likely tokens</summary>'
        f"{table}</details>"
    )


def escaped(text: str) -> str:
    """``text`` for a page or an attribute, in one line, and without marks that Markdown or MathJax would read."""
    result = html.escape(text, quote=True)
    for mark in "$`*_[]\\|~\n":
        result = result.replace(mark, f"&#{ord(mark)};")
    return result


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


def _hover(token: ScoredToken) -> str:
    if token.logprob is None:
        return "nothing came before this token"
    lines = [PART] if not token.text else []
    lines += [f"{percent(token.logprob)}  (log {token.logprob:.3f}, rank {token.rank})"]
    return "\n".join([*lines, *(f"{percent(value):>6}  {token_name(text)}" for text, value in token.alternatives)])


def score_html(score: Score) -> str:
    """A scored text: its figures, its tokens coloured, the least likely ones as a table."""
    body = tokens_html(score.scored) + unlikely_html(score.scored)
    return f"<div><b>{score.headline}</b>{legend_html()}{body}</div>"
