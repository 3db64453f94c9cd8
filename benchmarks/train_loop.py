"""Section of bench_train: where the time of Loop's steps goes; and the runs that sections train."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from op_groups import Goal
from rich.console import Console
from rich.table import Table

from varlen_sft.data.sample import Sample
from varlen_sft.data.store import Store
from varlen_sft.data.store_write import write_store
from varlen_sft.data.stream import OrderOptions, PackStream, StreamOptions
from varlen_sft.data.stream_step import Step
from varlen_sft.models.config import LlamaConfig
from varlen_sft.models.llama import LlamaForSFT
from varlen_sft.tools.step_bench import chat_like_lengths, chat_like_samples
from varlen_sft.train.distributed import World
from varlen_sft.train.journal import Journal
from varlen_sft.train.loop import Loop
from varlen_sft.train.memory import keep_freed_memory
from varlen_sft.train.optimizer import GradientSums, MasterAdamW
from varlen_sft.train.options import TrainOptions
from varlen_sft.train.parallel import Parallel
from varlen_sft.train.state import StepRecord

LR = 1e-5
OVERHEAD = 3.0  # promised: percent of a step, at most
ACCUMULATE = 4
PACKS = 2 * ACCUMULATE  # of a step: one for each micro-batch of two ranks


# ----------------------------------------------------------------------- runs


def make_loop(folder: Path, dtype: torch.dtype, capacity: int, steps: int = 10**6) -> Loop:
    """A model of a folder in training, alone."""
    model = LlamaForSFT.from_pretrained(folder, dtype=dtype)
    options = TrainOptions(max_steps=steps, lr=LR)
    return Loop(Parallel(model, World()), MasterAdamW(model), options, capacity=capacity)


def make_stream(
    folder: Path, model: Path, tokens: int, steps: int, seed: int, options: Any = None
) -> PackStream:
    """Steps of ``tokens`` at most, of prepared samples that this writes; options are a rank's."""
    prefix = folder / "set"
    if not Path(f"{prefix}.idx").exists():
        write_store(prefix, drawn(model, (steps + 2) * tokens, tokens // PACKS, seed))
    order = OrderOptions(max_tokens=tokens // PACKS, packs_per_step=PACKS, seed=seed)
    return PackStream([Store(prefix)], order, options or StreamOptions(accumulate=ACCUMULATE))


def drawn(model: Path, tokens: int, longest: int, seed: int) -> list[Sample]:
    lengths = chat_like_lengths(tokens, seed, cap=longest)
    return chat_like_samples(lengths, LlamaConfig.from_folder(model).vocab_size, seed)


# -------------------------------------------------------------------- the clock


class Clock:
    """Seconds spent in functions while they are watched, by the name of the part."""

    def __init__(self) -> None:
        self.began, self.parts = 0.0, dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as until:
            for part, (owner, name) in PARTS.items():
                until.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, self._timed(part, getattr(owner, name)))
            yield

    def begin(self) -> None:
        self.parts = dict.fromkeys(PARTS, 0.0)
        self.began = time.perf_counter()

    def after_first(self, steps: Iterable[Step]) -> Iterator[Step]:
        """The same steps; the clock begins when the second is asked for."""
        for number, step in enumerate(steps):
            yield step
            if number == 0:
                self.begin()

    def _timed(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return work(*args, **named)
            finally:
                self.parts[part] += time.perf_counter() - start

        return timed


SUMS = "fp32 sums of gradients"
PARTS: dict[str, tuple[Any, str]] = {
    "forward": (Parallel, "loss"),
    "backward": (torch.Tensor, "backward"),
    "optimiser": (MasterAdamW, "step"),
    SUMS: (GradientSums, "add"),
}
"""What is no overhead. The last one is what autograd does in its backward, in the gradients' dtype,
for others: they pay for it as well."""


def measure_loop(model: Path, tokens: int, rounds: int, seed: int) -> dict[str, Any]:
    """Where the time of a run's steps goes: stream with its thread, log and all."""
    keep_freed_memory()
    clock = Clock()
    records: list[StepRecord] = []
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        stream = make_stream(Path(folder), model, tokens, rounds + 1, seed)
        journal = Journal(Console(file=nowhere), Path(folder) / "log.jsonl", {}, lambda _: 0.5, 1.0)
        loop = make_loop(model, torch.bfloat16, capacity=tokens, steps=rounds + 1)

        def told(record: StepRecord) -> None:
            journal.step(record)
            records.append(record)

        with journal, journal.live(), clock.watching():
            loop.run(clock.after_first(stream), on_step=told)
            total = time.perf_counter() - clock.began
    parts = clock.parts | {"waiting for data": sum(r.stall_s for r in records[1:])}
    parts["everything else"] = total - sum(parts.values())
    work = sum(clock.parts.values())
    return {
        "steps": rounds,
        "tokens": sum(r.real_tokens for r in records[1:]),
        "accumulate": ACCUMULATE,
        "seconds": total,
        "parts": parts,
        "overhead": 1 - work / total,
        "overhead_with_sums": 1 - (work - parts[SUMS]) / total,
    }


def table_of_loop(found: dict[str, Any]) -> Table:
    table = Table(
        "part", title=f"{found['steps']} steps of Loop, {found['tokens'] / found['steps']:.0f} "
        f"tokens in {found['accumulate']} micro-batches each, bf16, CPU",
    )  # fmt: skip
    for column in ("s per step", "share"):
        table.add_column(column, justify="right")
    for name, seconds in found["parts"].items():
        table.add_row(name, f"{seconds / found['steps']:.3f}", f"{seconds / found['seconds']:.2%}")
    strict = found["overhead_with_sums"]
    table.caption = (
        f"{strict:.2%} beside forward, backward and optimiser if {SUMS} are none of them"
    )
    return table


def goals_of_loop(found: dict[str, Any]) -> list[Goal]:
    text = "percent of a step beside forward, backward and optimiser"
    return [Goal(text, 100 * found["overhead"], OVERHEAD)]
