"""Best-fit decreasing over the length histogram.

Best-fit decreasing takes the longest sample first and puts it where it fits tightest. Samples of
one length need no decisions of their own: while the tightest packs with room for length l have s
tokens left, each of them takes s // l before another pack could be tighter. So the packs with s
left and the samples of length l move in bulk, and what decides is the histogram alone: ten million
samples are some fifty thousand moves. Which sample goes where follows from the moves in numpy.

Packs that made the same moves hold the same lengths and stay together. A group of them is a run of
``taken``, which lists, move by move, the packs that were given samples. Samples in order of
decreasing length are then given out along ``taken``, as many to each entry as its move says.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from varlen_sft.data.packs import CHUNK, Packs

__all__ = ["plan_histogram"]

TABLE = 1 << 22  # lengths below it are looked up in a table


def plan_histogram(lengths: np.ndarray, max_tokens: int) -> Packs:
    """Best-fit decreasing. The memory is 12 bytes per sample and some 24 per pack, all in all.

    Args:
        lengths: (N,) integers, each from 1 to max_tokens.

    Returns:
        Packs in the order they were opened; within one, samples in order of decreasing length,
        and of increasing id where lengths are equal.
    """
    histogram = _Histogram(lengths)
    moves = _Moves(max_tokens)
    for length, count in zip(histogram.values.tolist(), histogram.counts.tolist(), strict=True):
        moves.place(length, count)
    places, starts = _places(moves, len(lengths))
    ids = np.empty(len(lengths), dtype=np.int64)
    for first, order, ranks in histogram.ranks():
        ids[places[ranks]] = first + order
    return Packs(ids, starts)


@dataclass
class _Moves:
    """Packs by the space left in them, and all that was put into them so far.

    Move i gives ``each[i]`` samples to each of the next ``packs[i]`` entries of ``taken``, which
    held ``held[i]`` samples before.
    """

    max_tokens: int
    opened: int = 0
    taken: array[int] = field(default_factory=lambda: array("i"))  # packs
    packs: array[int] = field(default_factory=lambda: array("i"))
    each: array[int] = field(default_factory=lambda: array("i"))
    held: array[int] = field(default_factory=lambda: array("i"))
    _spaces: list[int] = field(default_factory=list)  # ascending, each with a group
    _groups: dict[int, deque[tuple[int, int, int]]] = field(default_factory=dict)
    """space -> (start, end, held): packs are ``taken[start:end]``; the oldest group first."""

    def place(self, length: int, count: int) -> None:
        """Put ``count`` samples of one length, which is no longer than any before."""
        while count:
            at = bisect_left(self._spaces, length)
            opening = at == len(self._spaces)
            space = self.max_tokens if opening else self._spaces[at]
            each = space // length
            wanted = -(-count // each)
            start = len(self.taken)
            if opening:
                held = 0
                self.taken.extend(range(self.opened, self.opened + wanted))
                self.opened += wanted
            else:
                first, end, held = self._take(at, wanted)
                self.taken.extend(self.taken[first:end])
            end = len(self.taken)
            full = min(end - start, count // each)
            self._put(start, start + full, held, each, space - each * length)
            count -= full * each
            if full < end - start:  # the last pack gets fewer
                self._put(start + full, end, held, count, space - count * length)
                count = 0

    def _take(self, at: int, wanted: int) -> tuple[int, int, int]:
        """Remove packs that have the space self._spaces[at], at most so many, of one group."""
        space = self._spaces[at]
        groups = self._groups[space]
        start, end, held = groups.popleft()
        if end - start > wanted:
            groups.appendleft((start + wanted, end, held))
            return start, start + wanted, held
        if not groups:
            del self._groups[space], self._spaces[at]
        return start, end, held

    def _put(self, start: int, end: int, held: int, each: int, space: int) -> None:
        """Note that ``taken[start:end]`` were given samples and have so much space now."""
        if start == end:
            return
        self.packs.append(end - start)
        self.each.append(each)
        self.held.append(held)
        if not space:
            return
        if space not in self._groups:
            self._groups[space] = deque()
            insort(self._spaces, space)
        self._groups[space].append((start, end, held + each))


def _places(moves: _Moves, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Where in ``Packs.ids`` each sample goes, by rank in decreasing length; and the starts."""
    taken, packs, each, held = (
        np.frombuffer(values, dtype=np.dtype(values.typecode)) if len(values) else np.zeros(0, int)
        for values in (moves.taken, moves.packs, moves.each, moves.held)
    )
    times = np.repeat(each, packs)
    sizes = np.bincount(taken, weights=times, minlength=moves.opened)  # exact below 2**53
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    dtype = np.int32 if samples < 2**31 else np.int64
    first = starts[taken].astype(dtype)
    first += np.repeat(held, packs).astype(dtype, copy=False)
    first[1:] -= np.cumsum(times, dtype=dtype)[:-1]  # what np.arange adds again
    places = np.repeat(first, times)
    for a in range(0, samples, CHUNK):
        part = places[a : a + CHUNK]
        part += np.arange(a, a + len(part), dtype=dtype)
    return places, starts


class _Histogram:
    """How many samples there are of each length.

    Attributes:
        values: (K,) the lengths there are, in decreasing order.
        counts: (K,) int64, samples of each.
    """

    def __init__(self, lengths: np.ndarray) -> None:
        self._lengths = lengths
        longest = int(lengths.max(initial=0))
        if longest < TABLE:
            found = np.zeros(longest + 1, dtype=np.int64)
            for first in range(0, len(lengths), CHUNK):
                part = lengths[first : first + CHUNK].astype(np.int64, copy=False)
                found += np.bincount(part, minlength=len(found))
            self.values = np.flatnonzero(found)[::-1]
            self.counts = found[self.values]
        else:
            values, counts = np.unique(lengths, return_counts=True)
            self.values, self.counts = values[::-1], counts[::-1]
        # numpy sorts 16-bit keys by radix, many times faster than wider ones.
        self._kind = np.uint16 if len(self.values) <= 1 << 16 else np.int64
        self._table: np.ndarray | None = None
        if longest < TABLE:
            self._table = np.zeros(longest + 1, dtype=self._kind)
            self._table[self.values] = np.arange(len(self.values))

    def ranks(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """A counting sort, chunk by chunk: the first id, ids less that, and their ranks.

        Ranks are those of a stable sort by decreasing length.
        """
        following = np.cumsum(self.counts) - self.counts  # the next free rank of each length
        for first in range(0, len(self._lengths), CHUNK):
            keys = self._keys(self._lengths[first : first + CHUNK])
            order = np.argsort(keys, kind="stable")
            here = np.bincount(keys, minlength=len(self.values))
            ranks = (following - (np.cumsum(here) - here))[keys[order]] + np.arange(len(keys))
            following += here
            yield first, order, ranks

    def _keys(self, lengths: np.ndarray) -> np.ndarray:
        """Places of lengths in ``values``."""
        if self._table is not None:
            return self._table[lengths]
        places = np.searchsorted(self.values[::-1], lengths)
        return (len(self.values) - 1 - places).astype(self._kind)
