"""Whole runs on ranks, of which one breaks something, or is killed."""

from __future__ import annotations

import json
import math
import os
import resource
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.train.runs import die
from tests.train.setups import small_run
from varlen_sft.data import prepare_pool, store
from varlen_sft.models.llama import LlamaForSFT
from varlen_sft.train.parallel import Parallel
from varlen_sft.train.run import run

STEP = 4
"""The step in which something breaks; there is a checkpoint after every second."""
OPTIONS = {"--strategy": "ddp", "--checkpoint.every": "2", "--lr": "0.01", "--steps": "8",
           "--timeout_s": "30", "--valid": "[]"}  # fmt: skip


def train(folder: Path, *arguments: str) -> str:
    """A run of ``small_run``, with arguments in pairs over ``OPTIONS``; how it ended."""
    options = OPTIONS | dict(zip(arguments[::2], arguments[1::2], strict=True))
    config = small_run(folder, *chain(*options.items()))
    with open(os.devnull, "w") as nowhere:
        return run(config, Console(file=nowhere), lambda: nullcontext(lambda *_: None))


def killed_after(seconds: float, ranks: tuple[int, ...], folder: Path, *arguments: str) -> str:
    """A run of which some ranks are killed at some instant."""
    if int(os.environ["RANK"]) in ranks:
        threading.Timer(seconds, die).start()
    return train(folder, *arguments)


def broken(what: Callable[[Path], None], rank: int, folder: Path, *arguments: str) -> str:
    """A run of which one rank breaks something."""
    if os.environ["RANK"] == str(rank):
        what(folder)
    return train(folder, *arguments)


def at_the_step(folder: Path, act: Callable[[], Any]) -> None:
    """Do something before the first micro-batch of ``STEP``, when there is a checkpoint."""
    loss, calls = Parallel.loss, []

    def acting(parallel: Parallel, batch: Any) -> Any:
        calls.append(None)
        changed = None
        if len(calls) == 2 * STEP - 1:  # two micro-batches a step
            while not kept(folder):
                time.sleep(0.01)
            changed = act()
        output = loss(parallel, batch)
        return changed(output) if callable(changed) else output

    Parallel.loss = acting


def loss_is_nan(folder: Path) -> None:
    at_the_step(folder, lambda: lambda made: made._replace(loss_sum=made.loss_sum * math.nan))


def rank_dies(folder: Path) -> None:
    at_the_step(folder, die)


def data_cannot_be_read(folder: Path) -> None:
    """What a file system says that has lost a disk."""

    def gone(at: store.Store, i: int) -> None:
        raise OSError(5, "Input/output error", f"{at.prefix}.bin")

    at_the_step(folder, lambda: setattr(store.Store, "sample", gone))


def data_thread_dies(folder: Path) -> None:
    """It does not get so far as to hand over an error."""
    from varlen_sft.data import prefetch

    def none() -> None:
        raise MemoryError("no room for a future")

    at_the_step(folder, lambda: setattr(prefetch, "Future", none))


def preparing_process_dies(_: Path) -> None:
    start = prepare_pool.WorkerPool._start

    def killed(pool: prepare_pool.WorkerPool) -> Any:
        connection = start(pool)
        pool._processes[connection].kill()
        return connection

    prepare_pool.WorkerPool._start = killed


def no_room(size: int = 50_000) -> None:
    """From now on no file of this process may become larger."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def no_room_for_checkpoints(folder: Path) -> None:
    at_the_step(folder, no_room)


def no_room_for_the_model(_: Path) -> None:
    save = LlamaForSFT.save_pretrained

    def full(*given: Any, **options: Any) -> None:
        no_room()
        save(*given, **options)

    LlamaForSFT.save_pretrained = full


def no_room_for_the_log(folder: Path) -> None:
    """From the step on: /dev/full takes nothing."""
    file = (folder / "out" / "log.jsonl").resolve()

    def full() -> None:
        for number in os.listdir("/proc/self/fd"):
            if os.path.realpath(f"/proc/self/fd/{number}") == str(file):
                with open("/dev/full", "a") as nothing:
                    os.dup2(nothing.fileno(), int(number))

    at_the_step(folder, full)


def steps(folder: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient's norm by step; what a run did again has to come out the same."""
    found: dict[int, tuple[float, float]] = {}
    for line in (folder / "out" / "log.jsonl").read_text().splitlines():
        try:
            said = json.loads(line)
        except ValueError:
            continue  # a run was killed within it
        if said["event"] == "step":
            numbers = said["loss"], said["grad_norm"]
            assert found.setdefault(said["step"], numbers) == numbers, said["step"]
    return found


def weights(folder: Path) -> bytes:
    return (folder / "out" / "model" / "model.safetensors").read_bytes()


def kept(folder: Path) -> list[int]:
    """Steps of the checkpoints, which is what a run's name of a folder says."""
    found = (folder / "out" / "checkpoints").glob("step-" + "[0-9]" * 8)
    return sorted(int(path.name.removeprefix("step-")) for path in found)
