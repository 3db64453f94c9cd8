"""Memory of this process: its peak, and how the C library treats what a CPU step frees."""

from __future__ import annotations

import ctypes
import sys

import torch

__all__ = ["keep_freed_memory", "peak_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_LARGEST_MMAP_THRESHOLD = 2**30
_NEVER = -1


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
    return bool(taken) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: tensors on a GPU, or all of it on a CPU.

    Nothing waits for the device.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status", "rb") as status:
            told = next(line for line in status if line.startswith(b"VmHWM:"))
        return int(told.split()[1]) * 1024
    except (OSError, StopIteration):  # not Linux
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
