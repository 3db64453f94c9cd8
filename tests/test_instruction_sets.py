"""The C++ kernels are compiled once per instruction set; here each version runs the same tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from varlen_sft import _extension

ROOT = Path(__file__).resolve().parent.parent
FILES = ["test_attention", "test_cross_entropy", "test_elementwise", "test_rope"]
needs_extension = pytest.mark.skipif(not _extension.load(), reason=_extension.status())


@needs_extension
@pytest.mark.parametrize("cap", ["default", "avx2", "avx512"])
def test_kernels_without_the_wider_instruction_sets(cap):
    """ "avx512" is AMX left out; a CPU that lacks a set runs the next one down instead."""
    files = [str(ROOT / "tests" / "ops" / f"{name}.py") for name in FILES]
    kernels = "cpp or cpu_kernel or rms_norm or silu_mul or hf_numerics"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", kernels, *files],
        cwd=ROOT,
        env={**os.environ, "ATEN_CPU_CAPABILITY": cap, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 40, done.stdout[-500:]
