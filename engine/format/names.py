"""A name that is not known, and the known one that it resembles."""

import difflib
from collections.abc import Iterable


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The one of ``known`` that ``name`` may be a slip of, or None. Case, dashes and underscores do not count."""
    plain = {_plain(one): one for one in known}
    found = difflib.get_close_matches(_plain(name), plain, 1, cutoff)
    return plain[found[0]] if found else None


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The end of an error about ``name``: ``did you mean temperature?``, or ``otherwise`` where nothing resembles."""
    found = closest(name, known)
    return f"did you mean {found}?" if found else otherwise


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
