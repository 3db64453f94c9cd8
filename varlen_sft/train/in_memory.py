"""Training and evaluation on samples in memory, in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

from varlen_sft.data.batch import collate
from varlen_sft.data.packing import plan_packs
from varlen_sft.data.sample import Sample
from varlen_sft.data.stream_step import Step, counted
from varlen_sft.models.llama import LlamaForSFT
from varlen_sft.train.distributed import World
from varlen_sft.train.loop import Loop, mean_loss
from varlen_sft.train.memory import keep_freed_memory
from varlen_sft.train.optimizer import MasterAdamW
from varlen_sft.train.options import TrainOptions
from varlen_sft.train.parallel import Parallel
from varlen_sft.train.state import StepRecord

__all__ = ["endless_packs", "evaluate", "train"]


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
        on_step: called with the record of each step, one step late.

    Raises:
        NotFinite: the loss is NaN or infinite.
    """
    device = next(model.parameters()).device
    if device.type == "cpu":
        keep_freed_memory()
    optimizer = MasterAdamW(model, weight_decay=options.weight_decay)
    records: list[StepRecord] = []

    def keep(record: StepRecord) -> None:
        records.append(record)
        on_step(record)

    loop = Loop(Parallel(model, World(device=device)), optimizer, options, capacity=max_tokens)
    loop.run(_steps(packs), on_step=keep)
    return records


@torch.no_grad()
def evaluate(model: LlamaForSFT, packs: Iterable[Sequence[Sample]]) -> float:
    """Weighted mean loss over all supervised tokens of all packs: a sum over a sum."""
    return float(mean_loss([model(collate(samples)) for samples in packs]))


def _steps(packs: Iterable[Sequence[Sample]]) -> Iterator[Step]:
    """Each pack a step of its own, of one micro-batch."""
    for number, samples in enumerate(packs):
        ids = np.arange(len(samples))
        yield Step(0, number, (ids,), (collate(samples),), (ids,), (counted(samples),), False)
