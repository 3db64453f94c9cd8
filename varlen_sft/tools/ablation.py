"""``varlen-sft bench --ablation``: what completions-only and isolation each do to loss and speed.

Four runs of the same steps of the same samples from the same weights: trained on answers alone or
on every token, with attention inside each sample or over the whole pack. Losses of different tokens
cannot be compared, so all four are asked for the loss of the same held-out answers, each sample for
itself, as a model is used.
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from varlen_sft.data.files import write_whole
from varlen_sft.data.masks import balanced
from varlen_sft.data.prepare import Progress
from varlen_sft.data.store import Store
from varlen_sft.data.stream import PackStream, Source, Step
from varlen_sft.tools import ablation_show as show
from varlen_sft.tools.ablation_data import EveryToken, check_sets, held_out, on_completions
from varlen_sft.tools.environment import environment
from varlen_sft.train.bare import bare, to_all, warm
from varlen_sft.train.config import TrainConfig
from varlen_sft.train.config_out import flat
from varlen_sft.train.distributed import World, world
from varlen_sft.train.first import from_first, naming_disk_errors
from varlen_sft.train.header import device_name
from varlen_sft.train.loop import evaluate_steps
from varlen_sft.train.parallel import Parallel
from varlen_sft.train.setup import Sets, open_stream, prepare_sets
from varlen_sft.train.setup_model import model_folder
from varlen_sft.train.stages import StagedStream
from varlen_sft.train.state import StepRecord, TrainState

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["ARMS", "Arm", "run"]

VALIDATIONS = 4
"""Of each run, beside the one before its first step."""
Preparing = Callable[[], AbstractContextManager[Progress]]
_SPEEDS = ("real_tokens_per_s", "supervised_tokens_per_s", "tflops", "naive_tflops")


@dataclass(frozen=True)
class Arm:
    """One of the four runs."""

    completions_only: bool
    isolate: bool

    @property
    def name(self) -> str:
        trained = "answers" if self.completions_only else "every token"
        return f"{trained}, {'isolated' if self.isolate else 'whole pack'}"


ARMS = (Arm(True, True), Arm(True, False), Arm(False, True), Arm(False, False))


def run(
    config: TrainConfig,
    steps: int,
    out: Path,
    console: Console | None,
    preparing: Preparing,
) -> dict[str, Any]:
    """Run the four on all ranks, print a table, and write ``ablation.json`` and ``ablation.html``.

    Args:
        config: of the run that is compared; its own isolation does not matter.
        steps: of each of the four.
        out: folder of the files.
        console: of rank 0; other ranks say and write nothing.
        preparing: opened while raw sources are prepared, gives what is told of it.

    Returns:
        What the JSON holds.

    Raises:
        InputError: what the configuration names cannot be used, or does not tell answers from all
            else.
        RunError: a loss is not finite, a rank is gone, a disk is full.
    """
    with world(config.dist.timeout_s) as here, naming_disk_errors(out):
        config, console = on_completions(config), console if here.is_first else None
        folder = model_folder(config.model.name)
        runs = _Runs(config, folder, _prepared(config, folder, here, preparing), steps, here)
        arms = []
        for number, arm in enumerate(ARMS, 1):
            show.heading(console, f"{number} of {len(ARMS)}: {arm.name}")
            arms.append(runs.run(arm, console))
            gc.collect()  # before the next model comes
        found = {
            "config": flat(config), "environment": environment(), "ranks": here.size,
            "device": device_name(here), "steps": steps, "held_out": runs.held_out_of, "arms": arms,
        }  # fmt: skip
        if console is not None:
            _tell(found, out, console)
        return found


def _prepared(config: TrainConfig, folder: Path, here: World, preparing: Preparing) -> Sets:
    """Sets that say which of their tokens are answers; rank 0 makes them."""

    def make() -> Sets:
        with preparing() as progress:
            sets = prepare_sets(config, folder, progress)
        check_sets(sets)
        return sets

    return from_first(here, "prepared", make)


def _tell(found: Mapping[str, Any], out: Path, console: Console) -> None:
    show.table(console, found)
    files = {"ablation.json": json.dumps(found, indent=1), "ablation.html": show.page(found)}
    for name, text in files.items():
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / name, f"{text}\n".encode())
        show.written(console, out / name)


class _Runs:
    """What the four have in common."""

    def __init__(
        self, config: TrainConfig, folder: Path, sets: Sets, steps: int, here: World
    ) -> None:
        self.config, self.folder, self.sets = config, folder, sets
        self.steps, self.here = steps, here
        self.held_out_of, self.held_out = held_out(config, sets, folder, steps, here)

    def run(self, arm: Arm, console: Console | None) -> dict[str, Any]:
        """One of them, from the weights of the model's folder."""
        config = replace(self.config, stream=replace(self.config.stream, isolate=arm.isolate))
        loop, parallel, options = bare(config, self.folder, self.steps, self.here)
        validation = _Validation(parallel, self.held_out)
        validation(loop.state)
        records: list[StepRecord] = []
        with show.live(console, options) as line:
            begun: Any = iter(self._stream(arm, config))
            with closing(begun) as stream:  # ends the threads that read ahead
                every = [(math.ceil(self.steps / VALIDATIONS), validation)]
                loop.run(stream, on_step=to_all(records.append, line), every=every)
        validation(loop.state)
        return _result(arm, records, validation.losses)

    def _stream(self, arm: Arm, config: TrainConfig) -> PackStream | StagedStream:
        def every_token(prefix: str) -> Source:
            return EveryToken(Store(prefix), partial(balanced, options=config.data.masks))

        source = Store if arm.completions_only else every_token
        here = self.here
        return open_stream(config, self.sets, self.folder, here.rank, here.size, source)


class _Validation:
    """The loss on what is held out, after some steps; nothing where nothing is held out."""

    def __init__(self, parallel: Parallel, steps: Sequence[Step]) -> None:
        self._parallel, self._steps = parallel, steps
        self.losses: list[dict[str, float]] = []

    def __call__(self, state: TrainState) -> None:
        if self._steps and (not self.losses or self.losses[-1]["step"] != state.step):
            loss = evaluate_steps(self._parallel, self._steps)
            self.losses.append({"step": state.step, "loss": loss})


def _result(
    arm: Arm, records: Sequence[StepRecord], validation: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """The steps of a run, and medians over those that are warm."""
    tenth = max(1, len(records) // 10)
    return {
        "name": arm.name,
        "completions_only": arm.completions_only,
        "isolate": arm.isolate,
        "loss_first": mean(record.loss for record in records[:tenth]),
        "loss_last": mean(record.loss for record in records[-tenth:]),
        **{name: _median(name, warm(records)) for name in _SPEEDS},
        "validation": list(validation),
        "steps": [asdict(record) for record in records],
    }


def _median(name: str, records: Sequence[StepRecord]) -> float | None:
    values = [getattr(record, name) for record in records]
    return None if None in values else median(values)
