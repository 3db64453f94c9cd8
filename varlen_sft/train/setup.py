"""From a configuration to what the loop runs on: prepared sets, streams of steps, optimiser.

Raw sources are prepared once, each to a set of its own, under a name that its fingerprint gives:
the same rows, template and settings are found again by any run with the same cache.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
from torch import nn

from varlen_sft.data.batch import collate
from varlen_sft.data.column import processor
from varlen_sft.data.costs import ModelSizes
from varlen_sft.data.masks import MaskOptions
from varlen_sft.data.prepare import Progress, prepare
from varlen_sft.data.prepare_plan import PrepareOptions, make_plan, vocabulary_size
from varlen_sft.data.sources import Source
from varlen_sft.data.store import Store, is_prepared
from varlen_sft.data.stream import OrderOptions, PackStream, Step, StreamOptions
from varlen_sft.data.stream_sources import Source as StreamSource
from varlen_sft.data.stream_step import Counts, idle
from varlen_sft.errors import InputError
from varlen_sft.train.config import OptimConfig, TrainConfig
from varlen_sft.train.optimizer import MasterAdamW
from varlen_sft.train.options import TrainOptions
from varlen_sft.train.schedule import Schedule
from varlen_sft.train.stages import JoinedStream, StagedStream

__all__ = ["Sets", "make_optimizer", "open_stream", "prepare_sets", "total_steps", "train_options"]
__all__ += ["valid_steps"]

PAD_MULTIPLE = 64
"""Of the tokens of a micro-batch: a CPU's matrix products are compiled for each new shape, which
takes longer than a small one runs, and GPUs like even counts."""
Sets = dict[str, str]
"""PREFIX of the prepared set of each source, by the source as it was written."""


def prepare_sets(config: TrainConfig, folder: Path, progress: Progress = lambda *_: None) -> Sets:
    """Prepare all sources that are raw. One process does it; the others are told.

    With ``data.mock`` nothing is made: sets that are there are found, others are left out.

    Args:
        folder: of the model, with its tokenizer.
        progress: see ``data.prepare``.

    Raises:
        InputError: a source, row or the tokenizer cannot be used; a prepared set that was masked
            otherwise than the configuration says.
        RunError: see ``data.prepare``.
    """
    stages = [source for stage in config.all_stages for source in stage.train]
    valid = () if config.data.mock else config.data.valid
    found = {
        text: _prepared(text, config, folder, progress) for text in dict.fromkeys([*stages, *valid])
    }
    return {text: str(prefix) for text, prefix in found.items() if prefix is not None}


def open_stream(
    config: TrainConfig,
    sets: Sets,
    folder: Path,
    rank: int = 0,
    ranks: int = 1,
    source: Callable[[str], StreamSource] = Store,
) -> PackStream | StagedStream:
    """The steps of a run, without end, as this rank sees them.

    Args:
        source: opens a prepared set by its PREFIX.

    Raises:
        InputError: see ``PackStream``.
    """
    stages = config.all_stages
    options = StreamOptions(
        rank=rank, ranks=ranks, accumulate=config.stream.accumulate, workers=config.stream.threads,
        pad_multiple=PAD_MULTIPLE,
    )  # fmt: skip
    cost_a = _cost_a(folder)
    streams = []
    for stage in stages:
        order = OrderOptions(
            max_tokens=config.stream.max_tokens,
            packs_per_step=config.stream.packs_per_step,
            seed=config.run.seed,
            method=config.stream.packing,
            balance=config.stream.balance,
            cost_a=cost_a,
            weights=stage.weights,
        )
        stores = [source(sets[text]) for text in stage.train]
        kind = PackStream if config.stream.isolate else JoinedStream
        streams.append(kind(stores, order, options))
    if len(streams) == 1:
        return streams[0]
    return StagedStream(streams, [stage.start_training_step for stage in stages])


def valid_steps(config: TrainConfig, sets: Sets, rank: int = 0, ranks: int = 1) -> tuple[Step, ...]:
    """This rank's part of the packs that validations run on: always the same, on any ranks.

    All ranks have as many; one that has nothing left gets a batch that weighs nothing.
    """
    if not config.data.valid:
        return ()
    order = OrderOptions(
        max_tokens=config.stream.max_tokens, packs_per_step=1, seed=config.run.seed, balance="none"
    )
    stores = [Store(sets[source]) for source in config.data.valid]
    kind = PackStream if config.stream.isolate else JoinedStream
    stream = kind(stores, order, StreamOptions(workers=0, pad_multiple=PAD_MULTIPLE))
    count = min(config.run.valid_packs, stream.steps_per_epoch)
    own = [stream.step(number) for number in range(rank, count, ranks)]
    if len(own) < math.ceil(count / ranks):
        nothing = collate([idle(StreamOptions())])
        own.append(Step(0, count, (), (nothing,), (np.zeros(0, np.int64),), (Counts(),), False))
    return tuple(own)


def total_steps(config: TrainConfig, stream: PackStream | StagedStream) -> int:
    """Of the whole run: ``run.steps``, or those of so many epochs."""
    if config.run.steps is not None:
        return config.run.steps
    assert isinstance(stream, PackStream)  # with stages, the configuration asks for steps
    whole, part = divmod(config.run.epochs, 1)
    steps = sum(stream.order.steps(epoch) for epoch in range(int(whole)))
    if part:
        steps += math.ceil(round(part * stream.order.steps(int(whole)), 6))
    return steps


def train_options(config: OptimConfig, steps: int) -> TrainOptions:
    """What the loop is told of length and learning rate."""
    return TrainOptions(
        max_steps=steps,
        lr=config.lr,
        schedule=Schedule(kind=config.schedule, warmup=config.warmup, floor=config.floor),
        max_grad_norm=config.max_grad_norm,
        weight_decay=config.weight_decay,
    )


def make_optimizer(config: OptimConfig, model: nn.Module) -> MasterAdamW:
    """Of a model that is where it will be trained, and sharded if it will be."""
    return MasterAdamW(model, weight_decay=config.weight_decay, betas=config.betas)


def _cost_a(folder: Path) -> int | None:
    """See ``OrderOptions``; None for models whose costs are not known: then tokens count alone."""
    try:
        return ModelSizes.from_folder(folder).a
    except InputError:
        return None


# -------------------------------------------------------------------- sources


def _prepared(text: str, config: TrainConfig, folder: Path, progress: Progress) -> Path | None:
    """PREFIX of a source, which is made if it is not there; None where it must not be."""
    source = Source.parse(text)
    if source.mode is None and not source.hub and is_prepared(Path(source.name)):
        _check_masks(Store(source.name), config.data.masks)
        return Path(source.name)
    cache = config.data.cache or config.run.out / "prepared"
    options = _options(text, config, folder, cache / "unnamed")
    plan = make_plan(options, lambda done, total: progress("hash", done, total))
    prefix = cache / plan.fingerprint[:16]
    if not (is_prepared(prefix) and Store(prefix).fingerprint == plan.fingerprint):
        if config.data.mock:
            return None
        cache.mkdir(parents=True, exist_ok=True)
        prepare(_options(text, config, folder, prefix), progress, plan)
    return prefix


def _options(text: str, config: TrainConfig, folder: Path, out: Path) -> PrepareOptions:
    data = config.data
    column = data.conversation_column
    return PrepareOptions(
        inputs=(text,),
        model=folder,
        out=out,
        template=data.template,
        masks=data.masks,
        max_tokens=config.stream.max_tokens,
        overlong=data.overlong,
        on_error=data.on_error,
        vocab_size=vocabulary_size(folder),
        sample_processor=None if column is None else processor(column),
        workers=data.processes or _cores(),
    )


def _cores() -> int:
    """Those that this process may use, which a scheduler may have limited."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_masks(store: Store, masks: MaskOptions) -> None:
    """Refuse options that a prepared set was not made with; those not given are its own."""
    made_with = (store.manifest.get("made_of") or {}).get("settings") or {}
    for field in fields(MaskOptions):
        wanted, there = getattr(masks, field.name), made_with.get(field.name)
        wanted = list(wanted) if isinstance(wanted, tuple) else wanted
        if getattr(masks, field.name) != field.default and wanted != there:
            raise InputError(
                f"was prepared with {field.name} = {there!r}, and data says {wanted!r}: prepare it "
                "anew, or leave the option out",
                file=store.prefix,
            )
