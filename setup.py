"""Builds csrc/*.cpp, and csrc/*.cu where it can, into the plain shared library varlen_sft/_C.so.

Everything else about the package is in pyproject.toml. The library uses torch's stable ABI and not
libpython: one file serves every Python and torch 2.11 or newer. It is loaded with
`torch.ops.load_library` (see varlen_sft/_extension.py), never imported.

Without torch or without a compiler the package is built as pure Python, and says so. The CUDA
kernels are left out where torch is a CPU build or no nvcc fits it. Environment:
    VARLEN_SFT_REQUIRE_EXTENSION=1  fail where the extension cannot be built
    VARLEN_SFT_REQUIRE_CUDA=1       fail where the CUDA kernels cannot be built
    VARLEN_SFT_NO_EXTENSION=1       do not build it
    CXX, CXXFLAGS, MAX_JOBS         the compiler, more flags for it, how many run at once
    CUDA_HOME                       where nvcc is (CUDA_HOME/bin), before PATH is searched
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# Relative paths: setuptools refuses absolute ones, and a build always runs in this folder.
SOURCES = sorted(Path("csrc").glob("*.cpp"))
CUDA_SOURCES = sorted(Path("csrc").glob("*.cu"))
HEADERS = sorted([*Path("csrc").glob("*.h"), *Path("csrc").glob("*.cuh")])
OLDEST_TORCH = (2, 11)
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11, the same as OLDEST_TORCH
FLAGS = [
    STABLE_ABI,
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-ffp-contract=off",  # a fused multiply-add would round differently from eager torch
    "-Wall",
    "-Wextra",
    *shlex.split(os.environ.get("CXXFLAGS", "")),
]
NVCC_FLAGS = [
    STABLE_ABI,
    "-DUSE_CUDA",  # declares the part of the stable ABI that is about CUDA streams
    "-O3",
    "-std=c++20",
    "-Xcompiler=-fPIC,-Wall,-Wextra",
]
CUDA_TARGETS = (80, 90, 100)  # A100, H100, B200; PTX of the newest serves what comes after


def is_set(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def find_compiler() -> list[str] | None:
    """The command of the C++ compiler, $CXX first; None where there is none."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        return command if shutil.which(command[0]) else None
    found = (shutil.which(name) for name in ("c++", "g++", "clang++"))
    return next(([path] for path in found if path), None)


def torch_version() -> str | None:
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def why_not_built() -> str | None:
    """Why the extension is not built; None when it is."""
    if is_set("VARLEN_SFT_NO_EXTENSION"):
        return "VARLEN_SFT_NO_EXTENSION is set"
    if not sys.platform.startswith("linux"):
        return f"it is built on Linux only, this is {sys.platform}"
    version = torch_version()
    if version is None:
        return "torch is not installed here; with torch installed, use --no-build-isolation"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        return f"it needs torch 2.11 or newer, found torch {version}"
    if find_compiler() is None:
        return f"no C++ compiler found (CXX={os.environ.get('CXX', '')!r}, c++, g++, clang++)"
    return None if SOURCES else "there are no csrc/*.cpp"


def find_nvcc() -> str | None:
    """The command of nvcc, that of $CUDA_HOME first; None where there is none."""
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")


