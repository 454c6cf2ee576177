"""Talk: while it is on, cells of plain text are messages."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TalkMode:
    """The flags that every message gets: as typed, and as words."""

    line: str = ""
    words: tuple[str, ...] = ()

    def __str__(self) -> str:
        flags = f", with {self.line}" if self.line else ""
        return f"on: cells of plain text are messages{flags}; %vllm_metal talk off ends it"
