"""The stream of a run: steps of packs, the same global batches on any number of ranks.

``Order`` says which samples are which step; here a rank finds its part of each step, reads the
samples and collates them ahead of the trainer. The state is a position in the order, so a run goes
on from it with other ranks, workers or accumulation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from varlen_sft.data.balance import deal
from varlen_sft.data.order import Order, OrderedStep, OrderOptions
from varlen_sft.data.prefetch import Prefetch, Stall
from varlen_sft.data.stream_sources import Source, Sources
from varlen_sft.data.stream_state import Position, differences, read_state, write_state
from varlen_sft.data.stream_step import Counts, Step, StreamOptions, counted, idle, micro_batches
from varlen_sft.errors import InputError

if TYPE_CHECKING:
    from varlen_sft.data.batch import PackedBatch

__all__ = ["Counts", "OrderOptions", "PackStream", "Source", "Step", "StreamOptions"]

_NONE = np.zeros(0, np.int64)


class PackStream:
    """Iterates over steps without end, epoch after epoch, from the position it is at.

    A rank with nothing left to do in the last step of an epoch gets a batch of one token that
    weighs 0 (padded where padding is asked for), so that all ranks run as many micro-batches.

    Construction packs nothing: an epoch is packed when its first step is asked for, or ahead of
    that in a thread. A stream may be sent to another process, which opens the sources again, and
    used after a fork; an iteration belongs to the process that began it.

    Args:
        sources: prepared sets.
        order: what decides the global batches.
        options: what this rank needs to know.

    Attributes:
        sources: all samples by the ids of ``Step.packs``.
        order: the global order.
        accumulate: A, micro-batches of each step.
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
        self.accumulate = micro_batches(self._options, order.packs_per_step, order.max_tokens)
        self.sources = Sources(sources, order.max_tokens)
        self.order = Order(self.sources.lengths, order, self.sources.mixture(order))
        self.order.check_ranks(self._options.ranks)
        self.stall = Stall()
        self._position = Position()
        self._owner: object = None

    def __reduce__(self) -> tuple[Any, ...]:
        made_of = self.sources.parts, self.options, self._options
        return PackStream, made_of, {"_position": self._position}

    def __iter__(self) -> Iterator[Step]:
        """Steps from the position on; the position is behind a step as soon as it is given out.

        Raises:
            RuntimeError: the stream was moved, or iterated again, since this iteration began; or
                this is another process than the one that began it.
            RunError: a thread that makes steps has ended.
        """
        owner = self._owner = object()
        self.stall = Stall()
        position, options = self._position, self._options
        steps = self.order.walk(
            position.epoch, position.step, position.start, ahead=options.workers > 0
        )
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
        cells = deal(
            ordered.costs,
            self._options.ranks,
            self.accumulate,
            packs_per_step=self.options.packs_per_step,
            balance=self.options.balance,
        )
        samples = tuple(
            np.concatenate([_NONE, *(ordered.packs[k] for k in cell if k >= 0)])
            for cell in cells[:, self._options.rank].tolist()
        )
        batches, counts = zip(*map(self._batch, samples), strict=True)
        step = Step(
            ordered.epoch, ordered.step, ordered.packs, batches, samples, counts, ordered.last
        )
        if ordered.last:
            return step, Position(ordered.epoch + 1)
        return step, Position(ordered.epoch, ordered.step + 1, ordered.start)

    def _batch(self, ids: np.ndarray) -> tuple[PackedBatch, Counts]:
        from varlen_sft.data.batch import collate

        options = self._options
        samples = [self.sources.sample(i) for i in ids.tolist()]
        batch = collate(
            samples or [idle(options)],
            pad_to=options.pad_to,
            pad_multiple=options.pad_multiple,
            pad_id=options.pad_id,
        )
        return batch.pin_memory() if self._pin else batch, counted(samples)

    @cached_property
    def _pin(self) -> bool:
        import torch

        wanted = self._options.pin
        return torch.cuda.is_available() if wanted is None else wanted
