"""A whole run: from a configuration to the exported model, gone on with where it was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varlen_sft.data.files import write_whole
from varlen_sft.data.prepare import Progress
from varlen_sft.data.store import Store
from varlen_sft.errors import InputError
from varlen_sft.train.checkpoint import Checkpointer, ModelState, RandomState, RunIds
from varlen_sft.train.config import TrainConfig
from varlen_sft.train.config_file import read_config
from varlen_sft.train.config_out import changes, dump, flat
from varlen_sft.train.distributed import World, world
from varlen_sft.train.first import from_first, naming_disk_errors
from varlen_sft.train.flops import work_of
from varlen_sft.train.header import log_header
from varlen_sft.train.journal import Journal
from varlen_sft.train.loop import Ended, Loop, evaluate_steps
from varlen_sft.train.memory import keep_freed_memory
from varlen_sft.train.mock import run_mock
from varlen_sft.train.parallel import Parallel, shard
from varlen_sft.train.samples import Samples
from varlen_sft.train.setup import (
    Sets,
    make_optimizer,
    open_stream,
    prepare_sets,
    total_steps,
    train_options,
    valid_steps,
)
from varlen_sft.train.setup_model import base_fingerprint, load_model, model_folder
from varlen_sft.train.signals import StopRequest, resume_command
from varlen_sft.train.state import TrainState
from varlen_sft.train.trackers import open_trackers, require_trackers

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["CHECKPOINTS", "CONFIG", "LOG", "MODEL", "run"]

CHECKPOINTS, CONFIG, LOG, MODEL = "checkpoints", "config.yaml", "log.jsonl", "model"
"""What a run leaves in its folder."""

Preparing = Callable[[], AbstractContextManager[Progress]]
Report = Callable[[Path], Path]


def run(
    config: TrainConfig, console: Console, preparing: Preparing, report: Report | None = None
) -> Ended:
    """Train, from the newest checkpoint of the run's folder if there is one.

    Every rank calls it. SIGTERM or Ctrl-C during training saves, and returns "asked".

    Args:
        console: of rank 0; other ranks say nothing.
        preparing: opened while raw sources are prepared, gives what is told of it.
        report: makes a page of the run's folder at the end, and gives its place.

    Raises:
        InputError: what the configuration names cannot be used; a checkpoint of another run.
        RunError: the loss is not finite, a rank is gone, a disk is full; checkpoints are intact.
    """
    with world(config.dist.timeout_s) as here, naming_disk_errors(config.run.out):
        require_trackers(config.log)
        folder = model_folder(config.model.name)
        sets = _prepared(config, folder, here, preparing)
        if config.data.mock:
            return run_mock(config, folder, sets, here, console)
        made = _Run(config, folder, sets, here, console)
        with _checkpointer(config) as checkpoints, made.journal as journal:
            made.resume(checkpoints)
            ended = made.train(checkpoints)
            if ended == "asked":
                journal.say(f"saved after step {made.state.step}; to go on: {resume_command()}")
            else:
                made.validate(made.state)
                made.export(config.run.out / MODEL)
                journal.say(f"written: {config.run.out / MODEL}")
            if report is not None and here.is_first:
                journal.say(f"written: {report(config.run.out)}")
            return ended


def _checkpointer(config: TrainConfig) -> Checkpointer:
    of = config.checkpoint
    return Checkpointer(
        config.run.out / CHECKPOINTS,
        keep=of.keep,
        every=of.every,
        timeout_s=config.dist.timeout_s,
    )


class _Run:
    """The parts of a run on one rank, and what is done with them."""

    def __init__(
        self, config: TrainConfig, folder: Path, sets: Sets, here: World, console: Console
    ) -> None:
        if here.device.type == "cpu":
            keep_freed_memory()
        self.config, self.here, self.folder = config, here, folder
        self.stream = open_stream(config, sets, folder, here.rank, here.size)
        self.valid = valid_steps(config, sets, here.rank, here.size)
        held_out = {source: Store(sets[source]) for source in config.data.valid}
        self.samples = Samples(config.log, held_out, folder, here)
        self.options = train_options(config.optim, total_steps(config, self.stream))
        self.model = load_model(config.model, folder, config.run.seed).to(here.device)
        shard(self.model, here, config.dist.strategy)
        self.optimizer = make_optimizer(config.optim, self.model)
        base = from_first(here, "base", partial(base_fingerprint, config.model, folder))
        self.parallel = Parallel(self.model, here, config.dist.strategy)
        self.state, self.ids = TrainState(), RunIds()
        self.parts: dict[str, Any] = {
            "model": ModelState(self.model, base),
            "optimizer": self.optimizer,
            "stream": self.stream,
            "run": self.state,
            "random": RandomState(here.rank),
            "ids": self.ids,
        }
        self.saved = 0  # the step of the newest checkpoint
        self._validated: int | None = None
        self.journal = Journal(
            console if here.is_first else None,
            config.run.out / LOG,
            log_header(config, sets, here, self.options.max_steps),
            lambda record: self.options.progress(record.step, 0.0),
            config.log.every_s,
        )

    def resume(self, checkpoints: Checkpointer) -> None:
        """Go on from the newest checkpoint, and write down what is run now."""
        out = self.config.run.out
        newest = checkpoints.latest()
        if newest is not None:
            if not self.config.checkpoint.resume:
                raise InputError(
                    "the folder has checkpoints of a run: go on with checkpoint.resume: true, or "
                    "take another run.out",
                    file=out / CHECKPOINTS,
                )
            self.saved = checkpoints.load(self.parts, newest)
            self.journal.say(f"goes on after step {self.saved} of {self.options.max_steps}")
            self.journal.event("resume", step=self.saved)
        if self.here.is_first:
            for change in _changed(out / CONFIG, self.config) if newest else ():
                self.journal.say(f"  {change}")
            write_whole(out / CONFIG, dump(self.config).encode())
            settings = flat(self.config)
            self.journal.track(open_trackers(self.config.log, out, settings, self.ids, self.saved))

    def train(self, checkpoints: Checkpointer) -> Ended:
        """Steps until the end, or until somebody asks; all of them are saved then."""

        def save(state: TrainState) -> None:
            checkpoints.save(self.parts, state.step)
            self.saved = state.step

        every = [(self.config.checkpoint.every, save)]
        if self.config.run.valid_every is not None:
            every.insert(0, (self.config.run.valid_every, self.validate))
        of = self.config.stream
        loop = Loop(
            self.parallel,
            self.optimizer,
            self.options,
            capacity=of.packs_per_step * of.max_tokens,
            state=self.state,
            work=work_of(self.config, self.folder, self.model, self.here),
        )
        with StopRequest() as asked, self.journal.live():
            ended = loop.run(
                self.stream,
                on_step=self.journal.step,
                every=every,
                stop=lambda: asked() or checkpoints.failed,
            )
            if self.state.step != self.saved:
                save(self.state)
            checkpoints.wait()
        return ended

    def validate(self, state: TrainState) -> None:
        """Say and log the loss on what is held out, and answers to some of it, once per step."""
        if not self.valid or self._validated == state.step:
            return
        self._validated = state.step
        began = time.perf_counter()
        loss = evaluate_steps(self.parallel, self.valid)
        self.journal.say(f"step {state.step}: validation loss {loss:.4f}")
        took = time.perf_counter() - began
        self.journal.event("validation", step=state.step, loss=loss, seconds=took)
        self.samples.tell(self.model, state.step, self.journal)

    def export(self, place: Path) -> None:
        """The model for others, with tokenizer and template; rank 0 writes as long as it takes."""
        failed: list[Exception] = []
        try:
            with naming_disk_errors(self.config.run.out):
                self.model.save_pretrained(place, copy_from=self.folder)
        except Exception as error:
            if not self.here.is_first:
                raise
            failed.append(error)  # the others are told why before this rank, and its store, ends

        def written() -> bool:
            for error in failed:
                raise error
            return True

        from_first(self.here, "exported", written)


def _prepared(config: TrainConfig, folder: Path, here: World, preparing: Preparing) -> Sets:
    """Where the prepared sets are, which rank 0 makes."""

    def make() -> Sets:
        with preparing() as progress:
            return prepare_sets(config, folder, progress)

    return from_first(here, "prepared", make)


def _changed(file: Path, now: TrainConfig) -> list[str]:
    """What of the configuration is not as it was before."""
    try:
        return changes(read_config(file), now)
    except InputError as error:
        return [f"the configuration before cannot be compared: {error}"]
