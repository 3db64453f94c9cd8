"""What a run says while it runs: a line a person reads, and a JSON line per step that stays."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from varlen_sft.errors import RunError
from varlen_sft.train.state import StepRecord

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["JsonLinesLog", "LiveLine", "describe", "facts"]

_BAR = 8


def facts(record: StepRecord) -> list[str]:
    """What a person wants to know of a step, the first things first; what is not known is left out.

    Losses of roles and of stop tokens, TFLOP/s of all ranks with their MFU, the share of the step
    in which the loader was waited for, and the memory at the peak.
    """
    told = [f"step {record.step:>4}", f"{_clock(record.seconds_left)} left"]
    told.append(f"loss {record.loss:6.3f}")
    told += [f"{role} {loss:6.3f}" for role, loss in record.role_loss.items()]
    if record.stop_loss is not None:
        told.append(f"stop {record.stop_loss:6.3f}")
    told.append(f"{record.real_tokens_per_s:6,.0f} tok/s")
    told.append(f"{record.supervised_tokens_per_s:6,.0f} supervised/s")
    told.append(f"fill {record.fill:.1%}")
    if record.tflops is not None:
        mfu = "" if record.mfu is None else f" ({record.mfu:.1%} MFU)"
        told.append(f"{record.tflops:.4g} TFLOP/s{mfu}")
    told.append(f"stall {record.stall:.1%}")
    if record.peak_memory:
        told.append(f"{record.peak_memory / 1e9:.1f} GB")
    return told


def describe(record: StepRecord, width: int | None = None) -> str:
    """The facts of a step on one line, or on as few as have no more than ``width`` characters."""
    lines: list[str] = []
    for fact in facts(record):
        if lines and (width is None or len(lines[-1]) + 2 + len(fact) <= width):
            lines[-1] += f"  {fact}"
        else:
            lines.append(fact)
    return "\n".join(lines)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class JsonLinesLog:
    """One JSON object per line, written through at once: a killed run keeps all but its last step.

    Args:
        path: of the file.
        header: the first line, what the run was asked to do.
        append: go on behind what is there, instead of overwriting it.

    Raises:
        RunError: the disk is full, when a line is written.
    """

    def __init__(self, path: str | Path, header: dict[str, Any], *, append: bool = False) -> None:
        torn = append and _is_torn(Path(path))
        # Without a buffer, in which a line that did not fit the disk would stay until the end.
        self._path, self._file = path, FileIO(path, "a" if append else "w")
        if torn:
            self._put(b"\n")
        self.write({"event": "start", **header})

    def write(self, event: dict[str, Any]) -> None:
        self._put(json.dumps(event).encode() + b"\n")

    def _put(self, line: bytes) -> None:
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise RunError(f"{self._path} cannot be written: {error.strerror}") from error

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
    """The newest step on lines that renew themselves; on a pipe, a line every few seconds.

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
        from rich.table import Column

        self._console, self._share, self._every_s = console, progress, every_s
        self._printed = -float("inf")
        self._bar = Progress(
            BarColumn(bar_width=_BAR),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("first step ...", total=1.0)

    def show(self, record: StepRecord) -> None:
        if self._console.is_terminal:
            lines = describe(record, self._console.width - _BAR - 1)
            self._bar.update(self._task, description=lines, completed=self._share(record))
        elif time.monotonic() - self._printed >= self._every_s:
            self._printed = time.monotonic()
            self._console.print(describe(record), highlight=False, soft_wrap=True)

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
