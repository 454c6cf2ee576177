"""What commands return: small objects with a text and an HTML form that hold numbers, never a model."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.outputs import Reply
from vm_magic.show.progress import size_text
from vm_magic.show.tables import CARD_STYLE, Table, settings_text

if TYPE_CHECKING:
    from vm_magic.state.session import Session

_BAR_STYLE = (
    "display:inline-block;width:160px;height:8px;border-radius:4px;overflow:hidden;vertical-align:middle;"
    "margin-right:8px;background-color:#80808040"
)


@dataclass(frozen=True)
class StatusCard:
    """A snapshot of the session; ``fields`` in the order shown, ``usage`` the KV cache's share in use.

    ``snippets`` are (client, text to copy) for the open port; only the HTML form shows them.
    """

    title: str
    fields: tuple[tuple[str, str], ...] = ()
    usage: float | None = None
    snippets: tuple[tuple[str, str], ...] = ()

    def __repr__(self) -> str:
        width = max((len(name) for name, _ in self.fields), default=0)
        return "\n".join([self.title, *(f"  {name.ljust(width)}  {value}" for name, value in self.fields)])

    def _repr_html_(self) -> str:
        name_style = "text-align:left;opacity:.7;padding:1px 12px 1px 0;white-space:nowrap;vertical-align:top"
        value_style = "text-align:left;padding:1px 0"
        rows = "".join(
            f'<tr style="background:none"><td style="{name_style}">{html.escape(name)}</td>'
            f'<td style="{value_style}">{self._bar(name)}{html.escape(value)}</td></tr>'
            for name, value in self.fields
        )
        table = f'<table style="margin:4px 0 0;border:none">{rows}</table>' if rows else ""
        return f'<div style="{CARD_STYLE}"><b>{html.escape(self.title)}</b>{table}{self._snippets()}</div>'

    def _snippets(self) -> str:
        if not self.snippets:
            return ""
        texts = "".join(
            f'<div style="opacity:.7">{html.escape(name)}</div><pre style="margin:2px 0 8px">{html.escape(text)}</pre>'
            for name, text in self.snippets
        )
        return f"<details><summary>clients</summary>{texts}</details>"

    def _bar(self, name: str) -> str:
        if name != "KV blocks" or self.usage is None:
            return ""
        fill = f"width:{self.usage * 100:.1f}%;height:100%;display:block;background-color:#1976d2"
        return f'<span style="{_BAR_STYLE}"><span style="{fill}"></span></span>'


def status_card(session: "Session") -> StatusCard:
    """What is loaded, its memory, the port and the last reply's speed."""
    llm = session.loaded
    settings = settings_text(session.settings)
    if llm is None:
        title = "no model is loaded; run %vllm_metal load smollm2 (or another model)"
        return StatusCard(title, (("settings", settings),) if settings else ())
    stats = llm.stats()
    server = session.server
    last = session.last_reply
    blocks = f"{stats.num_used_blocks} of {stats.num_blocks} used, {stats.num_cached_blocks} cached"
    fields = (
        ("memory", llm.plan.log_line()),
        ("KV blocks", blocks),
        ("context", f"{llm.plan.max_model_len} tokens"),
        ("requests", f"{stats.num_running} running, {stats.num_waiting} waiting"),
        ("settings", settings or "the model's own"),
        ("port", repr(server) if server else "closed; %vllm_metal serve opens it"),
        ("last reply", speed_text(last) if last else "none yet"),
    )
    return StatusCard(llm.args.names[0], fields, stats.kv_cache_usage, _snippets(session))


def _snippets(session: "Session") -> tuple[tuple[str, str], ...]:
    server = session.server
    if server is None:
        return ()
    from vm_magic.state.clients import Port, snippets

    return tuple((name, f"{code.text}{code.note}") for name, code in snippets(Port.of(server)).items())


def speed_text(first: Reply, *later: Reply) -> str:
    """Tokens, tokens per second, time to the first token and the prompt's cached part.

    Of a turn of several requests (the model called tools between them) the sums, and the first one's first token.
    """
    replies = (first, *later)
    num_tokens, num_thinking, num_prompt, num_cached = (
        sum(getattr(reply.usage, f"{name}_tokens") for reply in replies)
        for name in ("completion", "reasoning", "prompt", "cached")
    )
    rates = [
        (r.usage.completion_tokens, r.metrics.decode_rate(r.usage.completion_tokens)) for r in replies if r.metrics
    ]
    seconds = sum((count - 1) / rate for count, rate in rates if rate)
    waited = first.metrics.time_to_first_token if first.metrics else None
    parts = [
        f"{len(replies)} requests" if later else "",
        f"{num_tokens} tokens" + (f" ({num_thinking} thinking)" if num_thinking else ""),
        f"{sum(count - 1 for count, rate in rates if rate) / seconds:.1f} tokens/s" if seconds else "",
        f"first after {waited:.2f} s" if waited is not None else "",
        f"prompt{'s' * bool(later)} {num_prompt} tokens, {num_cached} cached",
    ]
    return " · ".join(part for part in parts if part)


def models_table(models: Sequence[Any]) -> Table:
    """Models on this machine."""
    rows = tuple((m.name, size_text(m.bytes), m.kind) for m in models)
    return Table(
        ("model", "size", "kind"), rows, "" if rows else "no models here yet; %vllm_metal load smollm2 fetches one"
    )


def metrics_table(registry: Any) -> Table:
    """Samples of a Prometheus ``registry``; histograms as count and sum."""
    rows = []
    for family in registry.collect():
        for sample in family.samples:
            if sample.name.endswith(("_bucket", "_created")):
                continue
            labels = ", ".join(f"{k}={v}" for k, v in sample.labels.items() if k not in ("model_name", "engine"))
            rows.append((sample.name, labels, f"{sample.value:g}"))
    return Table(("metric", "labels", "value"), tuple(rows), "" if rows else "no metrics yet")
