"""The screen of ``varlen-sft check``: a row per property, and one per way to compute."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
    if result["routes"]:
        console.print(_routes(result["routes"]))
    failed = [row["property"] for row in result["findings"] if row["verdict"] == "fail"]
    verdict = f"[red bold]{len(failed)} failed[/red bold]" if failed else "packed equals alone"
    console.print(
        f"{verdict}: {result['conversations']} conversations, {result['tokens']:,} tokens, "
        f"{result['seconds']:.0f} s. Computed on this CPU: no GPU path was run.",
        highlight=False,
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2e}"


COLUMNS = ("log-probability", "loss", "gradient", "leakage", "generated")


def _routes(routes: Sequence[Mapping[str, Any]]) -> Table:
    """Errors of each route; of gradients the part of the model that is nearest to its bound."""
    table = Table(title="errors against Hugging Face alone", title_justify="left")
    table.add_column("computed by", ratio=1)
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for route in routes:
        cells = []
        for column in COLUMNS:
            figures = [f for name, f in route["figures"].items() if name.startswith(column)]
            worst = max(figures, key=_share, default=None)
            cells.append("" if worst is None else _cell(worst))
        table.add_row(escape(route["name"]), *cells)
    return table


def _share(figure: Mapping[str, float | None]) -> float:
    """Of the bound, or the error itself where there is none; nan comes first."""
    error, bound = figure["error"] or 0.0, figure["bound"]
    share = error if bound is None else error / bound if bound else math.inf if error else 0.0
    return math.inf if math.isnan(share) else share


def _cell(figure: Mapping[str, float | None]) -> str:
    error, bound = figure["error"], figure["bound"]
    text = _number(error)
    holds = bound is None or error is None or error <= bound
    return text if holds else f"[red bold]{text}[/red bold]"
