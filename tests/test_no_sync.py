"""No step waits for the device: LlamaForSFT and every op, on a fake CUDA device, without a GPU.

Tensors are fake, so nothing is computed; every torch operation that the step makes on a device is
seen, those inside this package's opaque ops and in the backward, too. Triton launches do nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Such a torch asks its driver for the fake tensors' device, which is not there.
pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="a CUDA build of torch without a device",
)

ROOT = Path(__file__).parents[1]
STEPS = [f"step {rope}" for rope in ("default", "yarn", "llama3", "dynamic", "longrope")]
OPS = ["rope", "rope interleaved hf", "elementwise", "linear rows", "linear no rows", "masked"]
OPS += ["linear rows whole", "linear no rows whole"]
OPS += ["masked sequences", "sequences capacity", "loop"]
DWEIGHT = "rms_norm_dweight_kernel"
WAITING = ["step spoilt forward", "step spoilt backward", "sequences of true size"]

FLASH_ATTN = '''
import torch


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
    softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False, block_table=None,
):
    """Stands in for flash-attn 2.8, whose kernels are not looked into."""
    assert type(max_seqlen_q) is int and type(max_seqlen_k) is int
    assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q.device == q.device
    return q + k.sum() + v.sum()
'''


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH in which flash-attn 2 is installed."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "flash_attn").mkdir()
    (folder / "flash_attn/__init__.py").write_text(FLASH_ATTN)
    (folder / "flash_attn/flash_attn_interface.py").write_text("")
    (folder / "flash_attn_2_cuda.py").write_text("")
    return folder


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a torch without CUDA needs before it differentiates fake CUDA tensors."""
    if torch.version.cuda is not None:
        return []
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("a torch without CUDA needs a C++ compiler for this test, found none")
    folder, library = Path(torch.__file__).parent, tmp_path_factory.mktemp("no_sync") / "device.so"
    words = [compiler, "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{folder}/include"]
    words += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]
    words += [str(ROOT / "tests/no_sync/no_device.cpp"), "-o", str(library), f"-L{folder}/lib"]
    subprocess.run([*words, f"-Wl,-rpath,{folder}/lib", "-lc10", "-ltorch_cpu"], check=True)
    return [str(library)]


@pytest.fixture(scope="module")
def results(device: list[str], packages: Path) -> dict[str, dict]:
    """What each case met, from one process."""
    path = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))
    environment = {key: x for key, x in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.no_sync.steps", ",".join(STEPS + OPS + WAITING), *device],
        cwd=ROOT, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line.pop("case"): line for line in lines}


@pytest.mark.parametrize("case", STEPS + OPS)
def test_nothing_waits(case: str, results: dict[str, dict]):
    assert results[case]["sync"] is None


def test_a_step_is_seen_whole(results: dict[str, dict]):
    """Two layers and a head, there and back; GPU implementations, not their references."""
    step = results["step default"]
    turns = ["rope", "rope"]
    head = ["linear_cross_entropy", "linear_cross_entropy_backward"]
    assert step["bodies"] == [*turns, *head, *turns]
    assert step["ops"] > 300
    picked = step["picked"]
    assert picked["rope"] == picked["cross_entropy"] == picked["elementwise"] == ["triton"]
    assert picked["attention"] == ["flash_attn_2"]


def test_kernels_are_launched(results: dict[str, dict]):
    """Launchers ran up to their kernels."""
    assert results["step default"]["launches"].count("rope_kernel") == 4
    assert len(results["step default"]["launches"]) > 4
    assert results["rope"]["launches"] == ["rope_kernel"] * 3
    there = ["rms_norm_kernel", "rms_norm_kernel", "silu_mul_kernel", "silu_mul_kernel"]
    back = [*["silu_mul_backward_kernel"] * 2, *["rms_norm_backward_kernel", DWEIGHT] * 2]
    assert results["elementwise"]["launches"] == there + back
    one = [(f"linear {rows} whole", 1) for rows in ("rows", "no rows")]
    for case, chunks in (("linear rows", 1), ("linear no rows", 3), *one):
        assert results[case]["launches"] == ["ce_rows_kernel"] * chunks


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_wait_is_found_where_it_is(where: str, results: dict[str, dict]):
    found = results[f"step spoilt {where}"]["sync"]
    assert found.startswith("aten._local_scalar_dense.default")
    code = {"forward": "loss.item()", "backward": "float(grad.sum())"}[where]
    assert "no_sync/steps.py" in found and code in found


def test_the_one_documented_wait_is_found(results: dict[str, dict]):
    """Sequences of true size read their count; with a capacity they do not."""
    assert "gives what only the data can tell" in results["sequences of true size"]["sync"]
