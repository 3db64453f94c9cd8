"""What a run says on the screen and writes to its log; on all ranks but the first, nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varlen_sft.train.metrics import JsonLinesLog, LiveLine
from varlen_sft.train.state import StepRecord
from varlen_sft.train.trackers import Tracker, numbers

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Journal"]


class Journal:
    """A context manager that holds the log open.

    Args:
        console: None: this rank says nothing.
        path: of the log, which goes on where it is.
        header: what the run was asked to do; logged when it starts, or goes on.
        share: of the run that is done after a step, for the bar.
        every_s: see ``LiveLine``.
    """

    def __init__(
        self,
        console: Console | None,
        path: Path,
        header: dict[str, Any],
        share: Callable[[StepRecord], float],
        every_s: float,
    ) -> None:
        self._console, self._path, self._header = console, path, header
        self._share, self._every_s = share, every_s
        self._log: JsonLinesLog | None = None
        self._line: LiveLine | None = None
        self._trackers: tuple[Tracker, ...] = ()

    def track(self, trackers: Sequence[Tracker]) -> None:
        """From now on these get the numbers, too; leaving the context closes them."""
        self._trackers = tuple(trackers)

    def say(self, text: str) -> None:
        """A line for people."""
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def event(self, name: str, **facts: Any) -> None:
        """A line of the log; trackers get the loss of a validation."""
        if self._log is not None:
            self._log.write({"event": name, **facts})
        if name == "validation":
            self._track(facts["step"], {"valid/loss": facts["loss"]})

    def step(self, record: StepRecord) -> None:
        """A step is done."""
        if self._log is not None:
            self._log.step(record)
        if self._line is not None:
            self._line.show(record)
        if self._trackers:
            self._track(record.step, numbers(record))

    def _track(self, step: int, values: dict[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, values)

    @contextmanager
    def live(self) -> Iterator[None]:
        """Meanwhile a line renews itself with every step."""
        if self._console is None:
            yield
            return
        with LiveLine(self._console, self._share, every_s=self._every_s) as self._line:
            yield
        self._line = None

    def __enter__(self) -> Journal:
        if self._console is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._log = JsonLinesLog(self._path, self._header, append=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._log is not None:
            self._log.__exit__()
            self._log = None
        trackers, self._trackers = self._trackers, ()
        for tracker in trackers:
            tracker.close(failed=kind is not None)
