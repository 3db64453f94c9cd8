"""Bytes that RoPE and the loss head move on a GPU, ours beside Liger's, counted without one."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

if TYPE_CHECKING:
    from traffic_cases import Row

HELP = """\
Counts the bytes that each Triton kernel asks memory for, and those of the torch ops that its
wrapper runs around it, and divides them by the least that the task allows. Kernels run in Triton's
interpreter on the CPU, so the counts are exact, need no GPU, and are no times.

  kernel    active lanes x element size of every load and store
  sectors   32-byte sectors that those touch: what a strided or unaligned view costs
  copies    what torch reads and writes around the kernel: contiguous(), clone(), zeros(), sums
  gemms     operands and results of the matrix products, each once
  x least   all of these but sectors, over reading what is needed once and writing results once
"""
RESULTS = Path(__file__).parent / "results" / "traffic.json"
GREEN = 1.1
NOTE = "Counts of bytes from the interpreter, not times. Nothing here was measured on a GPU."


def render(rows: list[Row]) -> Table:
    """Ours and Liger's of each case beside each other."""
    table = Table(title=f"MB moved. {NOTE}", caption=caption(), caption_justify="left")
    for name in ("op", "case", "who"):
        table.add_column(name, no_wrap=True)
    for name in ("kernel", "sectors", "copies", "gemms", "least", "x least"):
        table.add_column(name, justify="right", no_wrap=True)
    shown = ("", "")
    for r in rows:
        names = ("", "") if (r.op, r.case) == shown else (r.op, r.case)
        megabytes = (f"{x / 1e6:.3f}" for x in (r.kernel, r.sectors, r.copies, r.gemms, r.least))
        ratio = f"[{'green' if r.times_least < GREEN else 'red'}]{r.times_least:.2f}x[/]"
        table.add_row(*names, r.who, *megabytes, ratio, end_section=r.who == "Liger")
        shown = (r.op, r.case)
    return table


def caption() -> str:
    import traffic_cases as c

    return "\n".join(
        (
            f"RoPE: {c.TOKENS} tokens, H = {c.HEADS}, K = {c.KV_HEADS}, D = {c.HEAD_DIM}, fp16.",
            *(f"  {name}: {text}" for name, text in c.LAYOUTS.items()),
            f"Cross-entropy: {c.ROWS} rows, {c.SUPERVISED} supervised, V = {c.VOCABULARY}, bf16, "
            "forward and backward.",
            f"Linear cross-entropy: C = {c.HIDDEN}, V = {c.VOCABULARY}, bf16, forward and "
            "backward; Liger's branches for CUDA.",
        )
    )


def stamp() -> dict[str, Any]:
    """Versions, commit, date."""
    from varlen_sft.tools.environment import environment

    facts = environment()
    packages = ("varlen-sft", "torch", "triton", "liger-kernel")
    return {
        "note": NOTE,
        "versions": {name: version(name) for name in packages},
        "commit": facts["commit"],
        "date": facts["date"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=RESULTS,
        metavar="FILE",
        help="default: results/traffic.json beside this script",
    )
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") != "1":  # Triton asks when a kernel is imported
        interpreted = os.environ | {"TRITON_INTERPRET": "1"}
        os.execve(sys.executable, [sys.executable, *sys.argv], interpreted)
    if find_spec("liger_kernel") is None:
        sys.exit("Ours stands beside Liger's here: pip install liger-kernel")
    import torch
    import traffic_cases

    torch.manual_seed(0)
    rows: list[Row] = []
    bar = Console(stderr=True)  # so that a table in a file is a table
    for case in track(traffic_cases.cases(), "counting bytes", console=bar, transient=True):
        rows += case()
    facts = stamp()
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(render(rows))
    versions = ", ".join(f"{name} {text}" for name, text in facts["versions"].items())
    console.print(f"{versions}; commit {facts['commit'] or 'unknown'}", highlight=False)
    content = facts | {"rows": [asdict(r) | {"times_least": r.times_least} for r in rows]}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
