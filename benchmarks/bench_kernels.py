"""Machine code of every Triton kernel on three GPUs, read without any of them: the record."""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from varlen_sft.tools import sass
from varlen_sft.tools.sass import CAPABILITIES, Figures
from varlen_sft.tools.sass_record import Record, problems

HELP = """\
Compiles every Triton kernel ahead of time, in every row of its launch table, for A100 (sm_80),
H100 (sm_90) and B200 (sm_100), reads what ptxas made of it, and writes the record that
tests/test_sass.py holds later changes against: registers, shared memory and instructions must not
grow. Run it after a change that is worth what it costs, and commit the record with the change.

Columns hold one number per GPU, or one for all:

  registers     per thread
  shared        bytes per program
  instructions  of the whole kernel, hot path or not
  fma           fused multiply-adds; the "hf" numerics must have none
  mufu          exp2, reciprocals and other special functions
  bar           barriers
  width         bits of one access: nine tenths of the hot path's bytes travel so wide or wider
  spills        stores and loads of registers that did not fit; none is let pass
"""
RESULTS = Path(__file__).parent / "results" / "kernels.json"
NOTE = "Counts from machine code, not times. No kernel ran."


def render(figures: list[Figures]) -> Table:
    """One line per variant, the three targets beside each other."""
    targets = ", ".join(f"sm_{capability}" for capability in CAPABILITIES)
    table = Table(title=f"Triton kernels on {targets}", caption=NOTE, caption_justify="left")
    table.add_column("kernel")
    columns = ("registers", "shared", "instructions", "fma", "mufu", "bar", "width", "spills")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    fields = ("registers", "shared_bytes", "instructions", "fused", "mufu", "barriers", "hot_width")
    previous = ""
    for name, group in groupby(figures, lambda f: f.name):
        targets_of = list(group)
        if previous and previous.split()[0] != name.split()[0]:
            table.add_section()
        previous = name
        spills = each(f.spill_stores + f.spill_loads for f in targets_of)
        table.add_row(name, *(each(getattr(f, x) for f in targets_of) for x in fields), spills)
    return table


def each(values: Any) -> str:
    """ "32" when all are 32, else "32 40 38"."""
    words = [str(value) for value in values]
    return words[0] if len(set(words)) == 1 else " ".join(words)


def compile_with_bar() -> list[Figures]:
    variants = sass.all_variants()
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # On stderr, so that a table in a file is a table.
    with Progress(
        *columns, TextColumn("{task.description}"), console=Console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task("", total=len(variants) * len(CAPABILITIES))
        return sass.compile_all(
            variants, progress=lambda text: bar.update(task, description=text, advance=1)
        )


def changes(figures: list[Figures], before: Record) -> list[str]:
    """What the new record says that the old did not, in words."""
    told = []
    for now in figures:
        old = before.of(now)
        for count in sass.GUARDED if old else ():
            a, b = getattr(old, count), getattr(now, count)
            if a != b:
                told.append(f"{now.name}, {now.target}: {count} {a} -> {b}")
    return told


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=HELP, formatter_class=formatter)
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE",
                        help="default: results/kernels.json beside this script")  # fmt: skip
    args = parser.parse_args()
    from varlen_sft.tools.environment import environment

    figures = compile_with_bar()
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(render(figures))
    variants = {variant.name: variant for variant in sass.all_variants()}
    found = [text for f in figures for text in problems(f, variants[f.name], None)]
    for problem in found:
        console.print(f"[red]{problem}[/red]", highlight=False)
    if args.json.exists():
        for change in changes(figures, Record.load(args.json)):
            console.print(change, highlight=False)
    facts = environment()
    versions = {"varlen-sft": version("varlen-sft"), "triton": version("triton")}
    stamp = {"note": NOTE, "versions": versions, "commit": facts["commit"], "date": facts["date"]}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    Record(versions["triton"], {(f.name, f.capability): f for f in figures}).write(args.json, stamp)
    text = ", ".join(f"{name} {number}" for name, number in versions.items())
    console.print(f"{NOTE} {text}; commit {facts['commit'] or 'unknown'}", highlight=False)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
