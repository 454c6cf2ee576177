"""A GPU error that stays: from then on every call to the device fails, and MLX's own clean-up aborts the process.

CUDA gives a process no way back from a kernel that touched memory that is not its own. What MLX holds on the device
cannot be freed any more: the destructors of its streams wait for the device and throw. So nothing is freed, the thread
with the streams never ends, and the process ends without them. Importing this module does not import MLX.
"""

import ctypes
import sys
from collections.abc import Iterator

from engine.errors import DeviceFailedError, VMMagicError

_LASTING = (
    "illegal memory access",
    "misaligned address",
    "illegal instruction",
    "invalid program counter",
    "operation not supported on global/shared address space",
    "hardware stack error",
    "unspecified launch failure",
    "launch timed out and was terminated",
    "device-side assert triggered",
    "uncorrectable ecc error",
    "uncorrectable nvlink error",
    "context is destroyed",
    "invalid access of peer gpu memory",
    "submissionsignored",  # Metal, once a process made a GPU hang too often
)
"""What CUDA's ``cudaGetErrorString`` (after which ``check_cuda_error`` in MLX names the call) and Metal say of them."""
_NOT_READY = 600
_OUT_OF_MEMORY = 2
_RELAXED = 2
"""Numbers of CUDA's driver: results, and the mode in which a thread disturbs no other's capture of a graph."""
_failure: str | None = None


def device_failure(error: BaseException) -> DeviceFailedError | None:
    """What everybody is told of ``error`` where it leaves the device useless; None where work can go on.

    Call it on the thread that owns MLX. The first error seen may be another, such as a product that could not be
    launched; on CUDA the device is asked.
    """
    if isinstance(error, DeviceFailedError):
        return error
    found = next(filter(_lasts, _chain(error)), None)
    if found is None and not isinstance(error, VMMagicError):
        found = _error_of_device()
    if found is None:
        return None
    failure = _failed(str(found))
    failure.__cause__ = error
    return failure


def _failed(what: str) -> DeviceFailedError:
    return DeviceFailedError(f"the GPU failed ({' '.join(what.split())[:200]}): restart the kernel")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """``error`` and what it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _lasts(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _LASTING)


def _error_of_device() -> Exception | None:
    """The lasting error that MLX meets when it waits for the device, if any."""
    if not has_driver():
        return None
    import mlx.core as mx

    try:
        mx.synchronize()
    except RuntimeError as error:
        return error if _lasts(error) else None
    return None


def has_driver() -> bool:
    """Whether MLX computes through CUDA's driver, which can be asked for :func:`driver_failure`."""
    import mlx.core as mx

    return bool(mx.cuda.is_available())


def driver_failure() -> DeviceFailedError | None:
    """What CUDA's driver says of the device, asked beside MLX and from any thread; None while it works.

    After an error no callback of a stream runs any more, and MLX may wait for one forever.
    """
    cuda = ctypes.CDLL("libcuda.so.1")
    context, device, text = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_char_p()
    cuda.cuThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(_RELAXED)))
    if cuda.cuDeviceGet(ctypes.byref(device), 0) or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device):
        return None
    cuda.cuCtxSetCurrent(context)
    result = cuda.cuStreamQuery(None)
    cuda.cuDevicePrimaryCtxRelease_v2(device)
    if result in (0, _NOT_READY, _OUT_OF_MEMORY):
        return None
    cuda.cuGetErrorString(result, ctypes.byref(text))
    failure = _failed((text.value or f"error {result}".encode()).decode())
    return failure if _lasts(RuntimeError(failure)) else None


def give_up_device(failure: DeviceFailedError, *kept: object) -> None:
    """Have every later load of this process refused with ``failure``, ``kept`` never freed, and the process end well.

    A process ends well without the destructors of C++, which run after all that Python does at its end.
    """
    global _failure
    for one in (failure, *kept):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))
    if _failure is None:
        _failure = str(failure)
        _end_without_destructors()


def check_device() -> None:
    """Raise DeviceFailedError where the device failed earlier in this process."""
    if _failure is not None:
        raise DeviceFailedError(_failure)


def _end_without_destructors() -> None:
    """Have ``exit`` leave the process before it comes to functions registered earlier; the exit status stays.

    glibc alone calls ``on_exit`` functions, with the status first, which is what ``_exit`` takes. Metal needs none.
    """
    libc = ctypes.CDLL(None)
    if sys.platform == "linux" and hasattr(libc, "on_exit"):
        libc.on_exit(ctypes.cast(libc._exit, ctypes.c_void_p), None)
