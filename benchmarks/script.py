"""What the scripts with a table share: their options, and how they end."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

__all__ = ["console", "finish", "goal", "measured", "parser"]


def parser(text: str, script: str) -> argparse.ArgumentParser:
    """With ``--json``, which is ``results/NAME.json`` beside the script if not given."""
    made = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    results = Path(script).parent / "results" / f"{Path(script).stem}.json"
    made.add_argument("--json", type=Path, default=results, help="all figures, in a file")
    return made


def console() -> Console:
    """As wide as the terminal, 110 columns in a file."""
    return Console(width=None if sys.stdout.isatty() else 110)


def goal(met: bool, text: str) -> str:
    """A line for what was promised."""
    return f"{'met' if met else 'NOT MET'}: {text}"


def measured(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it gives, its seconds, and its peak memory beyond what is resident now, in MiB."""
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    start = time.perf_counter()
    found = run()
    seconds = time.perf_counter() - start
    return found, seconds, (_resident("VmHWM") - before) / 2**20


def _resident(field: str) -> int:
    """Bytes, of this process alone."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def finish(
    shown: Console, path: Path, environment: Mapping[str, Any], results: Mapping[str, Any]
) -> int:
    """Print what it was measured on, write the file, whole or not at all; 0."""
    from varlen_sft.data.files import write_whole
    from varlen_sft.tools.step_table import stamp

    shown.print(stamp(environment), highlight=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"environment": environment} | dict(results), indent=1) + "\n"
    write_whole(path, content.encode())
    return 0
