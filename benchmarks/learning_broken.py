"""Training broken on purpose, one thing at a time, to see what each is worth.

The package cannot be told to do any of it, but for ``stream.isolate: false``: batches are changed
after they were made, and the order of steps by a function put in place of the package's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch

from varlen_sft.data import balance
from varlen_sft.data.batch import PackedBatch, collate
from varlen_sft.data.sample import Sample
from varlen_sft.data.stream import PackStream
from varlen_sft.ops.cross_entropy_rows import supervised_rows
from varlen_sft.ops.sequences import sequences_from_lengths
from varlen_sft.reference import position_ids_from_lengths
from varlen_sft.train import setup
from varlen_sft.types import IGNORE_INDEX

__all__ = ["BATCHES", "batches_from", "cheapest_first"]

Maker = Callable[[Sequence[Sample]], PackedBatch]


class Unchecked(PackedBatch):
    """A batch that may contradict itself: the package refuses to make such."""

    def __post_init__(self) -> None:
        pass


def labels_across_samples(samples: Sequence[Sample]) -> PackedBatch:
    """Shifted after packing: the last token of each sample learns the first one of the next."""
    ids = np.concatenate([sample.input_ids for sample in samples]).astype(np.int64)
    weights = np.concatenate([sample.token_weights for sample in samples]).astype(np.float32)
    lengths = [len(sample) for sample in samples]
    weights[np.cumsum(lengths)[:-1]] = 1.0  # first tokens of samples, as targets
    lengths[-1] -= 1
    return _batch(ids[:-1], ids[1:], weights[1:], lengths)


def mask_one_token_late(samples: Sequence[Sample]) -> PackedBatch:
    """Weights taken where a token is read instead of where it is the target.

    The first character of no answer is trained, and what follows its end is.
    """
    late = []
    for sample in samples:
        weights = np.append(0, sample.token_weights[:-1]).astype(np.float32)
        late.append(Sample(sample.input_ids, weights, sample.roles))
    return collate(late)


def positions_run_on(samples: Sequence[Sample]) -> PackedBatch:
    """Attention stays inside each sample, but positions count through the whole pack."""
    batch = collate(samples)
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return Unchecked(**values | {"position_ids": torch.arange(len(batch.input_ids))})


def turns_as_samples(samples: Sequence[Sample]) -> PackedBatch:
    """Edges and positions begin anew after each answer, as if its end were that of a sample."""
    batch = collate(samples)
    edges = set(batch.cu_seqlens.tolist())
    for sample, start in zip(samples, batch.cu_seqlens.tolist(), strict=False):
        answered = sample.token_weights[:-1] > 0
        asked_next = sample.token_weights[1:] == 0
        edges |= {start + int(k) + 1 for k in (answered & asked_next).nonzero()[0]}
    lengths = np.diff(sorted(edges)).tolist()
    sequences = sequences_from_lengths(lengths)
    return replace(
        batch, position_ids=position_ids_from_lengths(lengths), cu_seqlens=sequences.cu_seqlens,
        max_seqlen=sequences.max_seqlen, num_sequences=sequences.num_sequences,
    )  # fmt: skip


BATCHES: dict[str, Maker] = {
    "labels across samples": labels_across_samples,
    "mask one token late": mask_one_token_late,
    "positions run on": positions_run_on,
    "turns as samples": turns_as_samples,
}


@contextmanager
def batches_from(make: Maker) -> Iterator[None]:
    """Streams that runs open in here make their batches so."""

    class Stream(PackStream):
        def _batch(self, ids: np.ndarray) -> tuple[PackedBatch, Any]:
            _, counts = super()._batch(ids)
            return make([self.sources.sample(i) for i in ids.tolist()]), counts

    with mock.patch.object(setup, "PackStream", Stream):
        yield


@contextmanager
def cheapest_first(window: int = 128, *, shuffled: bool = False) -> Iterator[None]:
    """The steps of a window in order of cost, instead of shuffled after they were sorted.

    Args:
        window: about how many steps; the package's own would be longer than a run.
        shuffled: shuffle them nevertheless, to see what the window alone does.
    """

    def in_order(costs: np.ndarray, *_: object) -> np.ndarray:
        return np.argsort(costs, kind="stable")

    own = balance._window_order

    options = partial(setup.OrderOptions, balance_steps=window)
    with (
        mock.patch.object(setup, "OrderOptions", options),
        mock.patch.object(balance, "_window_order", own if shuffled else in_order),
    ):
        yield


def _batch(
    ids: np.ndarray, targets: np.ndarray, weights: np.ndarray, lengths: Sequence[int]
) -> PackedBatch:
    labels = torch.from_numpy(np.where(weights > 0, targets, IGNORE_INDEX))
    sequences = sequences_from_lengths(lengths)
    return PackedBatch(
        input_ids=torch.from_numpy(ids), labels=labels, token_weights=torch.from_numpy(weights),
        position_ids=position_ids_from_lengths(lengths), cu_seqlens=sequences.cu_seqlens,
        max_seqlen=sequences.max_seqlen, num_sequences=sequences.num_sequences,
        rows=supervised_rows(labels), weight_sum=torch.tensor(float(weights.sum())),
    )  # fmt: skip
