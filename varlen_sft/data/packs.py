"""Packs of whole samples, what they hold, and the lengths that can be packed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import overload

import numpy as np

from varlen_sft.errors import InputError

__all__ = [
    "OverlongSample",
    "PackingStats",
    "Packs",
    "checked_lengths",
    "counted",
    "pack_tokens",
    "packing_stats",
]

CHUNK = 1 << 19  # samples at a time: temporary arrays stay in the cache and small beside the packs


class OverlongSample(InputError):
    """A sample is longer than a pack. Nothing is cut here: that is decided before packing.

    Attributes: ``sample`` its id, ``length`` in tokens, ``max_tokens`` of a pack; ``count`` samples
    are too long, and it is the first of them.
    """

    def __init__(self, sample: int, length: int, max_tokens: int, count: int = 1) -> None:
        others = f"; {count} samples are longer" if count > 1 else ""
        super().__init__(
            f"sample {sample} has length {length}, must be at most max_tokens "
            f"(max_tokens = {max_tokens}{others})"
        )
        self.sample, self.length, self.max_tokens, self.count = sample, length, max_tokens, count


@dataclass(frozen=True, eq=False)
class Packs(Sequence[np.ndarray]):
    """Packs in two arrays, however many there are; ``packs[k]`` are the sample ids of pack k.

    Args:
        ids: (N,) int64, the ids of pack 0, then of pack 1, and so on.
        starts: (P + 1,) int64; pack k is ``ids[starts[k]:starts[k + 1]]``, and no pack is empty.
    """

    ids: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, k: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, k: slice) -> list[np.ndarray]: ...
    def __getitem__(self, k: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(len(self)))]
        k = range(len(self))[k]  # negative numbers, and the IndexError
        return self.ids[self.starts[k] : self.starts[k + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        starts = self.starts.tolist()
        return (self.ids[a:b] for a, b in zip(starts, starts[1:], strict=False))

    def sums(self, values: np.ndarray, power: int = 1) -> np.ndarray:
        """(P,) int64: the sum over each pack of the values of its samples, to a power.

        Args:
            values: (largest id + 1,) integers, such as the lengths.
        """
        out = np.empty(len(self), dtype=np.int64)
        edges = np.searchsorted(self.starts, np.arange(CHUNK, len(self.ids), CHUNK))
        for a, b in pairwise([0, *edges, len(self)]):  # whole packs, of some CHUNK samples
            first = self.starts[a]
            drawn = values[self.ids[first : self.starts[b]]].astype(np.int64) ** power
            out[a:b] = np.add.reduceat(drawn, self.starts[a:b] - first)
        return out

    def followed_by(self, others: Packs) -> Packs:
        """These and then others."""
        starts = np.concatenate([self.starts, others.starts[1:] + self.starts[-1]])
        return Packs(np.concatenate([self.ids, others.ids]), starts)

    def relabelled(self, names: np.ndarray) -> Packs:
        """The same packs of other ids: id i becomes ``names[i]``.

        To repack an epoch in its own order, pack ``lengths[order]`` and relabel with ``order``.
        """
        return Packs(names[self.ids].astype(np.int64, copy=False), self.starts)


@dataclass(frozen=True)
class PackingStats:
    """What a plan came to; ``fill`` is tokens / (packs * max_tokens), 1.0 when there is no pack."""

    packs: int
    samples: int
    tokens: int
    max_tokens: int
    fill: float
    largest: int  # tokens in the fullest pack
    smallest: int  # tokens in the emptiest pack
    most_samples: int  # in one pack


def packing_stats(
    packs: Sequence[np.ndarray], lengths: np.ndarray | Sequence[int], max_tokens: int
) -> PackingStats:
    """Count a plan. Raises ValueError if a pack holds more than max_tokens."""
    return counted(pack_tokens(packs, lengths), pack_sizes(packs), max_tokens)


def counted(tokens: np.ndarray, samples: np.ndarray, max_tokens: int) -> PackingStats:
    """The same of (P,) integers, the tokens and the samples of each pack."""
    over = np.flatnonzero(tokens > max_tokens)
    if len(over):
        raise ValueError(
            f"pack {over[0]} holds {tokens[over[0]]} tokens, more than max_tokens = {max_tokens}"
        )
    total = int(tokens.sum())
    return PackingStats(
        packs=len(tokens),
        samples=int(samples.sum()),
        tokens=total,
        max_tokens=max_tokens,
        fill=total / (len(tokens) * max_tokens) if len(tokens) else 1.0,
        largest=int(tokens.max(initial=0)),
        smallest=int(tokens.min()) if len(tokens) else 0,
        most_samples=int(samples.max(initial=0)),
    )


def pack_tokens(packs: Sequence[np.ndarray], lengths: np.ndarray | Sequence[int]) -> np.ndarray:
    """(len(packs),) int64 tokens in each pack."""
    lengths = np.asarray(lengths)
    if isinstance(packs, Packs):
        return packs.sums(lengths)
    return np.array([lengths[pack].sum(dtype=np.int64) for pack in packs], dtype=np.int64)


def pack_sizes(packs: Sequence[np.ndarray]) -> np.ndarray:
    """(len(packs),) int64 samples in each pack."""
    if isinstance(packs, Packs):
        return np.diff(packs.starts)
    return np.array([len(pack) for pack in packs], dtype=np.int64)


def checked_lengths(lengths: np.ndarray | Sequence[int], max_tokens: int) -> np.ndarray:
    """The lengths as an array of integers (N,), not copied, each from 1 to max_tokens.

    Raises:
        OverlongSample: a length above max_tokens.
        InputError: a length below 1.
        ValueError: max_tokens below 1.
        TypeError: lengths are not integers in one row.
    """
    lengths = np.asarray(lengths)
    if lengths.size == 0:
        lengths = lengths.astype(np.int64)
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
        raise TypeError(
            f"lengths must be integers (N,), got {lengths.dtype} of shape {lengths.shape}"
        )
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if len(lengths) and lengths.min() < 1:
        at = int((lengths < 1).argmax())
        raise InputError(f"sample {at} has length {lengths[at]}, must be at least 1")
    if len(lengths) and lengths.max() > max_tokens:
        over = np.flatnonzero(lengths > max_tokens)
        raise OverlongSample(int(over[0]), int(lengths[over[0]]), max_tokens, len(over))
    return lengths
