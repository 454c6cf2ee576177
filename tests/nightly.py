"""How long a check runs: briefly in every run of the tests, at length in ``make nightly``.

A test that has a long form carries the mark ``nightly`` and asks :func:`size` how much to do.
"""

import os
from typing import TypeVar

T = TypeVar("T")

NIGHTLY = bool(os.environ.get("VM_MAGIC_NIGHTLY"))
"""Whether this run is the long one."""


def size(brief: T, nightly: T) -> T:
    """``brief`` steps, seconds or cases in ``make test``, ``nightly`` in ``make nightly``."""
    return nightly if NIGHTLY else brief
