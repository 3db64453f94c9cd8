"""``varlen-sft prepare`` and ``merge`` on a screen: progress, then what came of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from varlen_sft.data.load import OnError
from varlen_sft.data.prepare import Prepared, PrepareOptions, Progress, merge, prepare
from varlen_sft.data.prepare_folder import PARTS
from varlen_sft.data.store import file_of
from varlen_sft.data.store_write import REJECTS
from varlen_sft.errors import InputError
from varlen_sft.words import count

if TYPE_CHECKING:
    from rich.console import Console

_STAGES = {"hash": "hashing", "rows": "tokenising", "write": "writing"}
_UNITS = {"hash": "MiB", "rows": "rows", "write": "chunks"}
_LINE_EVERY = 30.0  # seconds between lines in a log
_NOTABLE = {
    "rejected": "rows that cannot be used, left out",
    "untrained": "rows left out since no answer in them is trained, by their weights",
    "overlong_dropped": "over-long rows, left out",
    "overlong_truncated": "over-long rows, truncated",
    "overlong_split": "over-long rows, split",
    "rewritten_turns": "answers whose thinking the template leaves out",
    "straddles_cut": "answers cut from a header that a token would have reached over",
    "spelled_control": "rows whose contents spell control tokens, kept as text",
}


def run(options: PrepareOptions, console: Console) -> None:
    """Prepare and say what came of it."""
    try:
        with progress_on(console) as progress:
            done = prepare(options, progress)
    except InputError as error:
        kept = file_of(options.out, PARTS)
        if error.row is not None and options.on_error == "error" and kept.is_dir():
            _say(console, f"what is finished is kept in {kept}: --on-error skip goes on from it")
        raise
    show(options.out, done, console)


def run_merge(
    out: Path, folders: list[Path], on_error: OnError, force: bool, console: Console
) -> None:
    """Merge and say what came of it."""
    with progress_on(console) as progress:
        done = merge(out, folders, on_error=on_error, force=force, progress=progress)
    show(out, done, console)


def show(out: Path, done: Prepared, console: Console) -> None:
    """Say what a run came to."""
    say = partial(_say, console)
    if done.state == "shard":
        own, made = done.chunks
        say(f"{own} chunks of this shard are finished, {made} of them now: {file_of(out, PARTS)}")
        say(f"when all shards are: varlen-sft merge {out}")
        return
    assert done.manifest is not None
    counts = done.manifest["counts"]
    if done.state == "there":
        say(f"{out} was prepared already, of the same inputs, template and settings: nothing done")
    share = counts["targets"] / max(1, counts["tokens"])
    say(
        f"{out}: {count(counts['samples'], 'sample')}, {count(counts['tokens'], 'token')}, "
        f"{counts['targets']:,} of them targets ({share:.1%}), of {count(counts['rows'], 'row')}"
    )
    for name, text in _NOTABLE.items():
        if counts[name]:
            say(f"  {text}: {counts[name]:,}")
    if done.manifest["rejects"]:
        say(f"  what is left out, and why: {file_of(out, REJECTS)}")
    say("what a reader of it trains:")
    readers = sorted(done.manifest["readers"].items(), key=lambda item: item[0] != "varlen_sft")
    for name, facts in readers:
        say(f"  {name}: {count(facts['targets'], 'target')}, {facts['trains']}")
    say(f"fingerprint {done.fingerprint}")


@contextmanager
def progress_on(console: Console) -> Iterator[Progress]:
    """A bar with rate and time left; in a log, a line now and then."""
    if not console.is_terminal:
        yield _Lines(console)
        return
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                for earlier in tasks.values():
                    bars.update(earlier, visible=False)
                tasks[stage] = bars.add_task(
                    _STAGES[stage], total=total, completed=done, numbers=""
                )
            task = bars.tasks[tasks[stage]]
            text = _numbers(stage, done, total, task.speed or 0.0)
            bars.update(task.id, completed=done, total=total, numbers=text)

        yield progress


class _Lines:
    """Progress for a log."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage = ""
        self._started = self._said = time.monotonic()
        self._first = 0

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._started, self._said, self._first = stage, now, now, done
        if now - self._said < _LINE_EVERY:
            return
        self._said = now
        speed = (done - self._first) / (now - self._started)
        left = (
            "" if not (total and speed) else f", {max(0, total - done) / speed / 60:.0f} min left"
        )
        _say(self._console, f"{_STAGES[stage]} {_numbers(stage, done, total, speed)}{left}")


def _numbers(stage: str, done: int, total: int | None, speed: float) -> str:
    if stage == "hash":
        done, total, speed = done >> 20, total and total >> 20, speed / (1 << 20)
    of = "" if total is None else f" of {total:,}"
    return f"{done:,}{of} {_UNITS[stage]}, {speed:,.0f} {_UNITS[stage]}/s"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
