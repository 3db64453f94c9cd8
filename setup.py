"""Builds csrc/*.cpp into the plain shared library varlen_sft/_C.so.

Everything else about the package is in pyproject.toml. The library uses torch's stable ABI and not
libpython: one file serves every Python and torch 2.11 or newer. It is loaded with
`torch.ops.load_library` (see varlen_sft/_extension.py), never imported.

Without torch or without a compiler the package is built as pure Python, and says so. Environment:
    VARLEN_SFT_REQUIRE_EXTENSION=1  fail where the extension cannot be built
    VARLEN_SFT_NO_EXTENSION=1       do not build it
    CXX, CXXFLAGS, MAX_JOBS         the compiler, more flags for it, how many run at once
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
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
HEADERS = sorted(Path("csrc").glob("*.h"))
OLDEST_TORCH = (2, 11)
FLAGS = [
    "-DTORCH_TARGET_VERSION=0x020b000000000000",  # torch 2.11, the same as OLDEST_TORCH
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-ffp-contract=off",  # a fused multiply-add would round differently from eager torch
    "-Wall",
    "-Wextra",
    *shlex.split(os.environ.get("CXXFLAGS", "")),
]


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


def compile_source(command: list[str], source: Path, target: Path) -> None:
    """Runs the compiler; the target appears only when it is complete."""
    print(f"compiling {source}", flush=True)
    partial = target.with_suffix(".partial")
    if subprocess.run([*command, "-c", str(source), "-o", str(partial)]).returncode:
        raise CompileError(f"{source} does not compile")
    partial.replace(target)


def build_library() -> Path:
    """Compiles what is older than its source, links, and returns the library under build/."""
    from torch.utils import cpp_extension

    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    command = [*(find_compiler() or []), *FLAGS, *includes]
    key = hashlib.sha256(repr((command, torch_version(), SOURCES)).encode()).hexdigest()[:12]
    folder = Path("build", f"csrc-{key}")
    folder.mkdir(parents=True, exist_ok=True)

    shared_time = max(path.stat().st_mtime for path in [*HEADERS, Path(__file__)])
    objects = {source: folder / f"{source.stem}.o" for source in SOURCES}
    stale = [
        source
        for source, target in objects.items()
        if not target.exists() or target.stat().st_mtime < max(source.stat().st_mtime, shared_time)
    ]
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda source: compile_source(command, source, objects[source]), stale))

    library = folder / "_C.so"
    if stale or not library.exists():
        link(command, list(objects.values()), library, cpp_extension.library_paths())
    return library


def link(command: list[str], objects: list[Path], library: Path, paths: list[str]) -> None:
    """Links against torch without an rpath: torch is in the process before the library is."""
    partial = library.with_suffix(".partial")
    torch_libraries = [*(f"-L{path}" for path in paths), "-ltorch_cpu", "-lc10"]
    arguments = ["-shared", *map(str, objects), "-o", str(partial), *torch_libraries]
    if subprocess.run([*command, *arguments]).returncode:
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
    if is_set("VARLEN_SFT_REQUIRE_EXTENSION"):
        sys.exit(f"varlen_sft: the C++ extension cannot be built: {reason}")
    print(f"varlen_sft: without the C++ extension: {reason}", file=sys.stderr, flush=True)
    return []


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildPlainLibrary, "bdist_wheel": AnyPythonWheel},
)
