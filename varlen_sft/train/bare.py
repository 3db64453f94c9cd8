"""A run's model and loop without what makes it a run: for measuring, not for keeping.

Nothing is resumed, saved or exported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from varlen_sft.train.config import TrainConfig
from varlen_sft.train.distributed import World
from varlen_sft.train.flops import work_of
from varlen_sft.train.loop import Loop
from varlen_sft.train.memory import keep_freed_memory
from varlen_sft.train.options import TrainOptions
from varlen_sft.train.parallel import Parallel, shard
from varlen_sft.train.setup import make_optimizer, train_options
from varlen_sft.train.setup_model import load_model
from varlen_sft.train.state import StepRecord

__all__ = ["WARM_UP", "Bare", "Speed", "bare", "speed", "to_all", "warm"]

Item = TypeVar("Item")

WARM_UP = 2
"""First steps of a sitting that say nothing about speed: memory is taken, kernels are made."""


class Bare(NamedTuple):
    """What a configuration's steps would run on."""

    loop: Loop
    parallel: Parallel
    options: TrainOptions


def bare(config: TrainConfig, folder: Path, steps: int, here: World) -> Bare:
    """Model, optimiser and loop of a configuration, from the start of a run of so many steps.

    Raises:
        InputError: see ``load_model``.
    """
    if here.device.type == "cpu":
        keep_freed_memory()
    model = load_model(config.model, folder, config.run.seed).to(here.device)
    shard(model, here, config.dist.strategy)
    optimizer = make_optimizer(config.optim, model)
    parallel = Parallel(model, here, config.dist.strategy)
    options = train_options(config.optim, steps)
    capacity = config.stream.packs_per_step * config.stream.max_tokens
    work = work_of(config, folder, model, here)
    loop = Loop(parallel, optimizer, options, capacity=capacity, work=work)
    return Bare(loop, parallel, options)


def to_all(*each: Callable[[StepRecord], None]) -> Callable[[StepRecord], None]:
    """One ``on_step`` of several."""

    def on_step(record: StepRecord) -> None:
        for one in each:
            one(record)

    return on_step


class Speed(NamedTuple):
    """Of some steps together."""

    tokens_per_s: float  # real ones
    stall: float  # share of the time in which the first rank waited for its batches
    steps: int


def warm(steps: Sequence[Item]) -> Sequence[Item]:
    """The steps of a sitting that say something about speed; all where there are too few."""
    return steps[WARM_UP:] or steps


def speed(tokens: Sequence[int], seconds: Sequence[float], stalls: Sequence[float]) -> Speed:
    """What steps came to, in sums: a wait every now and then counts as what it took."""
    spent = sum(seconds)
    return Speed(sum(tokens) / spent, sum(stalls) / spent, len(seconds))
