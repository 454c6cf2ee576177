"""``%vllm_metal explain``: one request, as text and as HTML."""

import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.explain.explainer import Explanation, Output, SamplingValue
from engine.format.text import aligned, shortened
from engine.outputs import THINKING_CUTS
from vm_magic.show.cards import CARD_STYLE
from vm_magic.show.explain_picture import prompt_html, time_bar_html, time_bar_text
from vm_magic.show.speed_view import speed_html, speed_lines
from vm_magic.show.tables import row_html, table_html
from vm_magic.show.token_html import escaped
from vm_magic.show.tool_cards import call_text

_TOKENS_SHOWN = 40
"""Tokens of the prompt's end that the text form shows."""
_LONGEST = 120
"""Characters of a value that are shown."""
_GOES_ON = "·"
"""Stands for a token whose character goes on in the next."""
_PRE = (
    "white-space:pre-wrap;overflow-wrap:break-word;word-break:normal;margin:2px 0;max-height:20em;overflow:auto;"
    "font-size:12px"
)


@dataclass(frozen=True)
class ExplainView:
    """An explanation to look at; the values themselves are in ``explanation``."""

    explanation: Explanation

    @property
    def headline(self) -> str:
        """Which request, and how it ended."""
        told = self.explanation
        stops = "its prompt was scored" if self._scored else "; ".join(output.stop for output in told.outputs)
        return f"request {told.number} ({told.request_id}): {stops}"

    @property
    def _scored(self) -> bool:
        """Whether the request asked for nothing but its prompt's log-probabilities; the one token is not an answer."""
        told = self.explanation
        asked = any(one.name == "prompt_logprobs" for one in told.sampling)
        return asked and all(output.num_tokens == 1 and output.finish_reason != "abort" for output in told.outputs)

    @property
    def _outputs(self) -> tuple[Output, ...]:
        return () if self._scored else self.explanation.outputs

    def __repr__(self) -> str:
        told = self.explanation
        sections = [
            ("sampling", aligned(_value_rows(told.sampling))),
            ("chat template and thinking", aligned(_value_rows(told.thinking))),
            ("constraints", list(told.constraints)),
            ("notes on the request", list(told.notes)),
            ("prefix cache", self._cache()),
            ("attention", [told.attention]),
            ("speed", speed_lines(told.speed)),
            ("prompt", told.prompt.splitlines()),
            (f"prompt tokens ({len(told.tokens)}; ▸ is the first that was not in the cache)", [self._last_tokens()]),
            *(section for output in self._outputs for section in _output_sections(output)),
        ]
        lines = [self.headline, *time_bar_text(told)]
        for title, body in sections:
            if body:
                lines += ["", title, *(f"  {line}" for line in body)]
        return "\n".join(lines)

    def _cache(self) -> list[str]:
        hit = self.explanation.cache
        lines = [f"{hit.num_cached_tokens} of {hit.num_prompt_tokens} prompt tokens from the cache; {hit.reason}"]
        if hit.here is not None:
            here, there = (shortened(repr(text), _LONGEST) for text in (hit.here, hit.there))
            lines += [f"here:      …{here}", f"request {hit.nearest}: …{there}"]
        return lines

    def _last_tokens(self) -> str:
        tokens, cached = self.explanation.tokens, self.explanation.cache.num_cached_tokens
        start = max(0, len(tokens) - _TOKENS_SHOWN)
        texts = [json.dumps(token, ensure_ascii=False)[1:-1] or _GOES_ON for token in tokens[start:]]
        if start <= cached < len(tokens):
            texts[cached - start] = f"▸{texts[cached - start]}"
        return ("…|" if start else "") + "|".join(texts)

    def _repr_html_(self) -> str:
        told = self.explanation
        rows = [
            row_html(map(html.escape, row), "text-align:left;padding:1px 12px 1px 0", row='style="background:none"')
            for row in _value_rows((*told.sampling, *told.thinking))
        ]
        values = table_html(rows, style="border:none")
        constraints = "".join(f"<div>{html.escape(line)}</div>" for line in told.constraints)
        return (
            f'<div style="{CARD_STYLE};max-width:100%"><b>{html.escape(self.headline)}</b>'
            + time_bar_html(told)
            + _details("sampling values and their sources", values + constraints)
            + "".join(f'<div style="margin:2px 0">{html.escape(note)}</div>' for note in told.notes)
            + _details(self._cache()[0], self._cache_html(), is_open=True)
            + f'<div style="margin:2px 0">attention: {html.escape(told.attention)}</div>'
            + speed_html(told.speed)
            + "".join(_output_html(output) for output in self._outputs)
            + "</div>"
        )

    def _cache_html(self) -> str:
        parted = "".join(f"<div><code>{escaped(line)}</code></div>" for line in self._cache()[1:])
        return parted + prompt_html(self.explanation)


def _value_rows(values: Sequence[SamplingValue]) -> list[tuple[str, str, str]]:
    return [(one.name, shortened(repr(one.value), _LONGEST), one.source) for one in values]


def _output_sections(output: Output) -> Iterator[tuple[str, list[str]]]:
    yield f"output {_as_generated(output)}", output.raw.splitlines()
    for title, text in _parsed(output):
        yield f"parsed {title}", text.splitlines()


def _output_html(output: Output) -> str:
    columns = [(_as_generated(output), output.raw), *_parsed(output)]
    cells = "".join(
        f'<div style="flex:1 1 16em;min-width:0"><div style="opacity:.7">{html.escape(title)}</div>'
        f'<pre style="{_PRE}">{html.escape(text)}</pre></div>'
        for title, text in columns
    )
    return _details("output", f'<div style="display:flex;flex-wrap:wrap;gap:12px">{cells}</div>', is_open=True)


def _as_generated(output: Output) -> str:
    cut = f"; thinking {THINKING_CUTS[output.thinking_cut]}" if output.thinking_cut else ""
    return f"as generated ({output.num_tokens} tokens{cut})"


def _parsed(output: Output) -> Iterator[tuple[str, str]]:
    """What the parsers made of the output, part by part."""
    if output.reasoning:
        yield "reasoning", output.reasoning
    yield "content", output.content
    for call in output.tool_calls:
        yield "tool call", call_text({"function": call})


def _details(title: str, body: str, *, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{html.escape(title)}</summary>{body}</details>"
