"""How the C library treats the memory that a step frees, which a CPU step pays for."""

from __future__ import annotations

import ctypes

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_LARGEST_MMAP_THRESHOLD = 2**30


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed memory for the next step. Holds for the process, and costs nothing.

    By default tensors above 32 MB go back to the kernel when they are freed, and every page of the
    next one is fetched and zeroed anew. Between steps the process stays at its peak.

    Returns:
        Whether the C library took it. Others than glibc are left alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    taken = mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    return bool(taken) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
