"""``--device``: its names. No MLX."""

import re

from engine.errors import ConfigError

_NAMES = "auto, cpu, gpu, metal, cuda, or cuda:N for one of several"


def device_name(name: str) -> str:
    """``name`` as it is compared. Raises ConfigError for what names no device anywhere."""
    known = str(name).strip().lower()
    if not re.fullmatch(r"auto|cpu|gpu|metal|cuda(:\d{1,3})?", known):
        raise ConfigError(f"--device {name}: must be {_NAMES}", flag="device", value=name, allowed=_NAMES)
    return known
