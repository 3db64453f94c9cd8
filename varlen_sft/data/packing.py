"""Planned packing: best-fit decreasing over the length histogram.

Best-fit decreasing takes the longest sample first and puts it where it fits tightest. Samples of
one length need no decisions of their own: while the tightest pack with room for length l has s
tokens left, it takes s // l of them before another pack could be tighter. So all packs with s left
and all samples of length l move in bulk, one numpy step per pair (l, s), with the packs of the
plain algorithm. A million samples are planned in a fraction of a second.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def plan_packs(lengths: np.ndarray | Sequence[int], max_tokens: int) -> list[np.ndarray]:
    """Pack whole samples; every sample is in exactly one pack. Deterministic.

    Args:
        lengths: (N,) integers, input tokens per sample (L - 1 of a sample of L tokens).
        max_tokens: T, the most tokens in a pack.

    Returns:
        One int64 array of sample ids per pack, in the order the packs were opened.

    Raises:
        ValueError: a length below 1 or above max_tokens; names the sample.
        TypeError: lengths are not integers.
    """
    lengths = _checked(lengths, max_tokens)
    order = np.argsort(-lengths, kind="stable")
    values, counts = np.unique(lengths, return_counts=True)
    bins = _OpenPacks(max_tokens)
    pack_of = np.empty(len(lengths), dtype=np.int64)  # of the samples in order
    done = 0
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            packs = bins.place(length, count)
            pack_of[done : done + len(packs)] = packs
            done += len(packs)
            count -= len(packs)
    by_pack = order[np.argsort(pack_of, kind="stable")]
    ends = np.cumsum(np.bincount(pack_of, minlength=bins.opened)).tolist()
    return [by_pack[start:end] for start, end in zip([0, *ends], ends, strict=False)]


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
    tokens = pack_tokens(packs, lengths)
    over = np.flatnonzero(tokens > max_tokens)
    if len(over):
        raise ValueError(
            f"pack {over[0]} holds {tokens[over[0]]} tokens, more than max_tokens = {max_tokens}"
        )
    total = int(tokens.sum())
    return PackingStats(
        packs=len(packs),
        samples=sum(map(len, packs)),
        tokens=total,
        max_tokens=max_tokens,
        fill=total / (len(packs) * max_tokens) if len(packs) else 1.0,
        largest=int(tokens.max(initial=0)),
        smallest=int(tokens.min()) if len(packs) else 0,
        most_samples=max(map(len, packs), default=0),
    )


def pack_tokens(packs: Sequence[np.ndarray], lengths: np.ndarray | Sequence[int]) -> np.ndarray:
    """(len(packs),) int64 tokens in each pack."""
    lengths = np.asarray(lengths, dtype=np.int64)
    return np.array([lengths[pack].sum() for pack in packs], dtype=np.int64)


class _OpenPacks:
    """Packs by the space left in them."""

    def __init__(self, max_tokens: int) -> None:
        self.opened = 0
        self._max_tokens = max_tokens
        self._spaces: list[int] = []  # ascending, each with at least one pack
        self._packs: dict[int, list[np.ndarray]] = {}  # space -> ids, in chunks

    def place(self, length: int, count: int) -> np.ndarray:
        """Place up to ``count`` samples of one length; the pack ids of those that were placed.

        Takes packs of one space only: after it, another space may be the tightest.
        """
        at = bisect_left(self._spaces, length)
        if at == len(self._spaces):
            space = self._max_tokens
            each = space // length
            packs = np.arange(self.opened, self.opened + -(-count // each))
            self.opened += len(packs)
        else:
            space = self._spaces[at]
            each = space // length
            packs = self._take(at, -(-count // each))
        placed = min(count, each * len(packs))
        full, rest = divmod(placed, each)
        self._put(space - each * length, packs[:full])
        if rest:
            self._put(space - rest * length, packs[full:])
        return np.repeat(packs, each)[:placed]

    def _take(self, at: int, wanted: int) -> np.ndarray:
        """Remove up to ``wanted`` packs that have the space self._spaces[at]."""
        space = self._spaces[at]
        chunks = self._packs.pop(space)
        packs = chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
        if len(packs) > wanted:
            self._packs[space] = [packs[wanted:]]
        else:
            del self._spaces[at]
        return packs[:wanted]

    def _put(self, space: int, packs: np.ndarray) -> None:
        if space == 0 or not len(packs):
            return
        if space not in self._packs:
            self._packs[space] = []
            insort(self._spaces, space)
        self._packs[space].append(packs)


def _checked(lengths: np.ndarray | Sequence[int], max_tokens: int) -> np.ndarray:
    lengths = np.asarray(lengths)
    if lengths.size == 0:
        lengths = lengths.astype(np.int64)
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu":
        raise TypeError(
            f"lengths must be integers (N,), got {lengths.dtype} of shape {lengths.shape}"
        )
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    for bad, what in ((lengths < 1, "at least 1"), (lengths > max_tokens, "at most max_tokens")):
        if bad.any():
            at = int(bad.argmax())
            raise ValueError(
                f"sample {at} has length {lengths[at]}, must be {what} (max_tokens = {max_tokens})"
            )
    return lengths.astype(np.int64)
