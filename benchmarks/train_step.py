"""Section of bench_train: whole steps with their optimisers, of three trainers side by side."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dropin_candidates import HFPadded, Steps, TRLPacked
from op_groups import Goal
from rich.markup import escape
from rich.table import Table
from train_loop import make_loop

from varlen_sft.data.batch import collate
from varlen_sft.data.sample import Sample
from varlen_sft.data.stream_step import Step, counted
from varlen_sft.tools import step_bench
from varlen_sft.tools.step_bench import Load
from varlen_sft.tools.step_table import describe
from varlen_sft.train.state import StepRecord

FASTER = {"hf padded": 2.8, "TRL packed": 3.5}  # promised: times the real tokens/s of each


# -------------------------------------------------------------------- whole steps


class TrainerStep:
    """A step of a Trainer with what Trainer does after the last backward: clip, AdamW, schedule."""

    def __init__(self, made: Callable[[Load], Steps], load: Load) -> None:
        self.steps = made(load)
        self.tokens, self.trainer = self.steps.tokens, self.steps.trainer
        self.trainer.create_optimizer_and_scheduler(num_training_steps=10**6)

    def step(self) -> float:
        loss, trainer = self.steps.step(), self.trainer
        trainer._clip_grad_norm(trainer.model)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        return loss


class LoopStep:
    """A step of ``Loop`` with all that it does: collation, the record, fp32 weights in AdamW."""

    def __init__(self, load: Load) -> None:
        self.samples = load.samples()
        self.tokens = sum(map(len, self.samples)) - len(self.samples)
        self.loop = make_loop(load.model, load.dtype, capacity=self.tokens)

    def step(self) -> float:
        records: list[StepRecord] = []
        self.loop.run(one_step(self.samples), on_step=records.append)
        return records[0].loss


def one_step(samples: Sequence[Sample]) -> Iterator[Step]:
    """All samples in one micro-batch, collated when it is asked for."""
    ids = np.arange(len(samples))
    yield Step(0, 0, (ids,), (collate(samples),), (ids,), (counted(samples),), False)


CANDIDATES: dict[str, Callable[[Load], Any]] = {
    "hf padded": partial(TrainerStep, HFPadded),
    "TRL packed": partial(TrainerStep, TRLPacked),
    "ours": LoopStep,
}


def measure_steps(model: Path, tokens: int, rounds: int, seed: int) -> dict[str, Any]:
    """Seconds and real tokens/s of each candidate.

    Raises:
        LossesDisagree: before anything is timed.
    """
    load = Load(model, torch.bfloat16, tokens, seed)
    truth = step_bench.fp32_loss(load)
    candidates = {name: made(load) for name, made in CANDIDATES.items()}
    # A first step's loss is that of the weights in the folder: AdamW comes after it.
    losses = step_bench.first_losses(candidates, lambda text: None)
    bound = step_bench.check_losses(losses, truth, load.dtype)
    times = step_bench.interleaved(candidates, rounds, 0, settle=1)
    real = sum(len(sample) for sample in load.samples())
    rows = {
        name: {
            "loss": losses[name],
            "tokens_computed": candidates[name].tokens,
            "seconds_median": statistics.median(seconds),
            "real_tokens_per_second": real / statistics.median(seconds),
            "rounds": seconds,
        }
        for name, seconds in times.items()
    }
    return {"loss_fp32_padded": truth, "loss_bound": bound, "rows": rows} | describe(load)


def table_of_steps(found: dict[str, Any]) -> Table:
    table = Table(
        title=f"A whole step with its optimiser, {found['dtype']}, {found['real_tokens']} real "
        f"tokens, {found['supervised_share']:.0%} supervised, CPU"
    )
    table.add_column("candidate")
    for column in ("loss", "tokens computed", "step, s [min - max]", "real tokens/s", "ours is"):
        table.add_column(escape(column), justify="right")
    ours = found["rows"]["ours"]["real_tokens_per_second"]
    for name, row in found["rows"].items():
        seconds, speed = row["rounds"], row["real_tokens_per_second"]
        spread = f"{row['seconds_median']:.2f} [{min(seconds):.2f} - {max(seconds):.2f}]"
        cells = (f"{row['loss']:.5f}", str(row["tokens_computed"]), escape(spread))
        table.add_row(name, *cells, f"{speed:.0f}", f"{ours / speed:.2f}x")
    return table


def goals_of_steps(found: dict[str, Any]) -> list[Goal]:
    speed = {name: row["real_tokens_per_second"] for name, row in found["rows"].items()}
    return [
        Goal(f"real tokens/s of ours over {name}", speed["ours"] / speed[name], limit, True)
        for name, limit in FASTER.items()
    ]
