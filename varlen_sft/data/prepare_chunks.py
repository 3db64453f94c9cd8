"""Input rows cut to chunks, and the parts of those that have none yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from varlen_sft.data.prepare_inputs import input_rows, row_size
from varlen_sft.data.prepare_parts import part_path, read_header
from varlen_sft.data.prepare_plan import Plan, PrepareOptions, input_states
from varlen_sft.data.prepare_pool import WorkerPool
from varlen_sft.data.prepare_worker import Chunk, Job, Outcome
from varlen_sft.errors import InputError, RunError


@dataclass
class Counted:
    """How many chunks there are, of all shards; of this one; and that were not made already."""

    chunks: int = 0
    own: int = 0
    made: int = 0


def make_parts(
    options: PrepareOptions, plan: Plan, folder: Path, progress: Callable[[int], None]
) -> Counted:
    """Make the parts that are missing, in parallel.

    Args:
        progress: told the rows done.

    Raises:
        InputError: for the first row, in order, that cannot be used.
        RunError: a worker died, a part cannot be written, an input was changed meanwhile.
    """
    missing = _Missing(options, plan, folder)
    with WorkerPool(_job(options, plan, folder), options.workers) as pool:
        for outcome in pool.outcomes(missing):
            missing.note(outcome)
            progress(missing.rows_done)
    progress(missing.rows_done)
    if missing.failed:
        raise missing.failed[min(missing.failed)]
    if input_states(options) != plan.states:
        raise RunError("an input was changed while it was read: run the same again")
    return missing.counted


def own_rows(plan: Plan, options: PrepareOptions) -> int | None:
    """Rows that are this shard's, about; all of them without shards, None where nobody knows."""
    if plan.rows is None or options.shard is None:
        return plan.rows
    return -(-plan.rows // options.shard[1])


class _Missing(Iterator[Chunk]):
    """The chunks of this shard that have no part, up to the first that failed."""

    def __init__(self, options: PrepareOptions, plan: Plan, folder: Path) -> None:
        self.counted, self.rows_done = Counted(), 0
        self.failed: dict[int, InputError] = {}
        self._options, self._work, self._folder = options, plan.work, folder
        self._chunks = _chunks(options, plan)
        self._sizes: dict[int, int] = {}  # rows of the chunks that are worked on

    def __next__(self) -> Chunk:
        # Chunks are dealt in order, so all before one that failed were dealt before it.
        while not self.failed:
            try:
                chunk = next(self._chunks)
            except InputError as error:  # the source is damaged from here on
                self.failed[self.counted.chunks] = error
                break
            self.counted.chunks += 1
            if not self._is_ours(chunk.number):
                continue
            self.counted.own += 1
            if self._is_finished(chunk.number):
                self.rows_done += len(chunk.rows)
                continue
            self.counted.made += 1
            self._sizes[chunk.number] = len(chunk.rows)
            return chunk
        raise StopIteration

    def note(self, outcome: Outcome) -> None:
        """Take what became of a chunk; RunError if the machine failed it."""
        self.rows_done += self._sizes.pop(outcome.chunk)
        if outcome.failure is not None:
            raise RunError(outcome.failure)
        if outcome.bad_input is not None:
            reason, file, row = outcome.bad_input
            self.failed[outcome.chunk] = InputError(reason, file=file, row=row)

    def _is_ours(self, chunk: int) -> bool:
        first, step = self._options.shard or (1, 1)
        return chunk % step == first - 1

    def _is_finished(self, chunk: int) -> bool:
        header = read_header(part_path(self._folder, chunk), self._work)
        if header is None:
            return False
        return self._options.on_error == "skip" or not header["counts"]["rejected"]


def _job(options: PrepareOptions, plan: Plan, folder: Path) -> Job:
    return Job(
        options.model,
        options.template,
        options.policy,
        options.sample_processor,
        options.mask_token_ids,
        options.layout,
        folder,
        plan.work,
    )


def _chunks(options: PrepareOptions, plan: Plan) -> Iterator[Chunk]:
    number, (most, largest) = 0, plan.chunk
    for place, source in enumerate(options.sources):
        taken: list[tuple[int, Any]] = []
        size = 0
        for row in input_rows(source):
            taken.append(row)
            size += row_size(row[1])
            if len(taken) == most or size >= largest:
                yield Chunk(number, place, source, taken)
                number, taken, size = number + 1, [], 0
        if taken:
            yield Chunk(number, place, source, taken)
            number += 1
