"""A small run that saves, goes on from what it saved, and is killed where a test says."""

from __future__ import annotations

import json
import os
import signal
import threading
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.helpers import tiny_hf_config, tiny_model
from tests.train.runs import stream, whole
from varlen_sft.data.files import HashedFile
from varlen_sft.train import checkpoint
from varlen_sft.train.checkpoint import Checkpointer, ModelState, RandomState, RunIds
from varlen_sft.train.checkpoint_folder import locked
from varlen_sft.train.distributed import world
from varlen_sft.train.loop import Loop
from varlen_sft.train.optimizer import MasterAdamW
from varlen_sft.train.options import TrainOptions
from varlen_sft.train.parallel import Parallel, shard
from varlen_sft.train.signals import StopRequest
from varlen_sft.train.state import TrainState

STEPS, EVERY = 8, 2


def run(
    out: Path,
    strategy: str = "ddp",
    accumulate: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    *,
    noise: bool = True,
    steps: int = STEPS,
    every: int = EVERY,
    after: Callable[[int], None] = lambda step: None,
) -> dict[str, Any]:
    """From the newest checkpoint in ``out``, or from the start, to the last step or a signal.

    Losses go to ``out/loss-RANK.jsonl``, where a killed run leaves those it got to.

    Args:
        noise: every micro-batch draws a factor for its loss from torch's random numbers.
        after: called with the number of each step when its record is out.
    """
    with StopRequest() as asked, world(timeout_s=30) as here:
        with Checkpointer(out / "checkpoints", every=every) as checkpoints:
            torch.manual_seed(here.rank)
            model = tiny_model(tiny_hf_config(tie_word_embeddings=True), dtype)
            if strategy == "fsdp":
                shard(model, here)
            optimizer = MasterAdamW(model, weight_decay=0.1, eps=1e-4)
            data, state, ids = stream(here, accumulate), TrainState(), RunIds()
            parts = {"model": ModelState(model), "optimizer": optimizer, "stream": data,
                     "run": state, "random": RandomState(here.rank), "ids": ids}  # fmt: skip
            newest = checkpoints.latest()
            if newest is not None:
                checkpoints.load(parts, newest)
            started = state.step
            ids.setdefault("wandb", "first" if newest is None else "lost")
            loop = Loop(
                Parallel(model, here, strategy, score=noisy if noise else None),
                optimizer, TrainOptions(max_steps=steps, lr=1e-2), capacity=128, state=state,
            )  # fmt: skip

            def record(step: Any) -> None:
                with (out / f"loss-{here.rank}.jsonl").open("a") as log:
                    log.write(json.dumps([step.step, step.loss, step.grad_norm]) + "\n")
                after(step.step)

            save = [(every, lambda state: checkpoints.save(parts, state.step))]
            ended = loop.run(
                data, on_step=record, every=save, stop=lambda: asked() or checkpoints.failed
            )
            checkpoints.wait()
            if ended == "asked":
                checkpoints.save(parts, state.step)
        return {
            "started": started,
            "ended": ended,
            "state": replace(state, seconds=0.0),
            "position": data.state_dict(),
            "ids": dict(ids),
            "drawn": torch.rand(3),
            "weights": {n: whole(p) for n, p in model.state_dict().items()},
            "optimizer": {
                kind: {n: whole(p) for n, p in optimizer.state_dict()[kind].items()}
                for kind in ("masters", "exp_avg", "exp_avg_sq")
            },
        }


def noisy(module: torch.nn.Module, batch: Any) -> Any:
    output = module(batch)
    return output._replace(loss_sum=output.loss_sum * (0.5 + torch.rand(())))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(point: str, out: Path, *args: Any, rank: int = 0, **options: Any) -> Any:
    """A run of which one rank is killed in its first save, or the first that removes old ones.

    Args:
        point: "half written", "before the move", "after the move", "while old ones are removed".
    """
    if os.environ["RANK"] == str(rank):
        publish, prune, write = checkpoint.publish, checkpoint.prune, HashedFile.write

        def move(*paths: Path) -> None:
            if point == "before the move":
                die()
            publish(*paths)
            if point == "after the move":
                die()

        def remove(*given: Any) -> None:
            if point == "while old ones are removed":
                prune.__globals__["clean"] = lambda at: (
                    die() if list(at.glob("*.old.tmp")) else None
                )
            prune(*given)

        def put(file: HashedFile, data: Any) -> None:
            if point == "half written" and file.path.suffix == ".safetensors":
                write(file, data[: len(data) // 2])
                file._file.flush()
                die()
            write(file, data)

        checkpoint.publish, checkpoint.prune, HashedFile.write = move, remove, put
    return run(out, *args, **options)


def killed_after(seconds: float, out: Path, *args: Any, **options: Any) -> Any:
    """A run that is killed at some instant."""
    threading.Timer(seconds, die).start()
    return run(out, *args, **options)


def stopped_writing(out: Path, waits: bool = True) -> Any:
    """A rank that answers no more while it writes, and one that waits for it, or for its part of a
    sum; its error."""
    with world(timeout_s=30 if waits else 2) as here:
        if here.rank == 1:
            here.store.set("stopped", str(os.getpid()))
            HashedFile.write = lambda file, data: os.kill(os.getpid(), signal.SIGSTOP)
        try:
            with Checkpointer(out / "checkpoints", timeout_s=2) as checkpoints:
                checkpoints.save({"run": TrainState(), "random": RandomState(here.rank)}, 1)
                while not waits:
                    here.sum(torch.ones(1))
                checkpoints.wait()
        finally:
            os.kill(int(here.store.get("stopped")), signal.SIGKILL)


def newest_of(folder: Path) -> str:
    """The newest checkpoint that is whole, by name, of all ranks."""
    with world(timeout_s=30), warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        with Checkpointer(folder) as checkpoints:
            return checkpoints.latest().name


def held_by_rank_1(folder: Path) -> None:
    """Checkpoints in a folder that another run holds."""
    with world(timeout_s=30) as here, ExitStack() as held:
        if here.rank == 1:
            held.enter_context(locked(folder))
        here.barrier()
        try:
            Checkpointer(folder)
        finally:
            here.barrier()


class OneRow(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](x))


def updates_of_one_row() -> list[float]:
    """What a rank counts that has no part of a matrix, and one that has all of it."""
    with world(timeout_s=30) as here:
        model = OneRow()
        shard(model, here)
        optimizer = MasterAdamW(model)
        for skip in (False, True, False):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step(1e-2, 1.0, skip=torch.tensor(skip))
        return optimizer.state_dict()["updates"].tolist()


def signalled(number: int, step: int, rank: int, out: Path, *args: Any, **options: Any) -> Any:
    """A run of which one rank gets a signal after a step."""

    def after(done: int) -> None:
        if done == step and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), number)

    return run(out, *args, after=after, **options)


def on_full_disk(rank: int, out: Path, *args: Any, **options: Any) -> Any:
    """A run of which one rank finds no room for its part of the second checkpoint."""
    write, parts = HashedFile.write, []

    def put(file: HashedFile, data: Any) -> None:
        if file.path.suffix == ".safetensors" and file not in parts:
            parts.append(file)
        if len(parts) > 1:
            raise OSError(28, "No space left on device", str(file.path))
        write(file, data)

    if os.environ["RANK"] == str(rank):
        HashedFile.write = put
    return run(out, *args, **options)
