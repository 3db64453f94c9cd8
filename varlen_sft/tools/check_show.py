"""The screen of ``varlen-sft check``: a row per property."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

MARKS = {"pass": "[green]pass[/green]", "fail": "[red bold]FAIL[/red bold]", "note": "note"}


def screen(console: Console, result: Mapping[str, Any]) -> None:
    """Property, worst error, bound, verdict; then one line that says it all."""
    table = Table(title=f"{escape(result['model'])} in {result['dtype']}", title_justify="left")
    table.add_column("property", ratio=5)
    table.add_column("worst", justify="right", no_wrap=True)
    table.add_column("bound", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("detail", ratio=5)
    for row in result["findings"]:
        table.add_row(
            row["property"],
            _number(row["worst"]),
            _number(row["bound"]),
            MARKS[row["verdict"]],
            escape(row["detail"]),
        )
    console.print(table)
    failed = [row["property"] for row in result["findings"] if row["verdict"] == "fail"]
    verdict = f"[red bold]{len(failed)} failed[/red bold]" if failed else "packed equals alone"
    console.print(
        f"{verdict}: {result['conversations']} conversations, {result['tokens']:,} tokens, "
        f"{result['seconds']:.0f} s. Computed on this CPU: no GPU path was run.",
        highlight=False,
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"
