"""The stream of a run: steps of packs, the same global batches on any number of ranks.

``Order`` says which samples are which step; here a rank finds its part of each step, reads the
samples and collates them ahead of the trainer. The state is a position in the order, so a run goes
on from it with other ranks, workers or accumulation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from varlen_sft.data.balance import deal
from varlen_sft.data.order import Order, OrderedStep, OrderOptions
from varlen_sft.data.prefetch import Prefetch, Stall
from varlen_sft.data.sample import Sample
from varlen_sft.data.stream_sources import Source, Sources
from varlen_sft.data.stream_state import Position, differences, read_state, write_state
from varlen_sft.errors import InputError

if TYPE_CHECKING:
    from varlen_sft.data.batch import PackedBatch

__all__ = ["OrderOptions", "PackStream", "Source", "Step", "StreamOptions"]

_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """How a rank gets its part; nothing of it changes the global batches."""

    rank: int = 0
    ranks: int = 1
    accumulate: int = 1
    """A, micro-batches of a step on each rank."""
    workers: int = 1
    """Threads that read and collate, more than one for a disk that is waited for; 0 does it when a
    step is asked for."""
    depth: int | None = None
    """Steps made ahead; two per worker if None."""
    pin: bool | None = None
    """Page-locked memory; None where CUDA is there."""
    pad_to: int | None = None
    pad_multiple: int = 1
    pad_id: int = 0
    """Of ``collate``; also the token of a rank that has nothing to do."""


@dataclass(frozen=True, eq=False)
class Step:
    """One step: all its packs, and the micro-batches of this rank."""

    epoch: int
    step: int  # in the epoch
    packs: tuple[np.ndarray, ...]  # of all ranks: int64 ids of samples, see Sources.origin
    batches: tuple[PackedBatch, ...]  # A of them, each of P / (ranks x A) packs
    samples: tuple[np.ndarray, ...]  # of each batch: int64 ids, one per sequence; none if idle
    last: bool  # of its epoch


class PackStream:
    """Iterates over steps without end, epoch after epoch, from the position it is at.

    A rank with nothing left to do in the last step of an epoch gets a batch of one token that
    weighs 0, so that all ranks run as many micro-batches.

    Args:
        sources: prepared sets.
        order: what decides the global batches.
        options: what this rank needs to know.

    Attributes:
        sources: all samples by the ids of ``Step.packs``.
        order: the global order.
        stall: how long the consumer of the latest iteration waited.

    Raises:
        InputError: no samples, a sample of less than two tokens or too long for a pack, weights
            that do not fit, fewer packs than ranks, ranks x accumulation that do not divide the
            packs of a step, no such rank, a pad_to that a micro-batch may not fit.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        order: OrderOptions,
        options: StreamOptions | None = None,
    ) -> None:
        self.options, self._options = order, options or StreamOptions()
        self.sources = Sources(sources, order.max_tokens)
        self.order = Order(self.sources.lengths, order, self.sources.mixture(order))
        self._check()
        self.stall = Stall()
        self._position = Position()
        self._owner: object = None

    def __iter__(self) -> Iterator[Step]:
        """Steps from the position on; the position is behind a step as soon as it is given out.

        RuntimeError if the stream was moved, or iterated again, since this iteration began.
        """
        owner = self._owner = object()
        self.stall = Stall()
        position, options = self._position, self._options
        steps = self.order.walk(position.epoch, position.step, position.start)
        ahead = Prefetch(
            steps, self._made, workers=options.workers, depth=options.depth, stall=self.stall
        )
        with ahead:
            for step, after in ahead:
                if self._owner is not owner:
                    raise RuntimeError("the stream was moved since this iteration began")
                self._position = after
                yield step

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the epoch that the position is in. With weights, or packs that are not planned,
        epochs may differ: see ``order.steps(epoch)``."""
        return self.order.steps(self._position.epoch)

    def step(self, number: int) -> Step:
        """Any step, counted from 0 at the start of epoch 0; the position stays.

        Raises:
            IndexError: a number below 0.
        """
        return self._made(self.order.step(*self.order.locate(number)))[0]

    def state_dict(self) -> dict[str, Any]:
        """The position, as small JSON: after the steps given out so far, not after those that were
        made ahead. It is the same on all ranks."""
        return write_state(self._position, self.options, self.sources.fingerprint)

    def load_state_dict(self, state: Mapping[str, Any], force: bool = False) -> list[str]:
        """Go on where a state was taken; ranks, accumulation and workers may be others.

        Args:
            state: of ``state_dict``.
            force: take a state of other options or other data, too: go on in the same epoch after
                as many packs, in the order that is now; which samples of this epoch were trained
                before is not known then.

        Returns:
            What is not as it was, in words; empty unless forced.

        Raises:
            InputError: it is no state, or of other options or data and not forced.
        """
        position = read_state(state)
        changed = differences(state, self.state_dict())
        if changed and not force:
            raise InputError(
                f"the stream's state is of another run: {'; '.join(changed)}. "
                "Forced, it goes on after as many packs of the epoch"
            )
        if changed:
            position = self._nearest(position, state["packs_per_step"])
        else:
            self.order.check(position.epoch, position.step, position.start)
        self._position, self._owner = position, None
        return changed

    def _nearest(self, position: Position, packs_per_step: int) -> Position:
        """After as many packs of the epoch, of steps of another size."""
        step = position.step * packs_per_step // self.options.packs_per_step
        if step >= self.order.steps(position.epoch):
            return Position(position.epoch + 1)
        return Position(position.epoch, step)

    def _made(self, ordered: OrderedStep) -> tuple[Step, Position]:
        """This rank's part of a step, and the position after it."""
        options = self._options
        cells = deal(
            ordered.costs,
            options.ranks,
            options.accumulate,
            packs_per_step=self.options.packs_per_step,
            balance=self.options.balance,
        )
        samples = tuple(
            np.concatenate([_NONE, *(ordered.packs[k] for k in cell if k >= 0)])
            for cell in cells[:, options.rank].tolist()
        )
        batches = tuple(map(self._batch, samples))
        step = Step(ordered.epoch, ordered.step, ordered.packs, batches, samples, ordered.last)
        if ordered.last:
            return step, Position(ordered.epoch + 1)
        return step, Position(ordered.epoch, ordered.step + 1, ordered.start)

    def _batch(self, ids: np.ndarray) -> PackedBatch:
        from varlen_sft.data.batch import collate

        options = self._options
        samples = [self.sources.sample(i) for i in ids.tolist()]
        batch = collate(
            samples or [_idle(options.pad_id)],
            pad_to=options.pad_to,
            pad_multiple=options.pad_multiple,
            pad_id=options.pad_id,
        )
        return batch.pin_memory() if self._pin else batch

    @cached_property
    def _pin(self) -> bool:
        import torch

        wanted = self._options.pin
        return torch.cuda.is_available() if wanted is None else wanted

    def _check(self) -> None:
        options, order = self._options, self.options
        # Refuses what does not divide.
        deal(_NONE, options.ranks, options.accumulate, packs_per_step=order.packs_per_step)
        if not 0 <= options.rank < options.ranks:
            raise InputError(f"rank must be in [0, {options.ranks}), is {options.rank}")
        in_batch = order.packs_per_step // (options.ranks * options.accumulate)
        if options.pad_to is not None and options.pad_to < in_batch * order.max_tokens:
            raise InputError(
                f"pad_to must be at least {in_batch} x max_tokens = {in_batch * order.max_tokens}, "
                f"a micro-batch of {in_batch} packs, is {options.pad_to}"
            )
        found = self.order.epoch(0).packs()
        if found < options.ranks:
            raise InputError(f"an epoch has {found} packs, fewer than {options.ranks} ranks")


def _idle(token: int) -> Sample:
    """One row without a label."""
    return Sample(np.full(2, token, np.int32), np.zeros(2, np.float32), np.zeros(2, np.uint8))
