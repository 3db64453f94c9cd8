"""How long a run is and how fast it learns."""

from __future__ import annotations

import math
from dataclasses import dataclass

from varlen_sft.train.schedule import Schedule

__all__ = ["TrainOptions"]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How long and how fast. A run ends at ``max_steps`` or ``max_seconds``, whichever is first.

    Raises:
        ValueError: no end is given, or a value out of its range.
    """

    max_steps: int | None = None
    max_seconds: float | None = None
    lr: float = 3e-4
    """Peak learning rate."""
    schedule: Schedule = Schedule()
    """By default it rises over the first tenth of the run and falls as a cosine."""
    max_grad_norm: float = 1.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.max_steps is None and self.max_seconds is None:
            raise ValueError("max_steps or max_seconds must be given")
        for name in ("max_steps", "max_seconds", "lr", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")

    def progress(self, step: int, seconds: float) -> float:
        """Share of the run that is done after so many steps and seconds, in [0, 1]."""
        shares = (step / (self.max_steps or math.inf), seconds / (self.max_seconds or math.inf))
        return min(max(shares), 1.0)

    def rate(self, progress: float) -> float:
        """The learning rate at a share of the run."""
        return self.lr * self.schedule(progress)

    def seconds_left(self, step: int, seconds: float, per_step: float) -> float:
        """What a run may still take, from how long its steps take."""
        by_steps = ((self.max_steps or math.inf) - step) * per_step
        by_time = (self.max_seconds or math.inf) - seconds
        return max(0.0, min(by_steps, by_time))
