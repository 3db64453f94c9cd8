"""What ptxas made of a Triton kernel: compiled ahead of time, without a GPU, and read back.

Counts of the machine code (registers, spills, instructions, widths of access), never times.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from varlen_sft.ops.launch import KernelVariant
from varlen_sft.tools.sass_text import LOADS, STORES, disassembly

__all__ = ["CAPABILITIES", "Figures", "all_variants", "compile_all", "compile_variant"]

GUARDED = ("registers", "shared_bytes", "instructions")
"""Counts that must not grow past the record."""

KERNELS = ("rope_triton", "cross_entropy_triton", "elementwise_triton")
"""Modules of ``varlen_sft.ops`` that hold Triton kernels, each with ``variants()``."""

CAPABILITIES = (80, 90, 100)
"""A100, H100 and B200: the oldest that bf16 training uses, and the two that follow it."""


@dataclass(frozen=True)
class Figures:
    """Counts of one kernel's machine code on one target."""

    name: str
    capability: int
    registers: int
    """Per thread."""
    shared_bytes: int
    stack_bytes: int
    spill_stores: int
    """Instructions that write local memory, which is where registers spill to."""
    spill_loads: int
    instructions: int
    fused: int
    """Floating-point multiply-adds of any kind; products and moves written as one do not count."""
    mufu: int
    """exp2, log2, tanh, reciprocals."""
    barriers: int
    loads: dict[int, int]
    """Instructions that read global memory, by the bits that one thread moves."""
    stores: dict[int, int]
    hot_width: int
    """Nine tenths of the bytes travel in accesses of so many bits or more, see ``sass_text``."""

    @property
    def target(self) -> str:
        return f"sm_{self.capability}"


def all_variants() -> list[KernelVariant]:
    """Every row of every launch table.

    Raises:
        ValueError: two of one name.
    """
    modules = (importlib.import_module(f"varlen_sft.ops.{name}") for name in KERNELS)
    found = [variant for module in modules for variant in module.variants()]
    twice = [name for name, n in Counter(v.name for v in found).items() if n > 1]
    if twice:
        raise ValueError(f"variants need names of their own, got twice: {', '.join(twice)}")
    return found


# --------------------------------------------------------------------- compile


def compile_variant(variant: KernelVariant, capability: int) -> Figures:
    """Compile for a target as a launch there would, and read the machine code.

    Args:
        variant: which kernel, with which types and constants.
        capability: 90 for sm_90.

    Raises:
        RuntimeError: the kernel was imported under ``TRITON_INTERPRET=1``, or a tool failed.
        ValueError: the machine code moves global memory where the source does not.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(variant.kernel, triton.JITFunction):
        raise RuntimeError("unset TRITON_INTERPRET: an interpreted kernel cannot be compiled")
    names = list(variant.signature)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    source = ASTSource(variant.kernel, variant.signature, variant.constexprs, attributes)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": variant.num_warps,
            "num_stages": variant.num_stages,
            "enable_fp_fusion": variant.enable_fp_fusion,
        },
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin.name)
        code = _tool("nvdisasm", "--print-code", "--print-line-info", cubin.name)
    return _read(variant.name, capability, usage, code, compiled.asm["ttir"])


def compile_all(
    variants: Iterable[KernelVariant],
    capabilities: Iterable[int] = CAPABILITIES,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Figures]:
    """``compile_variant`` of each on each target, two at a time, in the order given.

    Triton's cache is left out: what is read was compiled now.
    """
    jobs = [(variant, capability) for variant in variants for capability in capabilities]

    def job(pair: tuple[KernelVariant, int]) -> Figures:
        figures = compile_variant(*pair)
        progress(f"{figures.name}, {figures.target}")
        return figures

    with _empty_cache(), _one_parser(), ThreadPoolExecutor(2) as pool:
        return list(pool.map(job, jobs))


@contextmanager
def _one_parser() -> Iterator[None]:
    """One thread at a time in ``ast.parse``, which Triton calls.

    CPython 3.11 counts the depth of its conversion once for all threads, and raises SystemError
    when two of them are in it.
    """
    lock, parse = threading.Lock(), ast.parse

    def locked(*args: Any, **kwargs: Any) -> ast.AST:
        with lock:
            return parse(*args, **kwargs)

    with mock.patch("ast.parse", locked):
        yield


@contextmanager
def _empty_cache() -> Iterator[None]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        yield


def _tool(name: str, *words: str) -> str:
    """Run a tool of the triton wheel."""
    import triton.backends.nvidia as nvidia

    program = Path(nvidia.__file__).parent / "bin" / name
    done = subprocess.run([program, *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()}")
    return done.stdout


def _read(name: str, capability: int, usage: str, text: str, ttir: str) -> Figures:
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump told no resource usage of {name}: {usage.strip()}")
    registers, stack, shared = (int(x) for x in found.groups())
    code = disassembly(text)
    return Figures(
        name=name,
        capability=capability,
        registers=registers,
        shared_bytes=shared,
        stack_bytes=stack,
        spill_stores=code.count("STL"),
        spill_loads=code.count("LDL"),
        instructions=len(code.instructions),
        fused=sum(i.is_fused for i in code.instructions),
        mufu=code.count("MUFU"),
        barriers=code.count("BAR"),
        loads=code.widths(*LOADS),
        stores=code.widths(*STORES),
        hot_width=code.hot_width(ttir),
    )
