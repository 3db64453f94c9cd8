"""Several streams one after the other, each from its first training step on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from varlen_sft.data.batch import PackedBatch
from varlen_sft.data.stream import Counts, PackStream, Step
from varlen_sft.errors import InputError
from varlen_sft.ops.sequences import sequences_from_lengths
from varlen_sft.reference import position_ids_from_lengths

__all__ = ["JoinedStream", "StagedStream", "as_one_document"]

VERSION = 1


class StagedStream:
    """The steps of one stream, and from a step on those of the next. The last one goes on.

    Args:
        streams: one per stage, none of which has begun.
        starts: the step of the run, counted from 1, with which each begins; the first is 1.

    Raises:
        ValueError: starts that do not rise from 1, or not one per stream.
    """

    def __init__(self, streams: Sequence[PackStream], starts: Sequence[int]) -> None:
        rise = all(a < b for a, b in zip(starts, starts[1:], strict=False))
        if len(starts) != len(streams) or not starts or starts[0] != 1 or not rise:
            raise ValueError(
                f"starts must rise from 1, one for each of {len(streams)} streams, got {starts}"
            )
        self.streams, self.starts = list(streams), list(starts)
        self._given = 0  # steps

    @property
    def stage(self) -> int:
        """Of the step that comes next, from 0."""
        return sum(start <= self._given + 1 for start in self.starts) - 1

    @property
    def current(self) -> PackStream:
        """The stream of the step that comes next."""
        return self.streams[self.stage]

    def __iter__(self) -> Iterator[Step]:
        """Steps from the position on, see ``PackStream.__iter__``."""
        while True:
            stage = self.stage
            ends = [*self.starts, None][stage + 1]
            begun: Any = iter(self.streams[stage])
            with closing(begun) as steps:  # ends the threads that read ahead
                for step in steps:
                    self._given += 1
                    yield step
                    if self._given + 1 == ends:
                        break

    def state_dict(self) -> dict[str, Any]:
        """Small JSON, the same on all ranks."""
        return {
            "version": VERSION,
            "starts": self.starts,
            "given": self._given,
            "stream": self.current.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken. A stage that has not begun may begin at another step.

        Raises:
            InputError: it is no state of stages, or of other ones.
        """
        given, starts = state.get("given"), state.get("starts")
        if state.get("version") != VERSION or type(given) is not int or given < 0:
            raise InputError("the stages' state must be what state_dict() gave")
        before = [start for start in starts or [] if start <= given + 1]
        if before != [start for start in self.starts if start <= given + 1]:
            raise InputError(f"after step {given} the stages began at {before}, now {self.starts}")
        self._given = given
        self.current.load_state_dict(state["stream"])


class JoinedStream(PackStream):
    """Packs as one document each, as training without isolation sees them; for comparison."""

    def __reduce__(self) -> tuple[Any, ...]:
        _, *others = super().__reduce__()
        return JoinedStream, *others

    def _batch(self, ids: Any) -> tuple[PackedBatch, Counts]:
        batch, counts = super()._batch(ids)
        return as_one_document(batch), replace(counts, squares=counts.tokens**2)


def as_one_document(batch: PackedBatch) -> PackedBatch:
    """The pack without its edges: one sequence, positions from 0 to its end.

    Labels stay: still no row learns the first token of another sample. The pad tail keeps its own
    sequences, which may be longer now.
    """
    tail = [batch.pad_tokens] * (batch.pad_tokens > 0)
    lengths = [batch.real_tokens, *tail]
    sequences = sequences_from_lengths(lengths)
    return replace(
        batch,
        position_ids=position_ids_from_lengths(lengths),
        cu_seqlens=sequences.cu_seqlens,
        max_seqlen=sequences.max_seqlen,
        num_sequences=sequences.num_sequences,
    )
