"""Two records of the same request: where their replies part, and what differs in how they were made."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from engine.format.text import shortened
from vm_magic.show.rerun_view import Difference, RepeatedTurn
from vm_magic.state.record import Record

_SECTIONS = ("model", "engine", "sampling", "versions", "prompt")
_LABELS = {"model": "model {}", "versions": "{} version", "prompt": "prompt {}"}
"""How a section's facts are called; the others by their own names."""
_LONGEST = 160


def compare(then: Record, now: Record) -> RepeatedTurn:
    """What a rerun ``now`` shows beside the record ``then``."""
    before, after = _reply_text(then["reply"]), _reply_text(now["reply"])
    cut = then["reply"].get("finish_reason") == "abort" or "too long to keep" in then["reply"]
    same_text = before == after
    if "too long to keep" in then["reply"]:
        same_text = then["reply"].get("sha256") == now["reply"].get("sha256")
    facts_then, facts_now = _facts(then), _facts(now)
    names = list(dict.fromkeys((*facts_then, *facts_now)))
    different = [name for name in names if facts_then.get(name) != facts_now.get(name)]
    return RepeatedTurn(
        then=before,
        now=after,
        same=same_text,
        place=None if same_text else common_length(before, after),
        token=None if same_text else _token_place(then, now),
        num_tokens=int(now["reply"].get("tokens") or 0),
        model_then=str(then["model"].get("name")),
        model_now=str(now["model"].get("name")),
        date=str(then.get("date", "")).replace("T", " ").replace("+00:00", " UTC"),
        differences=tuple(_difference(name, facts_then.get(name), facts_now.get(name)) for name in different),
        num_same=len(names) - len(different),
        unknown=tuple(str(one) for one in _unknown(then, now)),
        was_stopped=cut,
        changed_live=bool(then.get("changed while it ran")),
    )


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Number of leading items that are equal."""
    for place, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return place
    return min(len(one), len(other))


def _token_place(then: Record, now: Record) -> int | None:
    """The first token that differs, where both records have the tokens of one vocabulary."""
    before, after = then["reply"].get("token_ids"), now["reply"].get("token_ids")
    known = isinstance(before, list) and isinstance(after, list)
    same_model = then["model"].get("fingerprint") == now["model"].get("fingerprint")
    return common_length(before, after) if known and same_model else None


def _reply_text(reply: Mapping[str, Any]) -> str:
    """All that the model said: its thought, its answer, its calls."""
    calls = [json.dumps(call, sort_keys=True, ensure_ascii=False) for call in reply.get("tool_calls") or ()]
    return "\n".join(str(part) for part in (reply.get("reasoning"), reply.get("text"), *calls) if part)


def _facts(record: Record) -> dict[str, str]:
    """Everything that could make a difference, by names that a table can show."""
    found: dict[str, str] = {"where": str(record.get("where"))}
    for section in _SECTIONS:
        values = record.get(section)
        for name, value in (values if isinstance(values, Mapping) else {}).items():
            label = _LABELS.get(section, "{}").format(name)
            if name == "notes" and isinstance(value, list):
                found |= {f"note: {_topic(str(note))}": str(note) for note in value}
            else:
                found[label] = _text(value)
    request = record["request"]
    for name in ("tool_choice", "thinking_token_budget", "template_kwargs"):
        if request.get(name) is not None:
            found[name.replace("template_kwargs", "chat_template_kwargs")] = _text(request[name])
    return found


def _topic(note: str) -> str:
    """How a note begins, so that two about the same stand in one row."""
    return shortened(note.partition(":")[0], 40)


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return shortened(text, _LONGEST)


def _difference(name: str, then: str | None, now: str | None) -> Difference:
    return Difference(name, "–" if then is None else then, "–" if now is None else now)


def _unknown(*records: Record) -> list[str]:
    found: list[str] = []
    for record in records:
        unknown = record.get("not known")
        found += [one for one in (unknown if isinstance(unknown, list) else []) if one not in found]
    return found
