"""The global order: which samples are which packs, and which packs are which step of which epoch.

It follows from the lengths, the seed and the options alone. Nothing of it depends on ranks, workers
or accumulation, so a run can go on with others and sees the same global batches. For each epoch:

1. its samples (``mixture``), shuffled by (seed, epoch);
2. packs of them in this order: where lengths are equal, other samples share a pack each time;
3. windows of N steps: of a planned epoch, whose packs are all known, evenly cut after shuffling the
   packs by (seed, epoch); of a streaming one, the next N x P packs of the stream;
4. packs sorted by cost inside the window, P neighbours are one step;
5. steps shuffled by (seed, epoch, window); the cheapest packs of the last window are the last step,
   which may have fewer of them.

Streaming packs are made a window at a time, and where a window begins is a cursor and W samples.
The last window takes what is less than half a window with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from varlen_sft.data.mixture import Mixture
from varlen_sft.data.order_epochs import Epoch, OrderedStep, OrderOptions, WholeEpoch
from varlen_sft.data.order_kept import Kept
from varlen_sft.data.order_streaming import StreamingEpoch
from varlen_sft.errors import InputError
from varlen_sft.words import count

__all__ = ["Order", "OrderOptions", "OrderedStep"]


class Order:
    """Steps of any epoch, by number or one after the other. Safe to use from several threads.

    Args:
        lengths: (N,) integers, input tokens per sample (L - 1 of a sample of L tokens), of all
            sources one after the other.
        options: see there.
        mixture: of the same samples; None takes all of them in each epoch.

    Raises:
        InputError: there are no samples.
    """

    def __init__(
        self, lengths: np.ndarray, options: OrderOptions, mixture: Mixture | None = None
    ) -> None:
        if not len(lengths):
            raise InputError("no samples to train on")
        self._lengths, self._options = lengths, options
        self._mixture = mixture or Mixture([np.ones(len(lengths), np.int8)], None, options.seed)
        self._epochs = Kept(self._packed, "pack an epoch")
        self._steps: dict[int, int] = {}
        # The packs' number follows from the lengths alone: each epoch has as many steps.
        self._alike = self._mixture.whole and options.method in ("planned", "none")

    def steps(self, epoch: int) -> int:
        """Steps of an epoch. A streaming epoch is packed to its end to know it."""
        key = 0 if self._alike else epoch
        if key not in self._steps:
            self._steps[key] = self.epoch(epoch).count()
        return self._steps[key]

    def step(self, epoch: int, step: int) -> OrderedStep:
        """Step of an epoch, from 0.

        Raises:
            IndexError: the epoch has no such step.
        """
        found = self.epoch(epoch).find(step)
        if found is None:
            raise IndexError(f"epoch {epoch} has {self.steps(epoch)} steps, no step {step}")
        return found

    def locate(self, number: int) -> tuple[int, int]:
        """Epoch and step of a step that is counted from 0 at the start of epoch 0.

        Where epochs differ in their number of steps, all up to this one are packed for it.

        Raises:
            IndexError: a number below 0.
        """
        if number < 0:
            raise IndexError(f"steps are counted from 0, there is no step {number}")
        if self._alike:
            # Most often the epoch itself, which is wanted next: packs are all but full.
            likely = number // max(1, self._least_packs() // self._options.packs_per_step)
            return divmod(number, self.steps(likely))
        epoch = 0
        while number >= self.steps(epoch):
            number, epoch = number - self.steps(epoch), epoch + 1
        return epoch, number

    def check(self, epoch: int, step: int, start: Mapping[str, Any] | None) -> None:
        """InputError unless ``walk`` can begin there."""
        if start is not None:
            self.epoch(epoch).begin(start)
        if self.epoch(epoch).find(step) is None:
            raise InputError(f"epoch {epoch} has {self.steps(epoch)} steps, no step {step}")

    def check_ranks(self, ranks: int) -> None:
        """InputError if there are more ranks than packs. Packs nothing, but where it is close."""
        if self._least_packs() < ranks and (found := self.epoch(0).packs()) < ranks:
            raise InputError(
                f"an epoch has {count(found, 'pack')}, fewer than {count(ranks, 'rank')}"
            )

    def walk(
        self,
        epoch: int = 0,
        step: int = 0,
        start: Mapping[str, Any] | None = None,
        *,
        ahead: bool = False,
    ) -> Iterator[OrderedStep]:
        """All steps from one on, epoch after epoch, without end.

        Args:
            start: ``OrderedStep.start`` of the step before: spares a streaming epoch to be packed
                from its beginning. Of other methods it is None.
            ahead: pack the next epoch, or window of a streaming one, in a thread while the steps
                before it are walked.

        Raises:
            InputError: a start that does not belong here.
        """
        self.check(epoch, step, start)
        while True:
            here = self.epoch(epoch)
            if ahead and here.ahead(step):
                self._epochs.begin(epoch + 1, then=lambda following: following.find(0))
            found = here.find(step)
            assert found is not None  # check and last see to it
            yield found
            epoch, step = (epoch + 1, 0) if found.last else (epoch, step + 1)

    def epoch(self, number: int) -> Epoch:
        """An epoch, from 0."""
        return self._epochs.get(number)

    def _packed(self, number: int) -> Epoch:
        ids = self._mixture.ids(number)
        kind = StreamingEpoch if self._options.method == "streaming" else WholeEpoch
        return kind(self._lengths, ids, self._options, number)

    def _least_packs(self) -> int:
        """Packs that an epoch has at least."""
        taken = self._lengths if self._mixture.whole else self._lengths[self._mixture.ids(0)]
        return -(-int(taken.sum(dtype=np.int64)) // self._options.max_tokens)
