"""csrc/*.cu compile for every target, with setup.py's own flags; no GPU is needed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

# Now, while tests are collected: another test may import distutils, which setuptools replaces.
pytest.importorskip("setuptools")

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc").glob("*.cu"))

# Stands for the part of torch's CUDA build that its CPU build lacks.
STREAM_STUB = """
#include <cstdint>
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t, void**) { return 1; }
"""

LOAD = """
import sys, torch
from pathlib import Path
from varlen_sft import _extension
_extension.LIBRARY = Path(sys.argv[1])  # before anything asks for it
from varlen_sft import backends, sequences_from_position_ids
print(backends("cuda")["sequences"])
print(sequences_from_position_ids(torch.tensor([0, 1, 0]), capacity=2, impl="cpp").cu_seqlens)
"""


class Compiled(NamedTuple):
    object: Path
    log: str  # what ptxas says of each kernel


@pytest.fixture(scope="module")
def setup_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.fixture(scope="module")
def nvcc(setup_script) -> str:
    found = setup_script.find_nvcc()
    if found is None:
        pytest.skip("needs nvcc (CUDA_HOME, PATH)")
    return found


@pytest.fixture(scope="module")
def compiled(setup_script, nvcc, tmp_path_factory) -> dict[str, Compiled]:
    from torch.utils import cpp_extension

    folder = tmp_path_factory.mktemp("cuda")
    includes = [part for path in cpp_extension.include_paths() for part in ("-isystem", path)]
    command = [*setup_script.nvcc_command(nvcc), *includes, "-Werror=all-warnings", "-Xptxas=-v"]
    results = {}
    for source in SOURCES:
        target = folder / f"{source.name}.o"
        done = subprocess.run(
            [*command, "-c", str(source), "-o", str(target)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        results[source.name] = Compiled(target, done.stdout + done.stderr)
    return results


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    triton = importlib.util.find_spec("triton")
    if triton is None:
        pytest.skip("needs cuobjdump, which the triton wheel carries")
    found = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not found.exists():
        pytest.skip(f"needs cuobjdump, {found} does not exist")
    return str(found)


def dump(cuobjdump: str, *arguments: str) -> str:
    command = [cuobjdump, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_there_is_machine_code_for_every_target_and_ptx_for_what_comes_after(compiled, cuobjdump):
    for result in compiled.values():
        cubins = re.findall(r"\.(sm_\d+)\.cubin", dump(cuobjdump, "-lelf", str(result.object)))
        assert cubins == ["sm_80", "sm_90", "sm_100"]
        ptx = re.findall(r"\.(sm_\d+)\.ptx", dump(cuobjdump, "-lptx", str(result.object)))
        assert ptx == ["sm_100"]


def test_no_kernel_spills_or_has_a_stack(compiled):
    for name, result in compiled.items():
        assert len(re.findall("Compiling entry function", result.log)) >= 3, name
        stacks = re.findall(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
            result.log,
        )
        assert stacks and set(stacks) == {("0", "0", "0")}, f"{name}:\n{result.log}"


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_sequences_keeps_many_whole_loads_under_way(compiled, cuobjdump, target):
    """One block on an SM has only its own loads to hide latency with: at least 12 before the first
    use, in both kernels that read ids."""
    sass = dump(cuobjdump, "-sass", "-arch", target, str(compiled["sequences.cu"].object))
    kernels = sass.split("Function : ")[1:]
    assert len(kernels) == 5
    reading = [kernel for kernel in kernels if re.search("(sequences|words)_kernelI[il]", kernel)]
    assert len(reading) == 4
    for kernel in reading:
        width = ".64" if "_kernelIl" in kernel else ""
        body = re.findall(r"\b(LDG[.A-Z0-9]*|SHFL)\b", kernel)
        loads = [name for name in body if name != "SHFL"]
        assert set(loads) <= {f"LDG.E{width}", f"LDG.E{width}.CONSTANT"}
        assert len(loads) == 33  # 32 rows and the id before them
        assert body.index("SHFL") >= 12


def test_a_library_with_cuda_kernels_links_loads_and_is_picked(
    setup_script, compiled, nvcc, tmp_path, monkeypatch
):
    from torch.utils import cpp_extension

    if torch.version.cuda is not None:
        pytest.skip("torch is a CUDA build: the library itself has the kernels")
    monkeypatch.chdir(ROOT)
    source = Path("csrc/sequences.cpp")
    setup_script.compile_source(setup_script.commands()[source], source, tmp_path / "sequences.o")
    (tmp_path / "stub.cpp").write_text(STREAM_STUB)
    stub = ["-shared", "-Xcompiler=-fPIC", "-o", f"{tmp_path}/libtorch_cuda.so"]
    subprocess.run([nvcc, *stub, f"{tmp_path}/stub.cpp"], check=True)
    paths = [*cpp_extension.library_paths(), str(tmp_path)]
    monkeypatch.setattr(cpp_extension, "library_paths", lambda: paths)
    objects = [tmp_path / "sequences.o", compiled["sequences.cu"].object]
    setup_script.link(objects, tmp_path / "_C.so", with_cuda=True)

    said = subprocess.run([nvcc, "--dryrun", *stub, "x.o"], capture_output=True, text=True).stderr
    runtime = re.findall(r'"-L([^"]+)"', said)  # torch's CUDA build would have loaded it
    monkeypatch.setenv("LD_LIBRARY_PATH", ":".join([str(tmp_path), *runtime]))
    command = [sys.executable, "-c", LOAD, f"{tmp_path}/_C.so"]
    loaded = subprocess.run(command, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.splitlines() == [
        "[('cuda', 'picked'), ('cpp', 'runs on cpu only'), ('reference', 'available')]",
        "tensor([0, 2, 3], dtype=torch.int32)",
    ]


def test_why_there_are_no_cuda_kernels(setup_script, monkeypatch, tmp_path):
    def fake_nvcc(release: str) -> None:
        script = tmp_path / "bin" / "nvcc"
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V1'\n")
        script.chmod(0o755)

    monkeypatch.setattr(torch.version, "cuda", None)
    assert setup_script.why_without_cuda() == f"torch {torch.__version__} is a build without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    reason = setup_script.why_without_cuda()
    assert reason == f"no nvcc found (CUDA_HOME='{tmp_path}', PATH)"
    fake_nvcc("12.8")
    reason = setup_script.why_without_cuda()
    assert reason.endswith("bin/nvcc is release 12.8, torch is built with CUDA 13.0")
    fake_nvcc("13.1")
    assert setup_script.why_without_cuda() is None


def test_cuda_kernels_that_are_required_but_impossible_stop_the_build(setup_script, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("VARLEN_SFT_REQUIRE_CUDA", "1")
    with pytest.raises(SystemExit, match="the CUDA kernels cannot be built: torch .* without CUDA"):
        setup_script.commands()
