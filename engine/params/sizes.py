"""Bytes as text, and text as bytes. GB is 1e9 bytes, GiB is 2**30."""

import math
import re
from decimal import ROUND_HALF_DOWN, Decimal

from engine.errors import ConfigError
from engine.format.text import shortened

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
_SMALLEST_GB = 2e8
"""Bytes that a sentence still gives in GB."""


_SIZE = r"\s*(\d+(?:\.\d*)?(?:e\+?\d+)?|\.\d+)\s*([kmgt]?i?b?)\s*"
_LARGEST = 1 << 60


def parse_size(size: str | float, name: str = "device_memory") -> int:
    """Bytes from a number, or from text such as ``51.54GB``, ``48GiB``, ``800MB``. Errors name the flag ``name``."""
    given = str(size) if isinstance(size, int | float) and not isinstance(size, bool) else size
    match = re.fullmatch(_SIZE, given, re.IGNORECASE) if isinstance(given, str) and len(given) < 40 else None
    unit = match.group(2).upper() if match else ""
    unit = unit if unit.endswith("B") or not unit else unit + "B"
    num_bytes = float(match.group(1)) * _UNITS[unit] if match and unit in _UNITS else math.inf
    if num_bytes > _LARGEST:
        said = f"--{name.replace('_', '-')} {shortened(str(size), 40)}: must be a size such as 51.54GB or 48GiB"
        raise ConfigError(said, flag=name, value=size)
    return int(num_bytes)


def exact_size(num_bytes: int) -> str:
    """Bytes where figures are added up: ``14.56GB``, ``3.41MB``, ``20,480B``."""
    if abs(num_bytes) >= 10**9:
        return gb(num_bytes)
    return f"{num_bytes / 10**6:.2f}MB" if abs(num_bytes) >= 10**5 else f"{num_bytes:,}B"


def size_text(num_bytes: float) -> str:
    """Bytes at a glance: ``8.04GB``, ``145.2MB``, ``20.5kB``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.{2 if unit == 'GB' else 1}f}{unit}"
    return f"{num_bytes:.0f}B"


def plain_size(num_bytes: float, decimals: int = 1) -> str:
    """Bytes in a sentence: ``22.0 GB``, from 0.2 GB on with so many ``decimals``; ``145.0 MB``, ``512 B``."""
    if num_bytes >= _SMALLEST_GB:
        return f"{num_bytes / 1e9:.{decimals}f} GB"
    text = size_text(num_bytes)
    figure = text.rstrip("kMB")
    return f"{figure} {text[len(figure) :]}"


def gb(num_bytes: int) -> str:
    """``14.96GB``, as vllm-metal's log has it."""
    # A tie comes from a typed figure (51.54e9 for 48 GiB), whose true value is mostly a little less.
    return f"{Decimal(num_bytes).scaleb(-9).quantize(Decimal('0.01'), ROUND_HALF_DOWN)}GB"


def gib(num_bytes: int) -> str:
    """``27.5``, as vLLM prints GiB."""
    return f"{round(num_bytes / 2**30, 2)}"
