"""What a run says while it runs: a line a person reads, and a JSON line per step that stays."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from varlen_sft.train.state import StepRecord

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["JsonLinesLog", "LiveLine", "describe"]


def describe(record: StepRecord) -> str:
    """The live line: step, loss, real tokens/s, supervised tokens/s, fill, time left."""
    minutes, seconds = divmod(round(record.seconds_left), 60)
    return (
        f"step {record.step:>4}  loss {record.loss:6.3f}  "
        f"{record.real_tokens_per_s:6,.0f} tok/s  "
        f"{record.supervised_tokens_per_s:6,.0f} supervised tok/s  "
        f"fill {record.fill:6.1%}  {minutes}:{seconds:02} left"
    )


class JsonLinesLog:
    """One JSON object per line, written through at once: a killed run keeps all but its last step.

    Args:
        path: of the file.
        header: the first line, what the run was asked to do.
        append: go on behind what is there, instead of overwriting it.
    """

    def __init__(self, path: str | Path, header: dict[str, Any], *, append: bool = False) -> None:
        torn = append and _is_torn(Path(path))
        self._file: TextIO = open(path, "a" if append else "w", encoding="utf-8")
        if torn:
            self._file.write("\n")
        self.write({"event": "start", **header})

    def write(self, event: dict[str, Any]) -> None:
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()

    def step(self, record: StepRecord) -> None:
        self.write({"event": "step", **asdict(record)})

    def __enter__(self) -> JsonLinesLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _is_torn(path: Path) -> bool:
    """Whether a run was killed within its last line."""
    return path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")


class LiveLine:
    """The newest step on a line that renews itself; on a pipe, a line every few seconds.

    Args:
        console: rich's.
        progress: share of the run that is done after a record, for the bar.
        every_s: seconds between lines where nothing can renew itself.
    """

    def __init__(
        self,
        console: Console,
        progress: Callable[[StepRecord], float],
        *,
        every_s: float = 10.0,
    ) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._console, self._share, self._every_s = console, progress, every_s
        self._printed = -float("inf")
        self._bar = Progress(
            BarColumn(bar_width=24),
            TextColumn("{task.description}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("first step ...", total=1.0)

    def show(self, record: StepRecord) -> None:
        line = describe(record)
        if self._console.is_terminal:
            self._bar.update(self._task, description=line, completed=self._share(record))
        elif time.monotonic() - self._printed >= self._every_s:
            self._printed = time.monotonic()
            self._console.print(line, highlight=False)

    def __enter__(self) -> LiveLine:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
