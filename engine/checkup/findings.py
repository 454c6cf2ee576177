"""What was looked at, how it is, and what to do; on a screen, and as text that says nothing of who sends it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from engine.checkup.privacy import Secrets
from engine.format.text import aligned, shortened

State = Literal["ok", "warning", "problem"]
STATES: tuple[State, ...] = ("ok", "warning", "problem")
_LONGEST = 300
"""Characters of what is said of one thing."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. ``fix``: what to do, in one line; empty where nothing need be done.

    ``private`` are the parts of both texts that are nobody else's business (a path, a model's name, a value).
    """

    area: str
    name: str
    text: str
    state: State = "ok"
    fix: str = ""
    private: tuple[str, ...] = ()

    def without_secrets(self, secrets: Secrets) -> "Finding":
        """The same for others to read."""
        text, fix = (secrets.removed(text, self.private) for text in (self.text, self.fix))
        return replace(self, text=text, fix=fix, private=())


Check = Callable[[], Iterable[Finding]]


def attempt(area: str, check: Check) -> list[Finding]:
    """What ``check`` finds; that it failed is one too, after those that it made. Raises interrupts only."""
    found: list[Finding] = []
    try:
        for finding in check():
            found.append(replace(finding, text=_line(finding.text), fix=_line(finding.fix)))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - what is broken must not hide what else there is to say
        said = f"{type(error).__name__}: {error}"
        fix = "see whether pip check names something; if not, this is worth a bug report"
        text = f"this could not be looked at ({type(error).__name__}: {_line(str(error))})"
        found.append(Finding(area, "check", text, "problem", fix, private=(_line(str(error)), said)))
    return found


def _line(text: str) -> str:
    return shortened(" ".join(text.split()), _LONGEST)


@dataclass(frozen=True)
class Examination:
    """All findings, by area. ``str()`` is the table, :meth:`report` the text to send."""

    findings: tuple[Finding, ...]
    secrets: Secrets = field(default_factory=Secrets)
    facts: tuple[tuple[str, str], ...] = ()
    """What only a report has: versions, and kinds of errors in the log."""

    @property
    def ok(self) -> bool:
        """Whether there is no problem; warnings may be."""
        return not self.of_state("problem")

    def of_state(self, state: State) -> list[Finding]:
        """The findings with that state."""
        return [finding for finding in self.findings if finding.state == state]

    @property
    def title(self) -> str:
        """How it is in one line."""
        counts = [(len(self.of_state(state)), state) for state in reversed(STATES[1:])]
        said = [f"{number} {state}{'s' * (number != 1)}" for number, state in counts if number]
        return ", ".join(said) or f"all is well: {len(self.findings)} things looked at"

    def with_more(self, findings: Sequence[Finding], facts: Sequence[tuple[str, str]] = ()) -> "Examination":
        """These findings and ``findings``."""
        return replace(self, findings=(*self.findings, *findings), facts=(*self.facts, *facts))

    def to_dict(self) -> dict[str, Any]:
        """Everything that a report says, as plain data."""
        shared = [finding.without_secrets(self.secrets) for finding in self.findings]
        rows = [{name: getattr(one, name) for name in ("area", "name", "state", "text", "fix")} for one in shared]
        return {"findings": rows, "facts": {name: self.secrets.removed(text) for name, text in self.facts}}

    def report(self) -> str:
        """Text to paste into a bug report: no keys, prompts, paths, names of users, hosts or models."""
        shared = [finding.without_secrets(self.secrets) for finding in self.findings]
        facts = aligned([(name, self.secrets.removed(text)) for name, text in self.facts]) if self.facts else []
        return "\n".join([f"vm-magic doctor: {self.title}", *_rows(shared), *facts])

    def __str__(self) -> str:
        return "\n".join([self.title, *_rows(self.findings)])

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(str(self))


def _rows(findings: Sequence[Finding]) -> list[str]:
    """One line for each, aligned, and a line below it that says what to do."""
    if not findings:
        return []
    heads = aligned([(finding.state, finding.area, finding.name) for finding in findings])
    width = max(map(len, heads))
    lines = []
    for head, finding in zip(heads, findings, strict=True):
        lines.append(f"  {head.ljust(width)}  {finding.text}")
        if finding.fix:
            lines.append(f"  {' ' * width}  -> {finding.fix}")
    return lines
