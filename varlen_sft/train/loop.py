"""The training loop: packs in, one optimiser step each, a record of every step out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from varlen_sft.data.batch import PackedBatch, collate
from varlen_sft.data.packing import plan_packs
from varlen_sft.data.sample import Sample
from varlen_sft.errors import RunError
from varlen_sft.models.llama import LlamaForSFT
from varlen_sft.train.memory import keep_freed_memory
from varlen_sft.train.optimizer import MasterAdamW, cosine_with_warmup
from varlen_sft.types import LossOutput

__all__ = ["NotFinite", "StepRecord", "TrainOptions", "endless_packs", "evaluate", "mean_loss"]
__all__ += ["train"]


class NotFinite(RunError):
    """The loss became NaN or infinite; weights are those before the step."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How long and how fast. A run ends at ``max_steps`` or ``max_seconds``, whichever is first.

    Raises:
        ValueError: no end is given, or a value out of its range.
    """

    max_steps: int | None = None
    max_seconds: float | None = None
    lr: float = 3e-4
    """Peak learning rate; it rises over the first tenth of the run and falls as a cosine."""
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
        """Share of the run that is done, in [0, 1]."""
        shares = (step / (self.max_steps or math.inf), seconds / (self.max_seconds or math.inf))
        return min(max(shares), 1.0)


@dataclass(frozen=True)
class StepRecord:
    """What one optimiser step did."""

    step: int  # from 1
    loss: float  # weighted mean over supervised tokens
    grad_norm: float  # before clipping
    lr: float
    real_tokens: int
    supervised_tokens: int
    fill: float  # real tokens over the pack's capacity
    step_time_s: float
    seconds_left: float

    @property
    def real_tokens_per_s(self) -> float:
        return self.real_tokens / self.step_time_s

    @property
    def supervised_tokens_per_s(self) -> float:
        return self.supervised_tokens / self.step_time_s


def endless_packs(samples: Sequence[Sample], max_tokens: int, seed: int) -> Iterator[list[Sample]]:
    """Whole samples in packs of at most ``max_tokens`` rows, reshuffled every epoch.

    Raises:
        ValueError: no sample, or one with more than ``max_tokens`` rows.
    """
    lengths = np.array([len(sample) - 1 for sample in samples])
    if not len(lengths):
        raise ValueError("samples must hold at least one sample, got none")
    for epoch in range(2**31):
        draw = np.random.default_rng((seed, epoch))
        order = draw.permutation(len(samples))  # ties of length fall otherwise every epoch
        packs = plan_packs(lengths[order], max_tokens)
        for at in draw.permutation(len(packs)):
            yield [samples[order[i]] for i in packs[at]]


def train(
    model: LlamaForSFT,
    packs: Iterable[Sequence[Sample]],
    options: TrainOptions,
    *,
    max_tokens: int,
    on_step: Callable[[StepRecord], None] = lambda record: None,
) -> list[StepRecord]:
    """Train until the options say stop or the packs end. On a CPU see ``keep_freed_memory``.

    Args:
        model: trained in place.
        packs: samples of one step each.
        options: length of the run and optimiser settings.
        max_tokens: capacity of a pack, for ``fill``.
        on_step: called after every step.

    Raises:
        NotFinite: the loss is NaN or infinite.
    """
    if next(model.parameters()).device.type == "cpu":
        keep_freed_memory()
    optimizer = MasterAdamW(model, weight_decay=options.weight_decay)
    records: list[StepRecord] = []
    start = last = time.perf_counter()
    for samples in packs:
        progress = options.progress(len(records), last - start)
        if progress >= 1:
            break
        lr = options.lr * cosine_with_warmup(progress)
        batch = collate(samples)
        loss, norm = _step(model, batch, optimizer, lr, options.max_grad_norm)
        now = time.perf_counter()
        record = StepRecord(
            step=len(records) + 1,
            loss=loss,
            grad_norm=norm,
            lr=lr,
            real_tokens=batch.real_tokens,
            supervised_tokens=batch.supervised_tokens,
            fill=batch.real_tokens / max_tokens,
            step_time_s=now - last,
            seconds_left=_seconds_left(options, len(records) + 1, now - start),
        )
        last = now
        records.append(record)
        on_step(record)
    return records


def mean_loss(outputs: Sequence[LossOutput]) -> Tensor:
    """Weighted mean over all micro-batches: the sum of sums over the sum of weights, () fp32.

    Never a mean of means, in which a token of a sparsely supervised micro-batch would count more.
    Without any weight it is 0.
    """
    loss_sum = torch.stack([output.loss_sum for output in outputs]).sum()
    weight_sum = torch.stack([output.weight_sum for output in outputs]).sum()
    return loss_sum / weight_sum.clamp(min=torch.finfo(weight_sum.dtype).tiny)


def _step(
    model: LlamaForSFT, batch: PackedBatch, optimizer: MasterAdamW, lr: float, max_norm: float
) -> tuple[float, float]:
    loss = mean_loss([model(batch)])
    loss.backward()
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NotFinite(f"the loss is {value}: nothing was updated in this step")
    return value, float(optimizer.step(lr, max_norm))


def _seconds_left(options: TrainOptions, step: int, seconds: float) -> float:
    by_steps = (options.max_steps or math.inf) - step
    by_time = (options.max_seconds or math.inf) - seconds
    return max(0.0, min(by_steps * seconds / step, by_time))


@torch.no_grad()
def evaluate(model: LlamaForSFT, packs: Iterable[Sequence[Sample]]) -> float:
    """Weighted mean loss over all supervised tokens of all packs: a sum over a sum."""
    return float(mean_loss([model(collate(samples)) for samples in packs]))
