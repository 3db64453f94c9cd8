"""Section of bench_train: two ranks of one core each beside one rank of one core."""

from __future__ import annotations

import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from op_groups import Goal
from rich.markup import escape
from rich.table import Table

from varlen_sft.errors import RunError

SCALES = 1.7  # promised: times the real tokens/s of one rank
STEPS = 2  # of a process, the first of which is not timed
WAIT_S = 300.0
ONE, APART = "one rank", "two runs, each on half the packs"


@dataclass(frozen=True)
class Way:
    """Processes on a step: how many, and whether they know of each other."""

    processes: int
    strategy: str | None  # None: each trains for itself


WAYS = {
    ONE: Way(1, "ddp"),
    "two ranks, ddp": Way(2, "ddp"),
    "two ranks, zero2": Way(2, "zero2"),
    "two ranks, fsdp": Way(2, "fsdp"),
    APART: Way(2, None),
}


@dataclass(frozen=True)
class Work:
    """What every process is told."""

    folder: Path  # of the prepared set
    model: Path
    tokens: int  # of a step at most
    seed: int


# ------------------------------------------------------------------- a process


def train(work: Work, way: Way, rank: int, start: Any) -> dict[str, Any]:
    """Seconds and real tokens of the steps that are timed, and the loss of the first step."""
    import torch
    from train_loop import ACCUMULATE, LR, make_stream

    from varlen_sft.data.stream_step import StreamOptions
    from varlen_sft.models.llama import LlamaForSFT
    from varlen_sft.train.distributed import world
    from varlen_sft.train.loop import Loop
    from varlen_sft.train.memory import keep_freed_memory
    from varlen_sft.train.optimizer import MasterAdamW
    from varlen_sft.train.options import TrainOptions
    from varlen_sft.train.parallel import Parallel, shard

    torch.set_num_threads(1)
    keep_freed_memory()
    share = StreamOptions(rank=rank, ranks=way.processes, accumulate=ACCUMULATE)
    stream = make_stream(work.folder, work.model, work.tokens, STEPS, work.seed, share)
    model = LlamaForSFT.from_pretrained(work.model, dtype=torch.bfloat16)
    records: list[Any] = []
    with world(WAIT_S) as here:
        strategy: Any = way.strategy or "ddp"
        shard(model, here, strategy)
        loop = Loop(
            Parallel(model, here, strategy), MasterAdamW(model),
            TrainOptions(max_steps=STEPS, lr=LR), capacity=work.tokens,
        )  # fmt: skip
        steps = iter(stream)
        loop.run([next(steps)], on_step=records.append)
        start.wait(WAIT_S)
        began = time.perf_counter()
        loop.run(steps, on_step=records.append)
        start.wait(WAIT_S)  # a step is done when all are
        seconds = time.perf_counter() - began
    tokens = sum(record.real_tokens for record in records[1:])
    cores = sorted(os.sched_getaffinity(0))
    return {"seconds": seconds, "tokens": tokens, "loss": records[0].loss, "cores": cores}


def _process(pipe: Connection, port: int, work: Work, way: Way, rank: int, start: Any) -> None:
    size = way.processes if way.strategy else 1
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    pipe.send(train(work, way, rank, start))


# ------------------------------------------------------------------ all of them


def run(work: Work, way: Way, cores: Sequence[int]) -> list[dict[str, Any]]:
    """What each process found. Each has a core of its own and one thread that computes.

    Raises:
        RunError: a process ended without a word, or took too long.
    """
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(way.processes)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, pipes = [], []
    for rank in range(way.processes):
        ours, theirs = context.Pipe(duplex=False)
        told = (theirs, port, work, way, rank, start)
        process = context.Process(target=_process, args=told, daemon=True)
        with pinned(cores[rank]):
            process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    try:
        return _heard(pipes)
    finally:
        for process in processes:
            process.join(10)
            process.kill()


