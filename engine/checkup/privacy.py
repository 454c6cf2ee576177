"""Takes out of a text what tells who sends it, from where and with which keys."""

import os
import platform
import re
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from engine.model_card.privacy import shareable, user_name

_SECRET_NAMES = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH", re.IGNORECASE)
_ADDRESSES = (
    (re.compile(r"\b([a-z][a-z0-9+.-]*)://\S+", re.IGNORECASE), r"\1://(address)"),
    (re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"), "(address)"),
    (re.compile(r"(?<![\w.])(?!127\.)\d{1,3}(?:\.\d{1,3}){3}(?![\w.])"), "(address)"),
)
_PATHS = re.compile(r"(?<![\w.)])(?:~|[A-Za-z]:)?[/\\](?!$)[^\s'\",;:()]*[^\s'\",;:().]")
_SHORTEST = 3
"""Characters of a name or value that is looked for as such: shorter ones are in every other word."""


@dataclass(frozen=True)
class Secrets:
    """What must not be in a report beside paths, addresses and what looks like a key: ``values``, found as they are."""

    values: tuple[str, ...] = ()

    @classmethod
    def here(cls, more: Iterable[str] = (), env: Mapping[str, str] = os.environ) -> "Secrets":
        """The names of this machine and its user, the values of variables that are called keys, and ``more``."""
        found = {value for name, value in env.items() if _SECRET_NAMES.search(name)}
        found |= {*more, *_names_of_host(), user_name()}
        known = {value for value in found if len(value) >= _SHORTEST and value not in ("root", "localhost")}
        return cls(tuple(sorted(known, key=len, reverse=True)))

    def removed(self, text: str, private: Iterable[str] = ()) -> str:
        """``text`` without ``private`` parts, :attr:`values`, paths, addresses and keys."""
        for part in sorted(filter(None, private), key=len, reverse=True):
            text = text.replace(part, "(left out)")
        for value in self.values:
            text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", "(left out)", text, flags=re.IGNORECASE)
        for pattern, instead in _ADDRESSES:
            text = pattern.sub(instead, text)
        return shareable(_PATHS.sub("(path)", text))


def _names_of_host() -> Iterable[str]:
    for ask in (socket.gethostname, platform.node):
        with suppress(OSError):
            name = ask()
            yield from (name, name.partition(".")[0])
