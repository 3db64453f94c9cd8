"""Whole samples to packs, planned over the whole set or in stream order.

``planned`` sees all lengths at once and leaves next to nothing free; ``streaming`` looks at a small
window and keeps the order of the stream; ``next-fit`` closes a pack when the next sample does not
fit, as a baseline; ``none`` puts each sample into a pack of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from varlen_sft.data.packing_planned import plan_histogram
from varlen_sft.data.packing_stream import StreamPacker
from varlen_sft.data.packs import (
    CHUNK,
    OverlongSample,
    PackingStats,
    Packs,
    checked_lengths,
    pack_tokens,
    packing_stats,
)

__all__ = [
    "Method",
    "OverlongSample",
    "PackingStats",
    "Packs",
    "StreamPacker",
    "pack",
    "pack_tokens",
    "packing_stats",
    "plan_packs",
]

Method = Literal["planned", "streaming", "next-fit", "none"]


def pack(
    lengths: np.ndarray | Sequence[int],
    max_tokens: int,
    method: Method = "planned",
    *,
    window: int = 64,
) -> Packs:
    """Pack whole samples; every sample is in exactly one pack. Deterministic.

    Args:
        lengths: (N,) integers, input tokens per sample (L - 1 of a sample of L tokens).
        max_tokens: T, the most tokens in a pack.
        method: see above.
        window: W of ``streaming``.

    Raises:
        OverlongSample: a length above max_tokens.
        InputError: a length below 1.
        ValueError: an unknown method; max_tokens or window below 1.
        TypeError: lengths are not integers in one row.
    """
    lengths = checked_lengths(lengths, max_tokens)
    if method == "planned":
        return plan_histogram(lengths, max_tokens)
    if method == "streaming":
        return StreamPacker(lengths, max_tokens, window=window).take()
    ids = np.arange(len(lengths), dtype=np.int64)
    if method == "next-fit":
        return Packs(ids, _next_fit(lengths, max_tokens))
    if method == "none":
        return Packs(ids, np.arange(len(lengths) + 1, dtype=np.int64))
    raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")


def plan_packs(lengths: np.ndarray | Sequence[int], max_tokens: int) -> list[np.ndarray]:
    """``pack(lengths, max_tokens)`` as one int64 array of sample ids per pack."""
    return list(pack(lengths, max_tokens))


def _next_fit(lengths: np.ndarray, max_tokens: int) -> np.ndarray:
    """(P + 1,) int64: where packs begin."""
    starts = [0]
    used = at = 0
    for first in range(0, len(lengths), CHUNK):
        for length in lengths[first : first + CHUNK].tolist():
            used += length
            if used > max_tokens:
                starts.append(at)
                used = length
            at += 1
    return np.array(starts + [at] * (at > 0), dtype=np.int64)
