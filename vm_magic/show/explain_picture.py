"""The pictures of ``explain``: where the time went, and what of the prompt was in memory."""

from collections.abc import Iterator

from engine.explain.explainer import Explanation
from vm_magic.show.token_html import PRE_STYLE, SLIVER, escaped

TOKENS_SHOWN = 2000
"""Tokens of the prompt's end that the page shows."""
_BAR_WIDTH = 48
"""Characters of the text form's bar."""
_TIMES = (("queue", "#9e9e9e", "░"), ("prefill", "#1e88e5", "▓"), ("decode", "#fb8c00", "█"))
_PARTS = (
    ("from the cache", "#43a04740"),
    ("known, but computed again", "#fbc02d4d"),
    ("new", "#80808014"),
)
_MISS = "border-left:3px solid #e53935;padding:0 4px;margin:0 2px;font-size:11px;background-color:#e5393526"


def time_spans(told: Explanation) -> list[tuple[str, float, str]]:
    """(name, seconds, what was done in them) of the parts of a request that began."""
    seconds = {"queue": told.queue_time, "prefill": told.prefill_time, "decode": told.decode_time}
    done = {
        "prefill": (told.cache.num_prompt_tokens - told.cache.num_cached_tokens, "computed"),
        "decode": (sum(output.num_tokens for output in told.outputs) - len(told.outputs), "more"),
    }
    return [
        (name, value, _rate(*done[name], value) if name in done else "")
        for name, value in seconds.items()
        if value is not None
    ]


def _rate(count: int, what: str, seconds: float) -> str:
    if count < 1:
        return ""
    tokens = "token" if count == 1 else "tokens"
    done = f"{count:,} more {tokens}" if what == "more" else f"{count:,} {tokens} {what}"
    return done + (f", {count / seconds:,.0f} tokens/s" if seconds > 0 else "")


def time_bar_html(told: Explanation) -> str:
    """A bar of the request's time, each part as long as it took, with the figures below."""
    spans = time_spans(told)
    total = sum(seconds for _, seconds, _ in spans)
    if not total:
        return ""
    colours = {name: colour for name, colour, _ in _TIMES}
    bar = "".join(
        f'<div title="{name} {seconds:.3f} s" style="width:{100 * seconds / total:.2f}%;height:14px;'
        f'background-color:{colours[name]}"></div>'
        for name, seconds, _ in spans
    )
    labels = "".join(
        f'<div style="margin:0 16px 0 0"><span style="color:{colours[name]}">■</span> <b>{name}</b> {seconds:.3f} s '
        f'<span style="opacity:0.7">{seconds / total:.0%}{f" · {done}" if done else ""}</span></div>'
        for name, seconds, done in spans
    )
    frame = "display:flex;border-radius:3px;overflow:hidden;margin:6px 0 4px;max-width:640px"
    return f'<div style="{frame}">{bar}</div><div style="display:flex;flex-wrap:wrap;font-size:12px">{labels}</div>'


def time_bar_text(told: Explanation) -> list[str]:
    """The same for a terminal."""
    spans = time_spans(told)
    total = sum(seconds for _, seconds, _ in spans)
    if not total:
        return []
    fills = {name: fill for name, _, fill in _TIMES}
    ends = [sum(seconds for _, seconds, _ in spans[: i + 1]) / total for i in range(len(spans))]
    places = [0, *(round(end * _BAR_WIDTH) for end in ends)]
    bar = "".join(fills[name] * (places[i + 1] - places[i]) for i, (name, _, _) in enumerate(spans))
    lines = [
        f"{fills[name]} {name.ljust(7)}  {seconds:.3f} s  {seconds / total:4.0%}{f'  {done}' if done else ''}"
        for name, seconds, done in spans
    ]
    return [f"{bar}  {total:.3f} s", *lines]


def prompt_html(told: Explanation) -> str:
    """The prompt's tokens, coloured by how they were had; a mark stands where the cache first missed."""
    left_out = max(0, len(told.tokens) - TOKENS_SHOWN)
    before = f'<div style="opacity:0.7">{left_out} tokens before these are left out</div>' if left_out else ""
    style = f"{PRE_STYLE};max-height:24em;overflow:auto"
    return f'{_legend(told)}{before}<pre style="{style}">{"".join(_spans(told, left_out))}</pre>'


def _spans(told: Explanation, first: int) -> Iterator[str]:
    cached = told.cache.num_cached_tokens
    for i in range(first, len(told.tokens)):
        if i == cached:
            yield f'<span style="{_MISS}" title="from here on the prompt was computed">first miss</span>'
        name, colour = _PARTS[_part(told, i)]
        sliver = "" if told.tokens[i] else f";{SLIVER}"
        yield (
            f'<span style="background-color:{colour};border-right:1px solid #80808059{sliver}" '
            f'title="{i}: {name}, token {told.prompt_token_ids[i]}">{escaped(told.tokens[i])}</span>'
        )


def _part(told: Explanation, place: int) -> int:
    hit = told.cache
    return 0 if place < hit.num_cached_tokens else 1 if place < hit.num_shared_tokens else 2


def _legend(told: Explanation) -> str:
    counts = [0, 0, 0]
    for i in range(len(told.tokens)):
        counts[_part(told, i)] += 1
    swatches = "".join(
        f'<span style="background-color:{colour};border:1px solid #80808059;border-radius:3px;padding:0 6px;'
        f'margin:0 6px 0 0">{name}: {count}</span>'
        for (name, colour), count in zip(_PARTS, counts, strict=True)
        if count
    )
    return f'<div style="font-size:11px;margin:4px 0">{swatches}</div>'
