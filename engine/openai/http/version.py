"""The package's version, as the port tells it."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def package_version() -> str:
    """The version of the installed distribution, ``unknown`` from a bare source tree."""
    try:
        return version("vm-magic")
    except PackageNotFoundError:
        return "unknown"


def system_fingerprint() -> str:
    """What made a reply: the same text for all replies of one version."""
    return f"vm-magic-{package_version()}"
