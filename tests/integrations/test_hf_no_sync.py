"""No step of a patched Hugging Face model waits for the device: seen on a fake one, without a GPU.

Told of its pack by the flash keywords, by ``packed=`` or by ``Collator``, as Trainer calls it;
position ids alone cost the one wait that ``Packed.from_call`` speaks of.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

import tests.test_no_sync as shared

pytestmark = shared.pytestmark
device, packages = shared.device, shared.packages

NAMES = ("llama3", "qwen2_window", "smollm3", "gemma2", "gemma3", "olmo2")
CASES = [f"{name} {call}" for name in NAMES for call in ("flash", "packed", "collator")]
WAITING = ["llama3 positions", "llama3 collator without rows"]


@pytest.fixture(scope="module")
def results(device, packages) -> dict[str, dict]:
    path = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))
    environment = {key: x for key, x in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.no_sync.hf_steps", ",".join(CASES + WAITING), *device],
        cwd=shared.ROOT, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line.pop("case"): line for line in lines}


@pytest.mark.parametrize("case", CASES)
def test_nothing_waits(case, results):
    assert results[case]["sync"] is None
    layers = 3 if case.startswith(("smollm3", "gemma3")) else 2
    turns = 2 if case.startswith("smollm3") else layers  # one layer has no positions
    head = ["linear_cross_entropy", "linear_cross_entropy_backward"]
    head = head if case.endswith(("packed", "collator")) else []
    assert results[case]["bodies"] == ["rope"] * turns + head + ["rope"] * turns
    norms = 2 * layers if case.startswith(("llama3", "qwen2", "smollm3")) else 0
    for kernel in ("rms_norm_kernel", "rms_norm_backward_kernel"):
        assert results[case]["launches"].count(kernel) == norms
    assert results[case]["picked"]["attention"] == ["flash_attn_2"]


@pytest.mark.parametrize(
    ("case", "where"), [*zip(WAITING, ("sequences|reference", "hf_targets"), strict=True)]
)
def test_who_does_not_say_it_waits(case, where, results):
    """Position ids alone, and labels without their rows."""
    found = results[case]["sync"]
    assert "gives what only the data can tell" in found and re.search(where, found)
