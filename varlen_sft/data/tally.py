"""What became of the rows of a source: counts, and a file of what was left out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from varlen_sft.data.overlong import OverlongCounts
from varlen_sft.errors import InputError


@dataclass
class LoadCounts:
    """What became of the rows so far.

    Args:
        rows: read.
        samples: made of them.
        tokens: in the samples.
        targets: tokens of the samples that are trained.
        checked: rows that were cross-checked.
        rejected: rows that cannot be used.
        disagreements: those of the rejected that the cross-check found.
        untrained: rows without a sample because no answer in them is trained, by their weights.
        overlong: rows that were too long.
    """

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    targets: int = 0
    checked: int = 0
    rejected: int = 0
    disagreements: int = 0
    untrained: int = 0
    overlong: OverlongCounts = field(default_factory=OverlongCounts)


@contextmanager
def rejects_file(
    source: str, path: str | os.PathLike[str] | None
) -> Iterator[Callable[[int, str], None]]:
    """A function that notes a row and the reason why it, or a part of it, is in no sample.

    The file, JSON lines of file, row and reason, appears when the block has ended, and not at all
    if it ended with an error. Without a path nothing is written.

    Raises:
        InputError: it cannot be written.
    """
    if path is None:
        yield lambda number, reason: None
        return
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        file = part.open("w", encoding="utf-8", errors="backslashreplace", newline="\n")
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", file=path) from None

    def left_out(number: int, reason: str) -> None:
        line = {"file": source, "row": number, "reason": reason}
        file.write(json.dumps(line, ensure_ascii=False) + "\n")

    try:
        with file:
            yield left_out
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
