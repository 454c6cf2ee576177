"""The kernels that a bare engine gets for a value of ``attention_backend``, as a load would choose them."""

from engine.runner.kernels.dialect import kernels_available
from engine.runner.kernels.self_check import GPU_KERNELS, AttentionKernels


def wanted_kernels(backend: str) -> AttentionKernels | None:
    """None for ``reference``, and where there is no GPU."""
    return GPU_KERNELS if backend != "reference" and kernels_available() else None
