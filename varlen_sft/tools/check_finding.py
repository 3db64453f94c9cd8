"""What a check says: a property, how far off at worst, how far it may be, and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from varlen_sft.data.batch import PackedBatch, collate
from varlen_sft.data.sample import Sample
from varlen_sft.tools.check_subject import Packing
from varlen_sft.train.loop import mean_loss
from varlen_sft.types import LossOutput

Verdict = Literal["pass", "fail", "note"]


@dataclass(frozen=True)
class Finding:
    """One row of the report."""

    property: str
    worst: float | None  # the largest error seen, None where the question is yes or no
    bound: float | None
    verdict: Verdict
    detail: str = ""

    @classmethod
    def measured(cls, name: str, worst: float, bound: float, detail: str = "") -> Finding:
        # "worst <= bound" and not "worst > bound" decides: a NaN has to fail.
        return cls(name, worst, bound, "pass" if worst <= bound else "fail", detail)

    @classmethod
    def decided(cls, name: str, faults: Sequence[str], good: str) -> Finding:
        """Passes without faults; the first fault is told, and how many more there are."""
        if not faults:
            return cls(name, None, None, "pass", good)
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        return cls(name, None, None, "fail", faults[0] + more)


@dataclass
class Subject:
    """The pieces of a packed training step that are checked; a test plants faults in them."""

    model: Packing
    collate: Callable[..., PackedBatch] = collate
    mean_loss: Callable[[Sequence[LossOutput]], Tensor] = mean_loss


def relative_l2(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected, in fp64; 0 if both are 0."""
    difference = (actual.double() - expected.double()).norm()
    if difference == 0:
        return 0.0
    return float(difference / expected.double().norm().clamp(min=torch.finfo(torch.float64).tiny))


def whole(ids: np.ndarray) -> Sample:
    """A sample of these token ids, all of them trained."""
    return Sample(ids.astype(np.int32), np.ones(len(ids), np.float32), np.zeros(len(ids), np.uint8))
