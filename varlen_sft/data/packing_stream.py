"""Packing in stream order: oldest-first best fit over a small window of samples.

The window holds the next samples of the stream. A pack begins with the oldest of them and then
takes, again and again, the longest that still fits; whatever is taken is replaced by the next
sample of the stream at once. So nothing waits for more packs than the window has samples, and what
has to be remembered between two packs is where the stream is and which samples are held.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from varlen_sft.data.packs import Packs, checked_lengths
from varlen_sft.errors import InputError

__all__ = ["StreamPacker"]

# A held sample is one integer, length above position: sorted, the last of those that fit is the
# longest, and of equal ones the oldest, since positions count down.
BITS = 32
LAST = (1 << BITS) - 1
DRAWN = 4096  # samples looked up at a time


class StreamPacker(Iterator[np.ndarray]):
    """Packs one after the other; the same again from ``state_dict()`` at any point between two.

    Args:
        lengths: (N,) integers, input tokens per sample (L - 1 of a sample of L tokens).
        max_tokens: T, the most tokens in a pack.
        window: W, how many samples are held.
        order: (M,) integers, fewer than 2**32, the ids in stream order; every sample once if None.
        state: of a packer with the same arguments; None starts at the first sample.

    Raises:
        OverlongSample: a length above max_tokens.
        InputError: a length below 1 or above 2**31 - 1; a state that is not one of these arguments.
        ValueError: max_tokens or window below 1.
        TypeError: lengths are not integers in one row.
    """

    def __init__(
        self,
        lengths: np.ndarray | Sequence[int],
        max_tokens: int,
        *,
        window: int = 64,
        order: np.ndarray | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        self._lengths = checked_lengths(lengths, max_tokens)
        if (longest := int(self._lengths.max(initial=0))) >= 1 << (63 - BITS):
            raise InputError(f"lengths must be below 2**{63 - BITS}, the longest is {longest}")
        self._order = order
        self._total = len(self._lengths) if order is None else len(order)
        self._max_tokens, self._window = max_tokens, window
        self._cursor = 0  # samples that left the stream
        positions: list[int] = []
        if state is not None:
            self._check(state)
            self._cursor, positions = state["cursor"], state["window"]
        self._sorted: list[int] = []
        self._ages: deque[int] = deque()  # oldest first; those of self._gone are no longer held
        self._gone: set[int] = set()
        for sample in self._samples(np.asarray(positions, dtype=np.int64)):
            self._hold(sample)
        self._stream = self._draw()
        while len(self._sorted) < window and self._refill():
            pass

    def __next__(self) -> np.ndarray:
        """(n,) int64 sample ids of the next pack, the oldest first."""
        positions: list[int] = []
        self._fill(positions)
        if not positions:
            raise StopIteration
        return self._ids(np.array(positions, dtype=np.int64))

    def take(self, count: int | None = None) -> Packs:
        """The next packs, at most ``count``, or all there are; faster than one by one."""
        positions: list[int] = []
        starts = [0]
        while count is None or len(starts) <= count:
            self._fill(positions)
            if len(positions) == starts[-1]:
                break
            starts.append(len(positions))
        ids = self._ids(np.array(positions, dtype=np.int64))
        return Packs(ids, np.array(starts, dtype=np.int64))

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on from here: small, and JSON.

        ``cursor`` is how many samples left the stream, ``window`` the positions in the stream of
        those that are held, oldest first.
        """
        held = [LAST - (sample & LAST) for sample in self._ages if sample not in self._gone]
        return {"max_tokens": self._max_tokens, "cursor": self._cursor, "window": held}

    def _fill(self, positions: list[int]) -> None:
        """Append the positions of one pack; none if nothing is left."""
        held, ages, gone = self._sorted, self._ages, self._gone
        while ages and ages[0] in gone:
            gone.remove(ages.popleft())
        if not ages:
            return
        sample = ages.popleft()
        at, space = bisect_left(held, sample), self._max_tokens
        while True:
            del held[at]
            positions.append(LAST - (sample & LAST))
            space -= sample >> BITS
            self._refill()
            at = bisect_left(held, (space + 1) << BITS) - 1
            if at < 0:
                return
            sample = held[at]
            gone.add(sample)

    def _refill(self) -> bool:
        sample = next(self._stream, None)
        if sample is None:
            return False
        self._cursor += 1
        self._hold(sample)
        return True

    def _hold(self, sample: int) -> None:
        insort(self._sorted, sample)
        self._ages.append(sample)

    def _draw(self) -> Iterator[int]:
        for first in range(self._cursor, self._total, DRAWN):
            yield from self._samples(np.arange(first, min(first + DRAWN, self._total)))

    def _samples(self, positions: np.ndarray) -> list[int]:
        lengths = self._lengths[self._ids(positions)].astype(np.int64)
        return (lengths << BITS | (LAST - positions)).tolist()

    def _ids(self, positions: np.ndarray) -> np.ndarray:
        if self._order is None:
            return positions
        return self._order[positions].astype(np.int64, copy=False)

    def _check(self, state: Mapping[str, Any]) -> None:
        """A state must be one that a packer of these arguments can be in."""
        if missing := {"max_tokens", "cursor", "window"} - state.keys():
            self._refuse(f"lacks {', '.join(sorted(missing))}")
        cursor, window = state["cursor"], state["window"]
        if state["max_tokens"] != self._max_tokens:
            self._refuse(f"is of packs of {state['max_tokens']} tokens, not {self._max_tokens}")
        if not 0 <= cursor <= self._total:
            self._refuse(f"is at sample {cursor} of a stream of {self._total}")
        if any(a >= b for a, b in zip([-1, *window], [*window, cursor], strict=True)):
            self._refuse("holds samples that are not rising positions before its cursor")
        # Until the stream has ended the window is full.
        if len(window) > self._window or (cursor < self._total and len(window) < self._window):
            self._refuse(f"holds {len(window)} samples, a window of {self._window} was asked for")

    @staticmethod
    def _refuse(reason: str) -> None:
        raise InputError(f"the packing state does not fit: it {reason}")
