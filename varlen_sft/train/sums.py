"""The sums of a step: one vector, added up over micro-batches and then, once, over ranks.

What the model computed is summed up on its device; what the host knows goes along. What is no sum,
such as the memory of each rank, has a place for each rank, in which all others add 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from varlen_sft.data.batch import STOP, PackedBatch
from varlen_sft.data.sample import ROLES
from varlen_sft.data.stream_step import Counts
from varlen_sft.types import IGNORE_INDEX, LossOutput

__all__ = ["MICRO_BATCH", "StepSums", "host_sums", "micro_batch_sums"]

_KINDS = len(ROLES) + 1  # the roles, and stop tokens of whatever role
MICRO_BATCH = 3 + 2 * _KINDS
"""Numbers of ``micro_batch_sums``."""
_COUNTS = ("tokens", "supervised", "sequences", "squares")
_RANK = 2  # numbers that each rank has of its own


@dataclass(frozen=True)
class StepSums:
    """Of a step, over all ranks and micro-batches."""

    loss: float
    weight: float
    pairs: int  # of supervised rows and the keys that each sees
    kinds: tuple[tuple[float, float], ...]  # loss and weight of each role, then of stop tokens
    tokens: int
    supervised: int
    sequences: int
    squares: int
    seconds: float  # of the run, as rank 0 measured them when it came to the reduction
    stop: float  # ranks that are asked to stop
    stall_s: float  # the longest wait of a rank for its batches
    peak_memory: int  # bytes, of the rank that has taken most

    @classmethod
    def of(cls, numbers: Sequence[float]) -> StepSums:
        """From the vector on the host, of ``micro_batch_sums`` and then ``host_sums``."""
        loss, weight, pairs, *by_kind = numbers[:MICRO_BATCH]
        *counts, seconds, stop = numbers[MICRO_BATCH : MICRO_BATCH + len(_COUNTS) + 2]
        own = numbers[MICRO_BATCH + len(_COUNTS) + 2 :]
        tokens, supervised, sequences, squares = map(int, counts)
        return cls(
            loss=loss,
            weight=weight,
            pairs=int(pairs),
            kinds=tuple(zip(by_kind[:_KINDS], by_kind[_KINDS:], strict=True)),
            tokens=tokens,
            supervised=supervised,
            sequences=sequences,
            squares=squares,
            seconds=seconds,
            stop=stop,
            stall_s=max(own[::_RANK]),
            peak_memory=int(max(own[1::_RANK])),
        )

    @property
    def mean(self) -> float:
        """Weighted mean loss; 0 where nothing is supervised."""
        return self.loss / (self.weight or 1)

    @property
    def role_loss(self) -> dict[str, float]:
        """The same for the targets of each role that has a weight."""
        named = zip(ROLES, self.kinds, strict=False)
        return {role: loss / weight for role, (loss, weight) in named if weight > 0}

    @property
    def stop_loss(self) -> float | None:
        """The same for the tokens that end an answer; None without any."""
        loss, weight = self.kinds[-1]
        return loss / weight if weight > 0 else None


def micro_batch_sums(output: LossOutput, batch: PackedBatch) -> Tensor:
    """What a rank's micro-batch adds to the step, on its device, for which nothing waits.

    Args:
        output: of the model.
        batch: the same, on the model's device.

    Returns:
        (MICRO_BATCH,) fp64: loss, weight, pairs, and for each kind of target its loss, then its
        weight; zeros where the batch does not know the roles of its targets.
    """
    whole = torch.stack([output.loss_sum.detach(), output.weight_sum]).double()
    seen = torch.where(batch.labels != IGNORE_INDEX, batch.position_ids + 1, 0).sum().double()
    return torch.cat([whole, seen[None], _by_kind(output.token_loss.detach(), batch)])


def _by_kind(token_loss: Tensor, batch: PackedBatch) -> Tensor:
    """(2 kinds,) fp64. Plain sums: adding by index has no fixed order on a GPU."""
    roles = batch.target_roles
    if roles is None:
        return token_loss.new_zeros(2 * _KINDS, dtype=torch.float64)
    weights = batch.token_weights.double()
    values = torch.stack([token_loss.double() * weights, weights])  # (2, T)
    kinds = [roles & (STOP - 1) == role for role in range(len(ROLES))]
    masks = torch.stack([*kinds, roles >= STOP])  # (kinds, T)
    return torch.where(masks, values[:, None], 0.0).sum(-1).flatten()


def host_sums(
    counts: Sequence[Counts],
    *,
    seconds: float,
    stop: bool,
    own: tuple[float, float],
    rank: int,
    ranks: int,
) -> Tensor:
    """What the host knows of a rank's part of a step, on the CPU.

    Args:
        counts: of its micro-batches.
        seconds: see ``StepSums``; 0 on all ranks but the first.
        stop: whether this rank is asked to stop.
        own: seconds of waiting for batches, and bytes of memory at the peak.

    Returns:
        (n,) fp64, n being the same on all ranks.
    """
    totals = [sum(getattr(of, name) for of in counts) for name in _COUNTS]
    slots = [0.0] * (_RANK * ranks)
    slots[_RANK * rank : _RANK * (rank + 1)] = own
    return torch.tensor([*totals, seconds, float(stop), *slots], dtype=torch.float64)