def why_without_cuda() -> str | None:
    """Why csrc/*.cu are not compiled; None when they are."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    nvcc = find_nvcc()
    if nvcc is None:
        return f"no nvcc found (CUDA_HOME={os.environ.get('CUDA_HOME', '')!r}, PATH)"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.\d+", said)
    # The CUDA runtime is the one that torch has loaded, and its major version is in its name.
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        found = release[0] if release else "of unknown release"
        return f"{nvcc} is {found}, torch is built with CUDA {torch.version.cuda}"
    return None


def nvcc_command(nvcc: str) -> list[str]:
    """nvcc with its flags, for those of CUDA_TARGETS that it knows."""
    command = [nvcc, "--list-gpu-arch"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    targets = [target for target in CUDA_TARGETS if f"compute_{target}" in known]
    codes = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]
    newest = f"compute_{targets[-1]}"
    return [nvcc, *NVCC_FLAGS, *codes, f"-gencode=arch={newest},code={newest}"]


def compile_source(command: list[str], source: Path, target: Path) -> None:
    """Runs the compiler; the target appears only when it is complete."""
    print(f"compiling {source}", flush=True)
    partial = target.with_suffix(".partial")
    if subprocess.run([*command, "-c", str(source), "-o", str(partial)]).returncode:
        raise CompileError(f"{source} does not compile")
    partial.replace(target)


def commands() -> dict[Path, list[str]]:
    """The compiler and its flags for each source that is built here."""
    import torch
    from torch.utils import cpp_extension

    includes = [part for path in cpp_extension.include_paths() for part in ("-isystem", path)]
    command = [*(find_compiler() or []), *FLAGS, *includes]
    by_source = {source: command for source in SOURCES}
    reason = why_without_cuda()
    if reason is None:
        command = [*nvcc_command(find_nvcc() or ""), *includes]
        by_source.update({source: command for source in CUDA_SOURCES})
    elif is_set("VARLEN_SFT_REQUIRE_CUDA"):
        sys.exit(f"varlen_sft: the CUDA kernels cannot be built: {reason}")
    elif torch.version.cuda is not None:
        print(f"varlen_sft: built without CUDA kernels: {reason}", file=sys.stderr, flush=True)
    return by_source


def build_library() -> Path:
    """Compiles what is older than its source, links, and returns the library under build/."""
    by_source = commands()
    key = hashlib.sha256(repr((by_source, torch_version())).encode()).hexdigest()[:12]
    folder = Path("build", f"csrc-{key}")
    folder.mkdir(parents=True, exist_ok=True)

    shared_time = max(path.stat().st_mtime for path in [*HEADERS, Path(__file__)])
    objects = {source: folder / f"{source.name}.o" for source in by_source}
    stale = [
        source
        for source, target in objects.items()
        if not target.exists() or target.stat().st_mtime < max(source.stat().st_mtime, shared_time)
    ]
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda name: compile_source(by_source[name], name, objects[name]), stale))

    library = folder / "_C.so"
    if stale or not library.exists():
        link(list(objects.values()), library, with_cuda=len(by_source) > len(SOURCES))
    return library


def link(objects: list[Path], library: Path, with_cuda: bool) -> None:
    """Links against torch without an rpath: torch is in the process before the library is."""
    from torch.utils import cpp_extension

    partial = library.with_suffix(".partial")
    # nvcc knows where its runtime is; torch brings the runtime that is used.
    with_nvcc = [find_nvcc() or "", "-cudart=shared", "-ltorch_cuda"]
    linker = with_nvcc if with_cuda else [*(find_compiler() or []), *FLAGS]
    paths = [f"-L{path}" for path in cpp_extension.library_paths()]
    arguments = ["-shared", *map(str, objects), "-o", str(partial), *paths, "-ltorch_cpu", "-lc10"]
    if subprocess.run([*linker, *arguments]).returncode:
        raise CompileError(f"{library.name} does not link")
    partial.replace(library)


class BuildPlainLibrary(build_ext):
    """Puts the library where setuptools expects it, under a name without a Python tag."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # build_library knows what is stale; the copy must never be skipped

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(build_library()), str(target))


class AnyPythonWheel(bdist_wheel):
    """Tags the wheel for every Python 3: only the platform matters to the library."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def extensions() -> list[Extension]:
    reason = why_not_built()
    if reason is None:
        depends = [str(path) for path in HEADERS]
        return [Extension("varlen_sft._C", [str(path) for path in SOURCES], depends=depends)]
    if is_set("VARLEN_SFT_REQUIRE_EXTENSION") or is_set("VARLEN_SFT_REQUIRE_CUDA"):
        sys.exit(f"varlen_sft: the C++ extension cannot be built: {reason}")
    print(f"varlen_sft: without the C++ extension: {reason}", file=sys.stderr, flush=True)
    return []


if __name__ == "__main__":  # also when pip builds; a test reads the flags
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildPlainLibrary, "bdist_wheel": AnyPythonWheel},
    )
