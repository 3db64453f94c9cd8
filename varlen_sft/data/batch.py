"""From samples to one pack: the only place where labels are shifted and edges are written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varlen_sft.data.sample import ROLES, Sample
from varlen_sft.ops.cross_entropy_rows import supervised_rows
from varlen_sft.ops.sequences import sequences_from_lengths
from varlen_sft.reference import position_ids_from_lengths
from varlen_sft.types import IGNORE_INDEX, Sequences

__all__ = ["STOP", "PackedBatch", "collate", "shift", "tail_lengths", "target_roles"]

STOP = 0x80
"""Added to the role of a target that ends an answer."""


@dataclass(frozen=True)
class PackedBatch:
    """Samples that share one row, ready for a model; made on the CPU and checked once, there.

    Raises:
        ValueError: fields that contradict each other (see ``_check``).
    """

    input_ids: Tensor  # (T,) int64
    labels: Tensor  # (T,) int64: the target of each row, -100 where there is none
    token_weights: Tensor  # (T,) fp32, 0 where the label is -100
    position_ids: Tensor  # (T,) int64
    cu_seqlens: Tensor  # (B + 1,) int32
    max_seqlen: int
    num_sequences: Tensor  # () int32
    rows: Tensor  # (S,) int64: supervised rows, padded with -1
    weight_sum: Tensor  # () fp32: sum of token_weights
    pad_tokens: int = 0  # tokens of the pad tail, at the end of T
    target_roles: Tensor | None = None  # (T,) uint8, see the function; None: not known

    def __post_init__(self) -> None:
        if self.input_ids.device.type == "cpu":
            _check(self)

    @property
    def sequences(self) -> Sequences:
        """Edges of the pack, pad tail included."""
        return Sequences(self.cu_seqlens, self.max_seqlen, self.num_sequences)

    @property
    def real_tokens(self) -> int:
        """Tokens that belong to a sample."""
        return self.input_ids.shape[0] - self.pad_tokens

    @property
    def supervised_tokens(self) -> int:
        """Rows that are scored. Waits for the device."""
        return int((self.labels != IGNORE_INDEX).sum())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """The same pack on another device."""
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same pack in page-locked memory, from where a GPU copies without waiting."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        changed: dict[str, Any] = {
            field.name: change(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **changed)


def shift(sample: Sample) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Align targets with the tokens that predict them.

    Row i of the result reads token i and learns token i+1, so L tokens make L - 1 rows, and no row
    can learn a token of the next sample.

    Returns:
        inputs, labels (L - 1,) int64, labels -100 where the weight is 0, and weights (L - 1,) fp32.
    """
    ids = sample.input_ids.astype(np.int64)
    weights = sample.token_weights[1:].astype(np.float32)
    return ids[:-1], np.where(weights > 0, ids[1:], IGNORE_INDEX), weights


def target_roles(sample: Sample) -> np.ndarray:
    """Whose token each row learns, and which of them end an answer.

    Returns:
        (L - 1,) uint8: an index into ROLES, plus STOP where the target is the last token of an
        assistant's turn. That is its stop token, since data are never cut within an answer.
    """
    roles = sample.roles.astype(np.uint8)
    answers = roles == ROLES.index("assistant")
    ends = answers & ~np.append(answers[1:], False)
    return np.where(ends, roles | STOP, roles)[1:].astype(np.uint8)


