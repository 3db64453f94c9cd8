"""A process that turns chunks of input rows to parts: tokenizers and Jinja, no torch.

``prepare_pool`` starts it as a program of its own, so that it imports nothing that the program
which started it happens to have imported. It ends when the other side of its connection does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.json_rows import parse_line
from varlen_sft.data.load import Policy, tokenize_rows
from varlen_sft.data.prepare_parts import part_path, write_part
from varlen_sft.data.sample import Sample
from varlen_sft.data.sources import Source, load_processor, parse_rows
from varlen_sft.data.tally import LoadCounts
from varlen_sft.errors import InputError

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h

TEMPLATE_COUNTS = ("straddles_cut", "rewritten_turns", "spelled_control")
"""Of ``ChatTokenizer.counts``."""


@dataclass(frozen=True)
class Job:
    """What all chunks have in common."""

    model: Path
    template: Path | None
    policy: Policy
    sample_processor: str | None
    mask_token_ids: tuple[int, ...]
    layout: str
    folder: Path  # of the parts
    work: str  # see prepare_plan.Plan


@dataclass(frozen=True)
class Chunk:
    """Input rows that follow one another in one source; a row of JSON lines is bytes."""

    number: int
    source: int  # its place among the inputs
    name: Source
    rows: list[tuple[int, Any]]


@dataclass(frozen=True)
class Outcome:
    """What became of a chunk: the header of its part, or why there is none."""

    chunk: int
    header: dict[str, Any] | None = None
    bad_input: tuple[str, str | None, int | None] | None = None  # arguments of InputError
    failure: str | None = None  # of the machine


class _LeftOut:
    """Rows that are in no sample, and why; the first of them that cannot be used."""

    def __init__(self) -> None:
        self.rows: list[list[Any]] = []
        self.first_rejected: list[Any] | None = None

    def add(self, row: int, reason: str, rejected: int) -> None:
        self.rows.append([row, reason])
        if rejected and self.first_rejected is None:  # a row is counted, then told
            self.first_rejected = [row, reason]


class Worker:
    """Makes parts."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._tokenizer = ChatTokenizer.from_folder(job.model, job.template)
        name = job.sample_processor
        self._processor = None if name is None else load_processor(name)
        _give_back_memory()

    def make(self, chunk: Chunk) -> dict[str, Any]:
        """Write the part of a chunk and return its header.

        Raises:
            InputError: a row cannot be used.
            OSError: the part cannot be written.
        """
        counts, left_out = LoadCounts(), _LeftOut()
        self._tokenizer.counts.clear()
        parsed = ((n, parse_line(r) if isinstance(r, bytes) else r) for n, r in chunk.rows)
        rows = parse_rows(chunk.name, parsed, self._processor, self._job.mask_token_ids)
        samples: list[Sample] = []
        for number, made in tokenize_rows(
            str(chunk.name),
            rows,
            self._tokenizer,
            self._job.policy,
            counts,
            lambda row, reason: left_out.add(row, reason, counts.rejected),
        ):
            if self._job.layout == "tokens+mask":
                _check_mask(str(chunk.name), number, made)
            samples += made
        header = {
            "work": self._job.work,
            "chunk": chunk.number,
            "source": chunk.source,
            "counts": flat_counts(counts) | {n: self._tokenizer.counts[n] for n in TEMPLATE_COUNTS},
            "left_out": left_out.rows,
            "first_rejected": left_out.first_rejected,
        }
        write_part(part_path(self._job.folder, chunk.number), header, samples)
        _give_back_memory()
        return header


def flat_counts(counts: LoadCounts) -> dict[str, int]:
    """All counts as numbers, those of over-long rows with ``overlong_`` before their names."""
    flat = asdict(counts)
    overlong = flat.pop("overlong")
    rows = overlong.pop("rows")
    overlong |= {outcome: len(numbers) for outcome, numbers in rows.items()}
    return flat | {f"overlong_{name}": value for name, value in overlong.items()}


def _give_back_memory() -> None:
    """Of glibc, the pages that loading, or a chunk, left empty; another libc does as it does."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _check_mask(file: str, row: int, samples: tuple[Sample, ...]) -> None:
    for sample in samples:
        bad = (sample.token_weights != 0) & (sample.token_weights != 1)
        if bad.any():
            raise InputError(
                "the layout tokens+mask holds weights of 0 and 1 only, a token weighs "
                f"{sample.token_weights[int(bad.argmax())]:g}: take the layout sidecar",
                file=file,
                row=row,
            )


def serve(connection: Connection) -> None:
    """Answer a Job, then Chunks with Outcomes, until the other side is gone."""
    worker: Worker | None = None
    job: Job = connection.recv()
    for chunk in _received(connection):
        try:
            worker = worker or Worker(job)
            outcome = Outcome(chunk.number, worker.make(chunk))
        except InputError as error:
            outcome = Outcome(chunk.number, bad_input=(error.reason, error.file, error.row))
        except OSError as error:
            outcome = Outcome(chunk.number, failure=f"{job.folder}: cannot be written: {error}")
        connection.send(outcome)


def _received(connection: Connection) -> Iterator[Chunk]:
    while True:
        yield connection.recv()


def _die_with(parent: int) -> None:
    """End when the process that started this one is killed, on Linux; elsewhere after the chunk."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was killed before
            sys.exit()


def main() -> None:
    """Serve the connection whose descriptor is the first argument, of the process in the second."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the other side ends us
    _die_with(int(sys.argv[2]))
    try:
        serve(Connection(int(sys.argv[1])))
    except (EOFError, ConnectionError):
        pass
