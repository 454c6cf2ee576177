"""What a layer's rotary embedding does, for kernels that rotate by themselves."""

from typing import Any

import mlx.nn as nn
import numpy as np
from mlx_lm.models.rope_utils import Llama3RoPE, ProportionalRoPE, SuScaledRoPE, YarnRoPE
from numpy.typing import NDArray

from engine.runner.device.host import floats


def frequencies_of(rope: Any, dim: int) -> NDArray[np.float32] | None:
    """Radians per position [dim / 2] by which ``rope`` turns elements i and i + dim / 2 of a head.

    None if it does anything else: turns neighbours or a part of a head, scales, or depends on the length. The modules
    are mlx-lm's; each is told by its very type, since one derived from it may compute anything.
    """
    kind = type(rope)
    if kind is nn.RoPE:
        whole = rope.dims == dim and not rope.traditional
        return _inverse(float(rope.base) ** (np.arange(0, dim, 2) / dim) / rope.scale) if whole else None
    if kind in (Llama3RoPE, ProportionalRoPE):  # of the latter some turn by nothing: their wavelength is infinite
        whole = rope.dims == dim and not rope.traditional
    elif kind is YarnRoPE:
        whole = rope.dims == dim and not rope.traditional and rope.mscale == 1.0
    elif kind is SuScaledRoPE:
        whole = rope.dim == dim and rope._scale == 1.0
    else:
        return None
    return _inverse(floats(rope._freqs)) if whole else None


def _inverse(wavelengths: NDArray[Any]) -> NDArray[np.float32]:
    return (1.0 / wavelengths).astype(np.float32)
