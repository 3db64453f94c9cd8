"""Section of bench_train: what it takes to start, in fresh processes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from op_groups import Goal
from rich.table import Table

from varlen_sft.errors import RunError

IMPORT_MS, HELP_S = 100.0, 0.4  # promised, at most
PACKAGE, NAMES, HELP = "import varlen_sft", "and all its public names", "varlen-sft --help"
TORCH = "import torch, numpy"

_TIMED = """
import time
start = time.perf_counter()
import numpy, torch
torch_s = time.perf_counter() - start
import varlen_sft
package_s = time.perf_counter() - start - torch_s
for name in varlen_sft.__all__:
    getattr(varlen_sft, name)
print(torch_s, package_s, time.perf_counter() - start - torch_s)
"""


def imports() -> dict[str, float]:
    """Seconds of one fresh process: torch, then what comes on top of it."""
    told = _output([sys.executable, "-c", _TIMED])
    return dict(zip((TORCH, PACKAGE, NAMES), map(float, told.split()), strict=True))


def first_help() -> dict[str, float]:
    """Seconds from the start of the command to its end."""
    command = Path(sys.executable).with_name("varlen-sft")
    if not command.exists():
        raise RunError(f"the command varlen-sft must be beside {command.parent.name}/python")
    start = time.perf_counter()
    _output([str(command), "--help"])
    return {HELP: time.perf_counter() - start}


def _output(words: Sequence[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{words[-1]!r} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


def measure_start(processes: int) -> dict[str, Any]:
    """Seconds of each, so many times, after one round that fills the caches of files."""
    seconds: dict[str, list[float]] = {}
    kinds: tuple[Callable[[], dict[str, float]], ...] = (imports, first_help)
    for turn in range(processes + 1):
        for kind in kinds:
            for name, value in kind().items():
                if turn:
                    seconds.setdefault(name, []).append(value)
    rows = {name: {"median": statistics.median(of), "seconds": of} for name, of in seconds.items()}
    return {"processes": processes, "rows": rows}


def table_of_start(found: dict[str, Any]) -> Table:
    table = Table(
        "what", title=f"Starting, medians of {found['processes']} fresh processes",
    )  # fmt: skip
    for column in ("ms", "min", "max"):
        table.add_column(column, justify="right")
    for name, row in found["rows"].items():
        each = row["seconds"]
        table.add_row(name, *(f"{1e3 * v:.1f}" for v in (row["median"], min(each), max(each))))
    return table


def goals_of_start(found: dict[str, Any]) -> list[Goal]:
    rows = found["rows"]
    return [
        Goal(f"{PACKAGE} on top of torch, ms", 1e3 * rows[PACKAGE]["median"], IMPORT_MS),
        Goal(f"{PACKAGE} {NAMES}, ms", 1e3 * rows[NAMES]["median"], IMPORT_MS),
        Goal(f"{HELP}, s", rows[HELP]["median"], HELP_S),
    ]
