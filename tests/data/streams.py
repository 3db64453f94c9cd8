"""Sources in memory whose tokens tell which sample they are of, and what a step holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from varlen_sft.data.sample import Sample
from varlen_sft.data.stream import OrderOptions, PackStream, Step, StreamOptions
from varlen_sft.types import IGNORE_INDEX


class Made:
    """Sample i has the ids 1000 * (first + i) + 0, 1, 2, ...; all but its first token are targets,
    or as many of the last ones as ``supervised`` says."""

    def __init__(self, lengths: Sequence[int], first: int = 1, supervised=None) -> None:
        self.lengths = np.array(lengths, dtype=np.int32)
        self.first = first
        self.supervised = self.lengths - 1 if supervised is None else np.array(supervised)
        self.fingerprint = f"{lengths}{first}"

    def sample(self, i: int) -> Sample:
        length = int(self.lengths[i])
        ids = 1000 * (self.first + i) + np.arange(length, dtype=np.int32)
        weights = np.zeros(length, np.float32)
        weights[length - int(self.supervised[i]) :] = 1
        return Sample(ids, weights, np.zeros(length, np.uint8))


def lengths(count: int, seed: int = 0, most: int = 33) -> list[int]:
    """Tokens of samples, from 2 to most."""
    return np.random.default_rng(seed).integers(2, most + 1, count).tolist()


def stream(sources, order: dict | None = None, **options) -> PackStream:
    """Packs of 32 rows, four of them a step, unless told otherwise."""
    sources = [sources] if hasattr(sources, "sample") else sources
    order = {"max_tokens": 32, "packs_per_step": 4, "balance_steps": 3} | (order or {})
    options = {"workers": 0} | options
    return PackStream(sources, OrderOptions(**order), StreamOptions(**options))


def sequences(steps: Iterable[Step]) -> list[tuple[int, ...]]:
    """The input tokens of every sample in the batches of some steps, sorted; none of idle ones.

    Tokens of a sample that has no target are left out, as is what only fills a batch up.
    """
    found = []
    for step in steps:
        for batch in step.batches:
            edges = batch.cu_seqlens.tolist()
            trained = batch.labels != IGNORE_INDEX
            found += [
                tuple(batch.input_ids[a:b].tolist())
                for a, b in zip(edges, edges[1:], strict=False)
                if trained[a:b].any()
            ]
    return sorted(found)


def names(step: Step) -> list[list[int]]:
    """The packs of a step, as lists."""
    return [pack.tolist() for pack in step.packs]
