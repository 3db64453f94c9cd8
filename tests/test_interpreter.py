"""The Triton kernels on a CPU: tests/interpreter, each file in a process that interprets Triton."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

triton = pytest.importorskip("triton")

NUMPY = tuple(map(int, np.__version__.split(".")[:2]))
ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "tests" / "interpreter").glob("test_*.py"))


@pytest.mark.skipif(
    triton.__version__.startswith("3.6.") and NUMPY >= (2, 4),
    reason="the interpreter of triton 3.6 needs numpy below 2.4",
)
@pytest.mark.parametrize("file", FILES, ids=[file.stem.removeprefix("test_") for file in FILES])
def test_kernels_under_the_interpreter(file):
    """To see one alone: TRITON_INTERPRET=1 pytest tests/interpreter/test_rope_triton.py"""
    words = ["-q", "-p", "no:cacheprovider"]
    # Triton 3.6 takes scalars out of arrays in a way that numpy 2.4 no longer knows.
    words += ["-W", "ignore:Conversion of an array with ndim:DeprecationWarning"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, str(file)],
        cwd=ROOT,
        # Blocks of a few thousand numbers: more threads only wait for each other.
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 0, done.stdout[-500:]
