"""Every Triton kernel compiled for three GPUs without any of them, and the gate that reads it."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest

from varlen_sft.ops.launch import KernelVariant
from varlen_sft.tools import sass, sass_record
from varlen_sft.tools.sass_text import disassembly

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile", allow_module_level=True)

RECORD = Path(__file__).parents[1] / "benchmarks" / "results" / "kernels.json"


# ------------------------------------------------------------------ our kernels


def test_every_kernel_is_good_and_as_good_as_recorded_on_every_target():
    variants, record = sass.all_variants(), sass_record.Record.load(RECORD)
    named = {variant.name: variant for variant in variants}
    found = [
        problem
        for figures in sass.compile_all(variants)
        for problem in sass_record.problems(figures, named[figures.name], record.of(figures))
    ]
    assert not found, "\n".join(found)


def test_the_record_tells_of_exactly_the_kernels_there_are():
    record = sass_record.Record.load(RECORD)
    if not record.is_comparable:
        pytest.skip(f"the record is of triton {record.triton}: its counts are not compared here")
    names = (variant.name for variant in sass.all_variants())
    assert record.figures.keys() == set(product(names, sass.CAPABILITIES))


# --------------------------------------------------------------- planted faults


@triton.jit
def add_rows(x_ptr, ids_ptr, y_ptr, BLOCK: tl.constexpr):
    row = tl.load(ids_ptr + tl.program_id(0))
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * BLOCK + columns)
    tl.store(y_ptr + row * BLOCK + columns, x * 3 + 1)


@triton.jit
def gather_row(x_ptr, ids_ptr, y_ptr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + columns)
    tl.store(y_ptr + columns, tl.load(x_ptr + ids))


@triton.jit
def hold_everything(x_ptr, ids_ptr, y_ptr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + columns)
    tl.store(y_ptr + columns, x / tl.sum(x))


@triton.jit
def narrow_loop(x_ptr, ids_ptr, y_ptr, BLOCK: tl.constexpr):
    """Many bytes in wide accesses outside the loop, few in narrow ones within."""
    columns = tl.arange(0, BLOCK)
    some = tl.arange(0, BLOCK // 16)
    tl.store(y_ptr + columns, tl.load(x_ptr + columns))
    total = tl.zeros([BLOCK // 16], tl.float32)
    for step in range(tl.load(ids_ptr)):
        total += tl.load(x_ptr + step * BLOCK + 3 * some)
    tl.store(y_ptr + some, total)


def toy(kernel, *, aligned: bool = True, block: int = 1024, **changes) -> KernelVariant:
    signature = {"x_ptr": "*fp32", "ids_ptr": "*i64", "y_ptr": "*fp32", "BLOCK": "constexpr"}
    pointers = ("x_ptr", "ids_ptr", "y_ptr") if aligned else ()
    made = KernelVariant("toy", kernel, signature, {"BLOCK": block}, pointers, num_warps=4)
    return replace(made, **changes)


def compiled(variant: KernelVariant, capability: int = 90) -> sass.Figures:
    return sass.compile_all([variant], [capability])[0]


def judged(variant: KernelVariant) -> list[str]:
    return sass_record.problems(compiled(variant), variant, None)


@pytest.mark.parametrize("capability", sass.CAPABILITIES)
def test_figures_of_a_kernel_known_by_hand(capability):
    """1024 fp32 by 128 threads, 4 to an access: two loads and two stores, and one id of 64 bits."""
    figures = compiled(toy(add_rows, enable_fp_fusion=False), capability)
    assert (figures.name, figures.target) == ("toy", f"sm_{capability}")
    assert figures.loads == {64: 1, 128: 2}
    assert figures.stores == {128: 2}
    assert figures.hot_width == 128
    assert (figures.fused, figures.mufu, figures.barriers) == (0, 0, 0)
    assert (figures.spill_stores, figures.spill_loads, figures.stack_bytes) == (0, 0, 0)
    assert figures.shared_bytes == 0
    assert 8 < figures.registers <= 32
    assert 4 + 8 + 8 < figures.instructions < 80


def test_a_good_kernel_has_no_problems():
    assert judged(toy(add_rows, enable_fp_fusion=False)) == []


def test_a_fused_product_is_counted_and_refused_only_where_rounding_matters():
    figures = compiled(toy(add_rows))
    assert figures.fused == 8  # per thread
    assert sass_record.problems(figures, toy(add_rows), None) == []
    assert sass_record.problems(figures, toy(add_rows, enable_fp_fusion=False), None) == [
        "toy, sm_90: 8 fused multiply-adds, where each product has to be rounded"
    ]


def test_narrow_accesses_are_refused():
    (problem,) = judged(toy(add_rows, aligned=False))
    assert problem == ("toy, sm_90: 32-bit accesses in the hot path, where the layout allows 128")
    assert judged(toy(add_rows, aligned=False, narrowest_access=32)) == []


def test_only_the_loop_counts_where_there_is_one():
    figures = compiled(toy(narrow_loop))
    assert figures.loads[128] == 2 and figures.stores[128] == 2
    assert figures.hot_width == 32


def test_gathered_elements_are_narrow_though_their_ids_are_wide():
    figures = compiled(toy(gather_row))
    assert figures.loads.keys() == {32, 128}
    assert figures.hot_width == 32


def test_spills_and_their_stack_are_refused():
    variant = toy(hold_everything, block=2**16)
    figures = compiled(variant)
    assert min(figures.spill_stores, figures.spill_loads, figures.stack_bytes) > 0
    assert sass_record.problems(figures, variant, None) == [
        f"toy, sm_90: {figures.spill_stores} spill stores, {figures.spill_loads} spill loads",
        f"toy, sm_90: {figures.stack_bytes} bytes of local stack",
    ]


DISASSEMBLY = """
.text.toy:
	//## File "/a.py", line 3
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
	//## File "/a.py", line 4
        /*0010*/              @!P1 LDG.E.LTC128B.64 R4, desc[UR10][R10.64] ;
        /*0020*/                   HFMA2.MMA R17, -RZ, RZ, 0, 0 ;
        /*0030*/                   FFMA R2, R4, R5.reuse, -RZ ;
        /*0040*/                   HFMA2.BF16_V2 R2, R4, 1, 1, R5 ;
        /*0050*/                   FFMA R2, -R4, R5, 1 ;
        /*0060*/               @P0 BRA `(.L_x_1) ;
        /*0070*/                   STG.E.U16 desc[UR10][R2.64], R0 ;
        /*0080*/                   EXIT ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2);
        /*00a0*/                   NOP;
"""


def test_disassembly_ends_at_the_last_exit_and_knows_loops_and_fused_products():
    code = disassembly(DISASSEMBLY)
    assert [i.address for i in code.instructions] == list(range(0, 0x90, 0x10))
    assert code.loops == [range(0x10, 0x60)]
    assert [i.address for i in code.instructions if i.is_fused] == [0x50]
    assert (code.widths("LDG"), code.widths("STG")) == ({64: 1}, {16: 1})
    assert code.instructions[1].line == ("/a.py", 4)


def test_an_access_that_the_source_does_not_have_is_an_error():
    with pytest.raises(ValueError, match="LDG.E.LTC128B.64 at .*, which moves nothing"):
        disassembly(DISASSEMBLY).hot_width("")


# ----------------------------------------------------------------------- record


def test_counts_above_the_record_are_refused():
    variant = toy(add_rows)
    figures = compiled(variant)
    better = replace(
        figures, registers=figures.registers - 1, instructions=figures.instructions - 1
    )
    assert sass_record.problems(figures, variant, better) == [
        f"toy, sm_90: {figures.registers} registers, recorded {figures.registers - 1}",
        f"toy, sm_90: {figures.instructions} instructions, recorded {figures.instructions - 1}",
    ]
    assert sass_record.problems(better, variant, figures) == []
    assert sass_record.problems(figures, variant, figures) == []


def test_a_record_survives_its_file_and_serves_its_own_triton_alone(tmp_path):
    figures = compiled(toy(add_rows))
    kept = {(figures.name, 90): figures}
    sass_record.Record(triton.__version__, kept).write(tmp_path / "r.json", {})
    record = sass_record.Record.load(tmp_path / "r.json")
    assert record.of(figures) == figures
    assert record.of(replace(figures, capability=80)) is None
    assert sass_record.Record("0.0", record.figures).of(figures) is None


def test_names_of_variants_are_unique(monkeypatch):
    module = SimpleNamespace(variants=lambda: [toy(add_rows), toy(gather_row)])
    monkeypatch.setattr(sass.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(sass, "KERNELS", ("rope_triton",))
    with pytest.raises(ValueError, match="names of their own, got twice: toy"):
        sass.all_variants()
