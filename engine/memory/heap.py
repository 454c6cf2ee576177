"""The C library's memory: what was freed goes back to the system."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's numbers for ``mallopt``."""


def return_free_memory() -> None:
    """Give the C library's free memory back to the system: all threads', with the end of the calling thread's heap.

    Where a heap ends, ``malloc_trim`` leaves up to 64 MB, and every new thread may come to another heap; freeing
    a block of 64 kB cuts the end off down to a threshold. Nothing happens but with glibc.
    """
    libc = ctypes.CDLL(None)
    if sys.platform != "linux" or not hasattr(libc, "malloc_trim"):
        return
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
    libc.mallopt(_TRIM_THRESHOLD, 0)
    libc.free(libc.malloc(1 << 16))
    libc.malloc_trim(0)
    # Where glibc's own adapting ends once a process has freed a large block; after the call above it adapts no more.
    libc.mallopt(_TRIM_THRESHOLD, 64 << 20)
    libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
