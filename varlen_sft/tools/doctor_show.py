"""The screen of ``varlen-sft doctor``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from varlen_sft.tools.pack_picture import visible

__all__ = ["environment_screen", "screen", "working"]

STYLES = {"pass": "green", "fail": "red bold", "note": ""}


@contextmanager
def working(console: Console) -> Iterator[Callable[[str], None]]:
    """A bar for work of unknown length; takes what is being done, and is gone when it is done."""
    columns = (
        BarColumn(bar_width=24),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
    )
    hidden = not console.is_terminal  # it would leave an empty line in a file
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("", total=None)
        yield lambda text: progress.update(task, description=text)


def screen(console: Console, report: Mapping[str, Any]) -> None:
    """A row per question, what is strange in the data, and one line that says it all."""
    _questions(console, f"template: {report['template']}", report["findings"])
    if data := report.get("data"):
        _questions(console, f"data: {data['file']}", data["findings"])
        _refused(console, data["refused"])
        _strange(console, data["strange"])
    failed = [f for part in (report, data or {}) for f in part.get("findings", ()) if _fails(f)]
    verdict = Text(f"{len(failed)} failed", "red bold") if failed else Text("nothing failed")
    console.print(Text.assemble(verdict, f", {report['seconds']:.1f} s"))


def _fails(finding: Mapping[str, str]) -> bool:
    return finding["verdict"] == "fail"


def _table(title: str, *columns: tuple[str, Mapping[str, Any]]) -> Table:
    table = Table(title=Text(title), title_justify="left", caption_justify="left")
    for name, style in columns:
        table.add_column(name, **style)
    return table


def _questions(console: Console, title: str, findings: Sequence[Mapping[str, str]]) -> None:
    table = _table(title, ("question", {"ratio": 3}), ("", {"no_wrap": True}),
                   ("evidence", {"ratio": 7}))  # fmt: skip
    for one in findings:
        verdict = Text(one["verdict"].upper() if _fails(one) else one["verdict"])
        verdict.stylize(STYLES[one["verdict"]])
        table.add_row(Text(one["question"]), verdict, _plain(one["evidence"]))
    console.print(table)


def _refused(console: Console, refused: Sequence[Mapping[str, Any]]) -> None:
    if not refused:
        return
    table = _table("refused rows", ("rows", {"justify": "right"}), ("first", {"ratio": 2}),
                   ("reason", {"ratio": 8}))  # fmt: skip
    for one in refused:
        first = ", ".join(map(str, one["rows"])) + ", ..." * (one["count"] > len(one["rows"]))
        table.add_row(f"{one['count']:,}", first, _plain(one["reason"]))
    console.print(table)


def _strange(console: Console, strange: Sequence[Mapping[str, Any]]) -> None:
    if not strange:
        return
    right = {"justify": "right", "no_wrap": True}
    table = _table("strangest rows", ("row", right), ("score", right), ("why", {"ratio": 1}))
    for one in strange:
        table.add_row(str(one["row"]), f"{one['score']:.1f}", _plain("; ".join(one["reasons"])))
    console.print(table)


def _plain(text: str) -> Text:
    """Text of a template or a row: no markup, nothing that moves the cursor."""
    lines = (visible(line).replace("\u00b7", " ") for line in text.split("\n"))
    return Text("\n".join(lines))


def environment_screen(console: Console, environment: Mapping[str, Any]) -> None:
    """Versions, and for each device and op what would be picked, and why not the others."""
    versions = [f"{name} {version}" for name, version in environment["versions"].items()]
    console.print(Text(", ".join(versions)))
    console.print(Text(f"C++ extension: {environment['extension']}"))
    console.print("Of each op the first that can run on the device is picked, unless impl says so.")
    for device, name in environment["devices"].items():
        table = _table(f"{device} ({name})", ("op", {"no_wrap": True}),
                       ("implementation", {"no_wrap": True}), ("", {"ratio": 1}))  # fmt: skip
        for op, candidates in environment["backends"][device].items():
            for number, (implementation, word) in enumerate(candidates):
                picked = word.startswith("picked")
                style = "green" if picked else ""
                table.add_row(
                    Text("" if number else op), Text(implementation, style), Text(word, style)
                )
        console.print(table)
