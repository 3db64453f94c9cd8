"""How many samples there are of which length, in some bins."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from varlen_sft.data.packs import CHUNK

__all__ = ["Bin", "histogram"]


@dataclass(frozen=True)
class Bin:
    """Samples of low <= length < high."""

    low: int
    high: int
    samples: int
    tokens: int


def histogram(lengths: np.ndarray) -> tuple[Bin, ...]:
    """Bins whose edges are 2^k and 1.5 * 2^k, from the shortest sample to the longest.

    Args:
        lengths: (N,) integers from 1 to 2^53.
    """
    samples, tokens = np.zeros((2, 128), dtype=np.int64)
    for first in range(0, len(lengths), CHUNK):
        part = lengths[first : first + CHUNK].astype(np.float64)
        # Exponent and first bit of the fraction: two for each power of two.
        of = (part.view(np.int64) >> 51) - (1023 << 1)
        samples += np.bincount(of, minlength=128)
        tokens += np.bincount(of, weights=part, minlength=128).astype(np.int64)
    found = np.flatnonzero(samples)
    if not len(found):
        return ()
    bins = range(int(found[0]), int(found[-1]) + 1)
    edges = [((2 + of % 2) << of // 2) + 1 >> 1 for of in [*bins, bins[-1] + 1]]
    return tuple(
        Bin(low, high, int(samples[of]), int(tokens[of]))
        for of, low, high in zip(bins, edges, edges[1:], strict=False)
        if low < high  # no length is between 1.5 and 2
    )