def collate(
    samples: Sequence[Sample],
    *,
    pad_to: int | None = None,
    pad_multiple: int = 1,
    pad_id: int = 0,
) -> PackedBatch:
    """Lay samples one after another into one pack.

    Args:
        samples: at least one, each of two tokens or more.
        pad_to: T wanted; the tail is filled with ``pad_id`` in sequences of their own, none longer
            than the longest sample, so that ``max_seqlen`` and attention stay as they are.
        pad_multiple: T is rounded up to a multiple of it (after ``pad_to`` nothing more is added
            unless needed).
        pad_id: token id of the tail, any id of the vocabulary.

    Raises:
        ValueError: no samples, a sample shorter than two tokens, or more tokens than ``pad_to``.
    """
    if not samples:
        raise ValueError("samples must hold at least one sample, got none")
    for index, sample in enumerate(samples):
        if len(sample) < 2:
            raise ValueError(
                f"samples must have 2 tokens or more, got {len(sample)} at index {index}"
            )
    inputs, labels, weights = zip(*(shift(sample) for sample in samples), strict=True)
    lengths = [len(ids) for ids in inputs]
    tail = tail_lengths(lengths, pad_to, pad_multiple)
    pad = sum(tail)
    batch_labels = _tensor(labels, IGNORE_INDEX, pad)
    batch_weights = _tensor(weights, 0, pad)
    sequences = sequences_from_lengths([*lengths, *tail])
    return PackedBatch(
        input_ids=_tensor(inputs, pad_id, pad),
        labels=batch_labels,
        token_weights=batch_weights,
        position_ids=position_ids_from_lengths([*lengths, *tail]),
        cu_seqlens=sequences.cu_seqlens,
        max_seqlen=sequences.max_seqlen,
        num_sequences=sequences.num_sequences,
        rows=supervised_rows(batch_labels),
        weight_sum=batch_weights.sum(dtype=torch.float64).float(),
        pad_tokens=pad,
        target_roles=_tensor([target_roles(sample) for sample in samples], 0, pad),
    )


def tail_lengths(lengths: Sequence[int], pad_to: int | None, multiple: int) -> list[int]:
    """Sequences that fill a pack up to ``pad_to``, then to a ``multiple``; see ``collate``."""
    total, longest = sum(lengths), max(lengths)
    if multiple < 1:
        raise ValueError(f"pad_multiple must be at least 1, got {multiple}")
    if pad_to is not None and total > pad_to:
        raise ValueError(f"samples must fit pad_to={pad_to} tokens, got {total}")
    wanted = max(total, pad_to or 0)
    pad = -(-wanted // multiple) * multiple - total
    whole, rest = divmod(pad, longest)
    return [longest] * whole + [rest] * (rest > 0)


def _tensor(pieces: Sequence[np.ndarray], fill: int, pad: int) -> Tensor:
    tail = np.full(pad, fill, dtype=pieces[0].dtype)
    return torch.from_numpy(np.concatenate([*pieces, tail]))


def _check(batch: PackedBatch) -> None:
    total = batch.input_ids.shape[0]
    for name in ("labels", "token_weights", "position_ids", "target_roles"):
        value = getattr(batch, name)
        if value is not None and value.shape != (total,):
            raise ValueError(f"{name} must have shape (T={total},), got {tuple(value.shape)}")
    edges = batch.cu_seqlens.long()
    if int(edges[0]) != 0 or int(edges[-1]) != total or bool((edges.diff() < 0).any()):
        raise ValueError(f"cu_seqlens must rise from 0 to T={total}, got {edges.tolist()}")
    if int(edges.diff().max()) > batch.max_seqlen:
        raise ValueError(
            f"max_seqlen must be at least {int(edges.diff().max())}, got {batch.max_seqlen}"
        )
    if bool(((batch.labels == IGNORE_INDEX) != (batch.token_weights == 0)).any()):
        raise ValueError("labels must be -100 exactly where token_weights are 0")
    _check_edges(batch.position_ids, edges)


def _check_edges(position_ids: Tensor, edges: Tensor) -> None:
    """Others find edges by the position-id rule: it has to find those that are written down."""
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[1:] = position_ids[1:] != position_ids[:-1] + 1
    found, true = starts.nonzero().flatten(), edges[:-1][edges.diff() > 0]
    if not torch.equal(found, true):
        raise ValueError(
            "position_ids must start anew exactly at cu_seqlens: the rule "
            f"position_ids[i] != position_ids[i-1] + 1 finds {found.tolist()}, not {true.tolist()}"
        )
