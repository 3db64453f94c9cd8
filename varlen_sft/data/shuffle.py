"""Permutations that depend on a seed alone, on any machine and in any version of numpy."""

from __future__ import annotations

import hashlib

import numpy as np

from varlen_sft.data.packs import CHUNK

__all__ = ["epoch_order", "shuffled"]


def shuffled(count: int, *key: int) -> np.ndarray:
    """(count,) int64: a permutation that depends on the key alone, also in other versions of numpy.

    numpy promises the stream of a bit generator, not that of its own shuffling. The memory is 16
    bytes per entry.

    Args:
        key: integers, such as seed and epoch.
    """
    named = ",".join(str(int(part)) for part in key)
    digest = hashlib.blake2b(named.encode(), digest_size=16).digest()  # no two keys share a stream
    return _places(np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count))


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """(count,) int64: the order in which an epoch's samples are packed."""
    return shuffled(count, seed, epoch, 0, 0)  # keys of packs and steps have two and three numbers


def _places(drawn: np.ndarray) -> np.ndarray:
    """(n,) int64: ``np.argsort(drawn, kind="stable")`` of (n,) uint64, several times faster.

    numpy sorts numbers much faster than it sorts places, so each place rides in the low bits of its
    number. Where the high bits are equal, which of random numbers few are, the numbers decide.
    """
    bits = np.uint64(max(len(drawn) - 1, 1).bit_length())
    keys = drawn >> bits
    keys <<= bits
    for first in range(0, len(keys), CHUNK):
        part = keys[first : first + CHUNK]
        part |= np.arange(first, first + len(part), dtype=np.uint64)
    keys.sort()
    alike = _alike(keys, bits)
    keys &= (np.uint64(1) << bits) - np.uint64(1)
    order = keys.view(np.int64)
    places = order[alike]  # neighbours that are alike, in the order of their high bits
    order[alike] = places[np.argsort(drawn[places], kind="stable")]
    return order


def _alike(keys: np.ndarray, bits: np.uint64) -> np.ndarray:
    """Where a sorted key has the same high bits as its neighbour."""
    pairs = []
    for first in range(0, len(keys), CHUNK):
        high = keys[first : first + CHUNK + 1] >> bits
        pairs.append(first + np.flatnonzero(high[1:] == high[:-1]))
    left = np.concatenate(pairs) if pairs else np.zeros(0, np.int64)
    return np.union1d(left, left + 1)
