"""What a rank asks of the stream, and what it gets for each step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from varlen_sft.data.sample import Sample
from varlen_sft.errors import InputError

if TYPE_CHECKING:
    from varlen_sft.data.batch import PackedBatch

__all__ = ["Counts", "Step", "StreamOptions", "counted", "idle", "micro_batches"]


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """How a rank gets its part; nothing of it changes the global batches."""

    rank: int = 0
    ranks: int = 1
    accumulate: int | None = None
    """A, micro-batches of a step on each rank. None: P / ranks, so that each is one pack. Given, a
    micro-batch holds k = P / (ranks x A) packs, and a device has to hold k x T tokens."""
    workers: int = 1
    """Threads that read and collate, more than one for a disk that is waited for; 0 does it when a
    step is asked for, and packs epochs then, too."""
    depth: int | None = None
    """Steps made ahead; two per worker if None."""
    pin: bool | None = None
    """Page-locked memory; None where CUDA is there."""
    pad_to: int | None = None
    pad_multiple: int = 1
    pad_id: int = 0
    """Of ``collate``; also the token of a rank that has nothing to do."""


@dataclass(frozen=True)
class Counts:
    """Of a micro-batch, known where it was made: nobody has to wait for a device. 0 if idle."""

    sequences: int = 0
    tokens: int = 0  # rows, without pads
    supervised: int = 0  # rows with a label
    weight: float = 0.0  # sum of their weights
    squares: int = 0  # sum of the squares of the sequences' lengths: what attention costs


@dataclass(frozen=True, eq=False)
class Step:
    """One step: all its packs, and the micro-batches of this rank."""

    epoch: int
    step: int  # in the epoch
    packs: tuple[np.ndarray, ...]  # of all ranks: int64 ids of samples, see Sources.origin
    batches: tuple[PackedBatch, ...]  # A of them, each of P / (ranks x A) packs
    samples: tuple[np.ndarray, ...]  # of each batch: int64 ids, one per sequence; none if idle
    counts: tuple[Counts, ...]  # of each batch
    last: bool  # of its epoch


def micro_batches(options: StreamOptions, packs_per_step: int, max_tokens: int) -> int:
    """A, checked with all else that a rank asks for.

    Raises:
        InputError: ranks x accumulation that do not divide P, no such rank, a pad_to that a
            micro-batch may not fit.
    """
    ranks, accumulate = options.ranks, options.accumulate
    if min(ranks, 1 if accumulate is None else accumulate) < 1:
        raise InputError(f"ranks and accumulate must be at least 1, are {ranks} and {accumulate}")
    if not 0 <= options.rank < ranks:
        raise InputError(f"rank must be in [0, {ranks}), is {options.rank}")
    if packs_per_step % (ranks * (accumulate or 1)):
        share = f"ranks = {ranks}"
        if accumulate is not None:
            share = f"ranks x accumulate = {ranks} x {accumulate}"
        raise InputError(f"packs_per_step must be a multiple of {share}, is {packs_per_step}")
    accumulate = accumulate or packs_per_step // ranks
    held = packs_per_step // (ranks * accumulate)
    if options.pad_to is not None and options.pad_to < held * max_tokens:
        raise InputError(
            f"pad_to must be at least {held} x max_tokens = {held * max_tokens}, the most in a "
            f"micro-batch of {held} packs, is {options.pad_to}"
        )
    return accumulate


def counted(samples: Sequence[Sample]) -> Counts:
    """Of the samples of a micro-batch."""
    lengths = [len(sample) - 1 for sample in samples]
    weights = [sample.token_weights[1:] for sample in samples]
    return Counts(
        sequences=len(samples),
        tokens=sum(lengths),
        supervised=sum(int(np.count_nonzero(of)) for of in weights),
        weight=float(sum(of.sum(dtype=np.float64) for of in weights)),
        squares=sum(length * length for length in lengths),
    )


def idle(options: StreamOptions) -> Sample:
    """What a rank runs that has nothing to do: one row without a label.

    Where padding makes more of it, up to 128: pads are cut into sequences as long as the longest
    sample, and would be sequences of one token each.
    """
    rows = min(max(options.pad_to or 1, options.pad_multiple), 128)
    ids = np.full(rows + 1, options.pad_id, np.int32)
    return Sample(ids, np.zeros(rows + 1, np.float32), np.zeros(rows + 1, np.uint8))
