"""What a policy for over-long samples comes to, told from lengths alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np

from varlen_sft.data.overlong import Overlong
from varlen_sft.data.packs import OverlongSample

__all__ = ["OverlongPlan", "fit_lengths"]


@dataclass(frozen=True)
class OverlongPlan:
    """Samples that are longer than a pack, and what the policy makes of them.

    Dropped ones are certain. What is cut is counted as for documents, which are cut anywhere;
    conversations are cut after answers and between turns, so no more than this is kept of them.
    """

    policy: Overlong
    samples: int
    tokens: int  # of them
    longest: int
    kept_samples: int  # parts, where they are split
    kept_tokens: int
    at_most: bool  # of conversations less may be kept


def fit_lengths(
    lengths: np.ndarray, supervised: np.ndarray, limit: int, policy: Overlong
) -> tuple[np.ndarray, np.ndarray, OverlongPlan]:
    """Lengths and supervised counts of what the policy leaves.

    Args:
        lengths, supervised: (N,) integers, input tokens per sample and how many have a label.
        limit: the most tokens of a pack.

    Raises:
        OverlongSample: there is one, under the policy ``error``.
        ValueError: an unknown policy.
    """
    if policy not in get_args(Overlong):
        raise ValueError(f"overlong must be one of {get_args(Overlong)}, got {policy!r}")
    over = lengths > limit
    long, labels = lengths[over].astype(np.int64), supervised[over].astype(np.int64)
    if policy == "error" and len(long):
        raise OverlongSample(int(over.argmax()), int(long[0]), limit, len(long))
    if policy in ("error", "drop"):
        kept, kept_labels = long[:0], labels[:0]
    elif policy == "truncate":
        kept = np.full_like(long, limit)
        kept_labels = np.minimum(labels, limit)
    else:
        kept, kept_labels = _split(long, labels, limit)
    if len(long):
        lengths, supervised = _joined(lengths, over, kept), _joined(supervised, over, kept_labels)
    return (
        lengths,
        supervised,
        OverlongPlan(
            policy=policy,
            samples=len(long),
            tokens=int(long.sum()),
            longest=int(long.max(initial=0)),
            kept_samples=len(kept),
            kept_tokens=int(kept.sum()),
            at_most=bool(len(long)) and policy in ("truncate", "split"),
        ),
    )


def _joined(values: np.ndarray, over: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The values that are not over, and then what is kept of those that are; nothing twice."""
    out = np.empty(len(values) - int(over.sum()) + len(kept), dtype=values.dtype)
    first = len(out) - len(kept)
    np.compress(~over, values, out=out[:first])
    out[first:] = kept
    return out


def _split(long: np.ndarray, labels: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Parts of ``limit`` rows and one of the rest; labels as evenly as the rows."""
    parts = -(-long // limit)
    ends = np.cumsum(parts)
    kept = np.full(int(parts.sum()), limit, dtype=np.int64)
    kept[ends - 1] = long - (parts - 1) * limit
    whole = np.repeat(np.arange(len(long)), parts)
    done = np.cumsum(kept) - np.repeat(np.cumsum(long) - long, parts)  # rows up to a part's end
    upto = labels[whole] * done // long[whole]
    before = np.concatenate([[0], upto[:-1]])
    before[ends - parts] = 0
    return kept, upto - before
