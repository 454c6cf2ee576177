"""Values brought from the device to the host, so that a device that failed is an exception.

``np.array`` of an MLX array goes through Python's buffer protocol, a function of C: on CUDA the copy is made there, and
an error of the device that is found by it ends the process. MLX's own conversions raise.
"""

from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray


def to_numpy(array: mx.array) -> NDArray[Any]:
    """A copy of ``array``, of its shape and element type (not bfloat16, which numpy lacks); waits for it.

    Raises what the device failed with.
    """
    return np.array(array.__array__())


def floats(array: mx.array) -> NDArray[np.float32]:
    """``array`` as numpy's float32; waits for it."""
    return to_numpy(array.astype(mx.float32))
