"""Which samples of which source an epoch takes.

Without weights: all samples of all sources. With weights, an epoch is as long as it can be without
taking a sample twice: of the source that runs out first it takes everything, of each other source
its share, by count of samples, tokens or supervised tokens. Epoch e ends at the first sample with
which a source has given floor((e + 1) x its share), so the shares hold over epochs to one sample.

A source walks through permutations of itself, where one epoch ends the next goes on, and when a
permutation is used up the next one is drawn. In an epoch that sees the end of one permutation and
the beginning of the next, samples it has from the old one are put off: those that it has not had
move to the front of the new one, as many as it needs. So no sample is in an epoch twice, and after
any number of epochs no sample of a source was taken more than once more often than another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import numpy as np

from varlen_sft.data.balance import epoch_order, shuffled
from varlen_sft.errors import InputError

__all__ = ["Mixture", "WeightUnit"]

WeightUnit = Literal["samples", "tokens", "supervised"]
"""What weights count: samples, rows of packs (L - 1 of a sample of L tokens), rows with a label."""


class Mixture:
    """The samples of each epoch, by global id: those of source 0 first, then those of source 1.

    Args:
        units: of each source (n,) integers, 0 or more: what its samples count.
        weights: of each source, more than 0; their sum does not matter. None takes everything.
        seed: of the permutations.

    Raises:
        InputError: another number of weights than sources, a weight that is not a number above 0,
            a source that counts nothing at all.
    """

    def __init__(
        self, units: Sequence[np.ndarray], weights: Sequence[float] | None, seed: int
    ) -> None:
        self._starts = np.cumsum([0, *map(len, units)])
        totals = [int(part.sum(dtype=np.int64)) for part in units]
        shares = [Fraction(total) for total in totals]
        if weights is not None:
            shares = _shares(totals, weights)
        self._walks = [
            _Walk(part, share, (seed, source)) if share < total else None
            for source, (part, share, total) in enumerate(zip(units, shares, totals, strict=True))
        ]
        self._seed = seed

    @property
    def whole(self) -> bool:
        """Whether every epoch takes every sample."""
        return not any(self._walks)

    def ids(self, epoch: int) -> np.ndarray:
        """(n,) int64: the samples of an epoch in random order, each once.

        With weights it walks from the epoch asked for last, or from the first one.
        """
        drawn = [
            start + (np.arange(end - start) if walk is None else walk.ids(epoch))
            for walk, start, end in zip(
                self._walks, self._starts[:-1], self._starts[1:], strict=True
            )
        ]
        together = np.concatenate(drawn).astype(np.int64, copy=False)
        return together[epoch_order(len(together), self._seed, epoch)]


class _Walk:
    """One source, share by share."""

    def __init__(self, units: np.ndarray, share: Fraction, key: tuple[int, int]) -> None:
        self._units, self._share, self._key = units, share, key
        self._restart()

    def ids(self, epoch: int) -> np.ndarray:
        """(n,) int64: places in ``units``, each once."""
        if epoch < self._epoch:
            self._restart()
        while self._epoch < epoch:
            self._drawn = self._next()
        return self._drawn

    def _restart(self) -> None:
        self._epoch, self._passes, self._given = -1, 0, 0
        self._rest = self._permutation()

    def _next(self) -> np.ndarray:
        self._epoch += 1
        wanted = math.floor((self._epoch + 1) * self._share) - self._given
        taken, self._rest = self._split(self._rest, wanted)
        self._given += self._sum(taken)
        wanted -= self._sum(taken)
        if wanted <= 0:
            return taken
        self._passes += 1
        new = self._permutation()
        had = np.zeros(len(self._units), dtype=bool)
        had[taken] = True
        more, fresh = self._split(new[~had[new]], wanted)
        self._given += self._sum(more)
        had[fresh] = True
        self._rest = new[had[new]]  # those put off, and those not reached
        return np.concatenate([taken, more])

    def _split(self, order: np.ndarray, wanted: int) -> tuple[np.ndarray, np.ndarray]:
        """The shortest beginning that counts what is wanted, or all there is; and the rest."""
        if wanted <= 0:
            return order[:0], order
        sums = np.cumsum(self._units[order], dtype=np.int64)
        end = int(np.searchsorted(sums, wanted)) + 1
        return order[:end], order[end:]

    def _sum(self, places: np.ndarray) -> int:
        return int(self._units[places].sum(dtype=np.int64))

    def _permutation(self) -> np.ndarray:
        # Five numbers: no other key has as many.
        return shuffled(len(self._units), *self._key, self._passes, 0, 0)


def _shares(totals: Sequence[int], weights: Sequence[float]) -> list[Fraction]:
    """What each source gives in an epoch, exact; of one source or more it is all it has."""
    if len(weights) != len(totals):
        raise InputError(f"weights must be one for each source: {len(totals)}, got {len(weights)}")
    for source, (total, weight) in enumerate(zip(totals, weights, strict=True), 1):
        if not 0 < weight < math.inf:
            raise InputError(f"the weight of source {source} must be more than 0, is {weight}")
        if not total:
            raise InputError(f"source {source} has nothing that its weight could count")
    parts = [Fraction(weight) for weight in weights]
    epoch = min(total / part for total, part in zip(totals, parts, strict=True))
    return [epoch * part for part in parts]
