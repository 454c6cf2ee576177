"""What a rerun shows: whether the reply is the same, where it parts, and what differs in how it was made."""

import html
from dataclasses import dataclass

from engine.format.text import aligned, shortened
from vm_magic.show.cards import CARD_STYLE
from vm_magic.show.safe_markdown import plain_html
from vm_magic.show.tables import row_html, table_html

BEFORE, AFTER = 60, 160
"""Characters shown before and after the place where two texts part."""
_CELL = "text-align:left;vertical-align:top;padding:1px 14px 1px 0;overflow-wrap:anywhere"
_SIDE = "flex:1 1 18em;min-width:0;white-space:pre-wrap;overflow-wrap:anywhere;margin:2px 0"
_PLAIN = 'style="background:none"'


@dataclass(frozen=True)
class Difference:
    """One fact that is not as it was; ``–`` where it was not said."""

    name: str
    then: str
    now: str


@dataclass(frozen=True)
class RepeatedTurn:
    """A recorded reply beside the same request asked again.

    ``place`` is the first character that differs and ``token`` the first token, None where they are the same or not
    known. ``num_same`` facts are as they were; ``unknown`` says what nobody here can know.
    """

    then: str
    now: str
    same: bool
    place: int | None
    token: int | None
    num_tokens: int
    model_then: str
    model_now: str
    date: str
    differences: tuple[Difference, ...]
    num_same: int
    unknown: tuple[str, ...] = ()
    was_stopped: bool = False
    changed_live: bool = False

    @property
    def verdict(self) -> str:
        """Same or not, in a few words."""
        if self.same:
            return f"the same {self.num_tokens} tokens"
        where = f"token {self.token + 1}, " if self.token is not None else ""
        return f"differs from {where}character {(self.place or 0) + 1} on"

    @property
    def differing(self) -> str:
        """The names of what differs."""
        return ", ".join(one.name for one in self.differences) or "–"

    @property
    def why(self) -> str:
        """What may explain it."""
        if self.model_then != self.model_now:
            return f"It was recorded with {self.model_then}, and repeated with {self.model_now}."
        if self.same:
            return "" if self.differences else "Nothing differs in how it was made."
        if self.changed_live:
            return "Live settings were changed while the recorded reply was being written; a rerun has the last ones."
        if not self.differences:
            return "Nothing differs in how it was made: replies may differ where the top logits tie, as on a GPU."
        return "The reply may differ because of what is listed below, or where the top logits tie."


@dataclass(frozen=True)
class RerunView:
    """A rerun of one cell: a comparison for each turn of the model. ``name`` says which record it was."""

    name: str
    turns: tuple[RepeatedTurn, ...]

    @property
    def same(self) -> bool:
        """Whether every turn's reply is as it was."""
        return all(turn.same for turn in self.turns)

    @property
    def headline(self) -> str:
        """Which record, and what came of it."""
        parts = [turn.verdict for turn in self.turns]
        said = parts[0] if len(parts) == 1 else "; ".join(f"turn {n}: {part}" for n, part in enumerate(parts, 1))
        date = self.turns[0].date
        return f"rerun of {self.name}{f' ({date})' if date else ''}: {said}"

    def __repr__(self) -> str:
        lines = [self.headline]
        for turn in self.turns:
            lines += _text_lines(turn)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        mark = "#2e7d32" if self.same else "#c62828"
        body = "".join(_turn_html(turn) for turn in self.turns)
        return (
            f'<div style="{CARD_STYLE};max-width:100%;border-left:4px solid {mark}">'
            f"<b>{plain_html(self.headline)}</b>{body}</div>"
        )


@dataclass(frozen=True)
class RerunTable:
    """Reruns of all records of a file."""

    name: str
    views: tuple[RerunView, ...]

    @property
    def same(self) -> bool:
        """Whether every reply is as it was."""
        return all(view.same for view in self.views)

    @property
    def headline(self) -> str:
        """How many are as they were."""
        count = sum(view.same for view in self.views)
        return f"rerun of {self.name}: {count} of {len(self.views)} replies are the same"

    def _rows(self) -> list[tuple[str, str, str]]:
        return [
            (
                view.name.removeprefix(f"{self.name} "),
                turn.verdict,
                turn.differing,
            )
            for view in self.views
            for turn in view.turns
        ]

    def __repr__(self) -> str:
        rows = [(cell, verdict, shortened(names, 70)) for cell, verdict, names in self._rows()]
        return "\n".join([self.headline, *aligned([_HEADER, *rows])])

    def _repr_html_(self) -> str:
        head = row_html(map(html.escape, _HEADER), _CELL, tag="th")
        table = table_html([row_html(map(plain_html, row), _CELL) for row in self._rows()], head)
        parted = "".join(view._repr_html_() for view in self.views if not view.same)
        return f"<div><b>{plain_html(self.headline)}</b>{table}{parted}</div>"


_HEADER = ("cell", "reply", "what differs in how it was made")


def _text_lines(turn: RepeatedTurn) -> list[str]:
    lines = [f"  {turn.why}"] if turn.why else []
    if not turn.same and turn.place is not None:
        lines += [f"  then: {_around(turn.then, turn.place)!r}", f"  now:  {_around(turn.now, turn.place)!r}"]
    if turn.differences:
        rows = [("", "then", "now"), *((one.name, one.then, one.now) for one in turn.differences)]
        lines += [f"  {line}" for line in aligned([[shortened(cell, 60) for cell in row] for row in rows])]
    lines += [f"  {line}" for line in _notes(turn)]
    return lines


def _notes(turn: RepeatedTurn) -> list[str]:
    notes = [f"{turn.num_same} other facts are as they were" if turn.differences else ""]
    if turn.was_stopped:
        notes.append("the recorded reply was cut off; the rerun ends where it did")
    notes += [f"not known: {one}" for one in turn.unknown]
    return [note for note in notes if note]


def _around(text: str, place: int) -> str:
    start = max(0, place - BEFORE)
    return ("…" if start else "") + shortened(text[start:], BEFORE + AFTER)


def _turn_html(turn: RepeatedTurn) -> str:
    parts = [f"<div>{plain_html(turn.why)}</div>" if turn.why else ""]
    if not turn.same and turn.place is not None:
        sides = "".join(
            f'<div style="{_SIDE}"><span style="opacity:.7">{title}</span>\n{_marked(text, turn.place)}</div>'
            for title, text in (("then", turn.then), ("now", turn.now))
        )
        parts.append(f'<div style="display:flex;flex-wrap:wrap;gap:16px;margin-top:4px">{sides}</div>')
    if turn.differences:
        rows = [row_html(map(plain_html, (one.name, one.then, one.now)), _CELL, row=_PLAIN) for one in turn.differences]
        head = row_html(["", "then", "now"], _CELL, tag="th")
        parts.append(table_html(rows, head, style="border:none;margin:4px 0 0"))
    parts += [f'<div style="opacity:.7">{plain_html(note)}</div>' for note in _notes(turn)]
    return "".join(parts)


def _marked(text: str, place: int) -> str:
    """The text around ``place``: what both have in common is pale, what follows is marked."""
    shown = _around(text, place)
    common = len(shown) - len(shortened(text[max(0, place - BEFORE) :], BEFORE + AFTER)) + min(place, BEFORE)
    return (
        f'<span style="opacity:.7">{plain_html(shown[:common])}</span>'
        f'<span style="background:rgba(255,160,0,.28)">{plain_html(shown[common:]) or "(nothing more)"}</span>'
    )
