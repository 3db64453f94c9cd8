"""An ablation's samples: answers alone, or every token of the same; and what is held out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from varlen_sft.data.sample import Sample
from varlen_sft.data.store import Store
from varlen_sft.data.stream import PackStream, Source, Step
from varlen_sft.errors import InputError
from varlen_sft.train.config import TrainConfig
from varlen_sft.train.distributed import World
from varlen_sft.train.setup import Sets, open_stream, valid_steps

__all__ = ["EveryToken", "check_sets", "held_out", "on_completions"]

VALID_PACKS = 8
"""The most that a validation runs on: there are several of them in each of four runs."""


class EveryToken:
    """The samples of a set with every token trained alike.

    Args:
        store: the set.
        balance: what makes the final weights of a sample, from weights of 1.
    """

    def __init__(self, store: Source, balance: Callable[[np.ndarray], np.ndarray]) -> None:
        self._store, self._balance = store, balance
        self.fingerprint = f"{store.fingerprint}, every token"
        self.lengths = store.lengths
        self.supervised = store.lengths - 1

    def sample(self, i: int) -> Sample:
        """Sample i, all of whose tokens weigh as much."""
        sample = self._store.sample(i)
        weights = self._balance(np.ones(len(sample), np.float32))
        return replace(sample, token_weights=weights)


def on_completions(config: TrainConfig) -> TrainConfig:
    """The configuration of a run that trains answers alone, isolated.

    Raises:
        InputError: one that weighs prompts, or has no data.
    """
    data = config.data
    if data.prompt_weight:
        raise InputError(
            f"--ablation compares answers alone with every token: data.prompt_weight must be 0, is "
            f"{data.prompt_weight}"
        )
    if data.mock:
        raise InputError("--ablation compares losses, for which data.mock has no data")
    if data.supervision_mode == "all":
        data = replace(data, supervision_mode="assistant")
    return replace(config, data=data, stream=replace(config.stream, isolate=True))


def check_sets(sets: Sets) -> None:
    """Refuse prepared sets that do not say which tokens are answers; InputError."""
    for prefix in sets.values():
        made_with = (Store(prefix).manifest.get("made_of") or {}).get("settings") or {}
        if made_with.get("supervision_mode") == "all" or made_with.get("prompt_weight"):
            raise InputError(
                "trains tokens that are no answers, and --ablation has to know the answers: "
                "prepare it with supervision_mode assistant",
                file=prefix,
            )


def held_out(
    config: TrainConfig, sets: Sets, folder: Path, steps: int, here: World
) -> tuple[str, tuple[Step, ...]]:
    """Packs of answers that no run trains: of data.valid, or else of the epoch's later steps.

    With weights or stages a sample may come twice in an epoch: then only data.valid is held out.

    Args:
        config: of ``on_completions``.
        steps: that each run trains.

    Returns:
        What they are, "" where there are none, and this rank's part of them.
    """
    if config.data.valid:
        packs = min(config.run.valid_packs, VALID_PACKS)
        config = replace(config, run=replace(config.run, valid_packs=packs))
        return "data.valid", valid_steps(config, sets, here.rank, here.size)
    stream = open_stream(config, sets, folder, here.rank, here.size)
    if not isinstance(stream, PackStream) or config.stream.weights is not None:
        return "", ()
    end = min(steps + math.ceil(VALID_PACKS / config.stream.packs_per_step), stream.steps_per_epoch)
    later = tuple(stream.step(number) for number in range(steps, end))
    return "the steps that come next" * bool(later), later
