"""Talk: while it is on, cells of plain text are messages."""

import shlex
from dataclasses import dataclass


@dataclass(frozen=True)
class TalkMode:
    """The flags that every message gets, as words."""

    words: tuple[str, ...] = ()

    def __str__(self) -> str:
        flags = f", with {shlex.join(self.words)}" if self.words else ""
        return f"on: cells of plain text are messages{flags}; %vllm_metal talk off ends it"