def _heard(pipes: Sequence[Connection]) -> list[dict[str, Any]]:
    found: dict[Connection, dict[str, Any]] = {}
    while len(found) < len(pipes):
        ready = connection.wait([pipe for pipe in pipes if pipe not in found], WAIT_S)
        if not ready:
            raise RunError(f"a rank gave no result within {WAIT_S:g} s")
        for pipe in ready:
            try:
                found[pipe] = pipe.recv()
            except EOFError:
                raise RunError("a rank ended without a result: what it wrote is above") from None
    return [found[pipe] for pipe in pipes]


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """What is started meanwhile stays on one core, with every thread that it makes."""
    before, threads = os.sched_getaffinity(0), os.environ.get("OMP_NUM_THREADS")
    os.sched_setaffinity(0, {core})
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = threads


def measure_ranks(model: Path, tokens: int, rounds: int, seed: int) -> dict[str, Any]:
    """Real tokens/s of each way, round by round.

    Raises:
        RunError: fewer than two cores, or ranks that compute another loss than one of them.
    """
    from train_loop import ACCUMULATE, make_stream

    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise RunError(f"two ranks need two cores, this process may use {len(cores)}")
    speeds: dict[str, list[float]] = {name: [] for name in WAYS}
    losses: dict[str, float] = {}
    real: dict[str, int] = {}  # tokens of a step, as its first process counted them
    with tempfile.TemporaryDirectory() as folder:
        work = Work(Path(folder), model, tokens, seed)
        make_stream(work.folder, model, tokens, STEPS, seed)  # here, so that no rank has to wait
        for turn in range(rounds):
            first = turn % len(WAYS)
            for name in [*WAYS][first:] + [*WAYS][:first]:
                if turn and name == APART:  # no goal is about it
                    continue
                found = run(work, WAYS[name], cores)
                speeds[name].append(speed(found, WAYS[name]))
                losses[name] = found[0]["loss"]
                real[name] = found[0]["tokens"] // (STEPS - 1)
            refuse_other_losses(losses)
    rows = {
        name: {"real_tokens_per_second": statistics.median(of), "rounds": of}
        for name, of in speeds.items()
    }
    facts = {"tokens": real[ONE], "accumulate": ACCUMULATE, "losses": losses}
    return facts | {"rows": rows}


def speed(found: Sequence[dict[str, Any]], way: Way) -> float:
    """Real tokens/s of all processes. Ranks that know of each other count the same tokens."""
    seconds = max(each["seconds"] for each in found)
    tokens = [each["tokens"] for each in found]
    return (tokens[0] if way.strategy else sum(tokens)) / seconds


def refuse_other_losses(losses: dict[str, float]) -> None:
    """A mean over the same tokens in bf16 differs by less than one rounding.

    Raises:
        RunError: by more.
    """
    for name, loss in losses.items():
        # "not <=" rather than ">": a NaN has to fail. Those apart have half of the packs each.
        if name != APART and not abs(loss - losses[ONE]) <= 2**-8 * abs(losses[ONE]):
            raise RunError(f"{name} must have the loss of {ONE}, {losses[ONE]:.6f}, has {loss:.6f}")


def table_of_ranks(found: dict[str, Any]) -> Table:
    table = Table(
        title=f"Steps of {found['tokens']} tokens in {found['accumulate']} micro-batches of each "
        "rank, bf16, a core and a thread for each process, CPU"
    )
    table.add_column("processes")
    for column in ("real tokens/s [min - max]", "times one rank"):
        table.add_column(escape(column), justify="right")
    one = found["rows"][ONE]["real_tokens_per_second"]
    for name, row in found["rows"].items():
        own, each = row["real_tokens_per_second"], row["rounds"]
        spread = escape(f"{own:.0f} [{min(each):.0f} - {max(each):.0f}]")
        table.add_row(name, spread, f"{own / one:.2f}x")
    return table


def goals_of_ranks(found: dict[str, Any]) -> list[Goal]:
    speeds = {name: row["real_tokens_per_second"] for name, row in found["rows"].items()}
    return [
        Goal(f"real tokens/s of {name}, over one rank", speeds[name] / speeds[ONE], SCALES, True)
        for name, way in WAYS.items()
        if way.processes > 1 and way.strategy
    ]
