from __future__ import annotations

import subprocess
import sys

import pytest

COUNT = """
import resource, sys, torch
from varlen_sft.train.memory import keep_freed_memory
if sys.argv[1] == "kept":
    print(keep_freed_memory())
else:
    print(True)
def touch(size):
    torch.empty(size, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = touch(2**26)
print(touch(2**26 - 2**20) - before)  # a little smaller: alignment would not fit otherwise
"""


def page_faults(mode: str) -> int:
    """Of a tensor of 63 MB, after one of 64 MB was freed."""
    return counted(COUNT, mode)


def counted(code: str, *words: str) -> int:
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    taken, faults = done.stdout.split()
    if taken != "True":
        pytest.skip("this C library has no mallopt")
    return int(faults)


LARGE = """
import ctypes, resource, sys
from varlen_sft.train.memory import keep_freed_memory
print(keep_freed_memory())
c, size = ctypes.CDLL(None), 900 * 2**20
c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
c.free.argtypes = [ctypes.c_void_p]
def touch():
    held = [c.malloc(size) for _ in range(3)]
    for place in held:
        ctypes.memset(place, 1, size)
    for place in reversed(held):  # the last first: all that is free lies at the end of the heap
        c.free(place)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = touch()
print(touch() - before)
"""


PEAK = """
import numpy, torch
from varlen_sft.train.memory import peak_memory
before = peak_memory(torch.device("cpu"))
numpy.ones(2**25)  # 256 MiB, freed at once
print(before, peak_memory(torch.device("cpu")))
"""


def test_the_peak_stays_when_memory_was_freed():
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert 50e6 < before < 4e9  # torch alone
    assert 2**28 - 2**25 < after - before < 2**28 + 2**25


def test_memory_is_kept_for_the_next_step():
    assert page_faults("kept") < 100
    assert page_faults("given back") > 1000  # else the machine hides what this is about


def test_more_than_two_gigabytes_are_kept():
    assert counted(LARGE) < 100
