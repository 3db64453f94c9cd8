"""The learning rate over a run, as factors of its peak."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

__all__ = ["Schedule", "ScheduleKind", "cosine_with_warmup"]

ScheduleKind = Literal["cosine", "linear", "constant"]
_FIRST = 0.01
"""Share of the warm-up that counts as done in the very first step: a factor of 0 would waste it."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear up over the warm-up, then down to the floor; a pure function of how far a run is.

    It has no state: a run that goes on from its step goes on with its learning rate.

    Raises:
        ValueError: no such kind, or a value out of its range.
    """

    kind: ScheduleKind = "cosine"
    """How it falls: half a cosine, a line, or not at all."""
    warmup: float = 0.1
    """Share of the run that is spent rising, in [0, 1)."""
    floor: float = 0.1
    """Factor at the end of cosine and linear, in [0, 1]."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(ScheduleKind):
            known = ", ".join(get_args(ScheduleKind))
            raise ValueError(f"kind must be one of {known}, got {self.kind!r}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup}")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must be in [0, 1], got {self.floor}")

    def __call__(self, progress: float) -> float:
        """Factor of the peak.

        Args:
            progress: share of the run that is done before the step, in [0, 1].
        """
        if progress < self.warmup:
            return max(progress, _FIRST * self.warmup) / self.warmup
        phase = min((progress - self.warmup) / (1 - self.warmup), 1.0)
        if self.kind == "constant":
            return 1.0
        left = 1 - phase if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * phase))
        return self.floor + (1 - self.floor) * left


def cosine_with_warmup(progress: float, *, warmup: float = 0.1, floor: float = 0.1) -> float:
    """``Schedule(kind="cosine")`` at one point."""
    return Schedule(warmup=warmup, floor=floor)(progress)
