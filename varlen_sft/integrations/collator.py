"""A collator for Hugging Face trainers: unpadded features in, one pack out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from varlen_sft.data.batch import shift, tail_lengths
from varlen_sft.data.sample import Sample
from varlen_sft.integrations.packed import ROWS
from varlen_sft.ops.cross_entropy_rows import supervised_rows
from varlen_sft.ops.sequences import sequences_from_lengths
from varlen_sft.reference import position_ids_from_lengths
from varlen_sft.types import IGNORE_INDEX

__all__ = ["FEATURE_KEYS", "Collator"]

_MASKS = ("assistant_masks", "completion_mask")
FEATURE_KEYS = ("input_ids", "labels", *_MASKS, "token_weights", "seq_lengths")
"""What is read of a feature. ``attention_mask`` and ``position_ids`` are only checked."""


@dataclass(frozen=True)
class Collator:
    """Lays the features of a batch one after another into one row, without padding.

    A feature is a ``Sample`` or a dictionary of (L,) lists, arrays or tensors:

    - ``input_ids``;
    - what is trained, as one or more of ``labels`` (-100, or the token itself, not shifted),
      ``assistant_masks``, ``completion_mask`` (0 or 1) and ``token_weights`` (how much a token
      counts as a target). A token's weight is the product of those that are there;
    - ``seq_lengths``, if the row is a pack already: tokens of each of its samples.

    The result works with models that ``varlen_sft.patch`` changed, and with any other whose
    attention reads the four flash keywords or position ids. All L tokens of a sample are kept.

    One pack is the batch of one process. Where one process collates for all
    (``dispatch_batches=True``) or a batch is cut in pieces (``DataParallel``) no pack survives.

    Args:
        pad_to: T wanted, see ``collate``.
        pad_multiple: T is rounded up to a multiple of it.
        pad_id: token id of the pad tail, any id of the vocabulary.
        train_all: train every token of a feature that does not say what is trained; without it
            such a feature is refused, as a mask that got lost would look the same.
        return_labels: add ``labels`` beside ``shift_labels``. HF's Trainer counts targets, and
            evaluates, only where ``labels`` is in the batch.
        fractional_weights: allow weights other than 0 and 1. Who sets it divides the loss by
            the sum of weights (``denominator``): ``WeightedTrainerMixin`` does both.
    """

    pad_to: int | None = None
    pad_multiple: int = 1
    pad_id: int = 0
    train_all: bool = False
    return_labels: bool = True
    fractional_weights: bool = False

    def __call__(self, features: Sequence[Mapping[str, Any] | Sample]) -> dict[str, Any]:
        """One pack of all features, T = sum of their lengths and the pad tail.

        Returns:
            ``input_ids``, ``position_ids``, ``shift_labels`` and ``labels`` (1, T) int64,
            ``cu_seq_lens_q`` and ``cu_seq_lens_k`` (B + 1,) int32, ``max_length_q`` and
            ``max_length_k`` as Python ints, ``rows`` (S,) int64 (the supervised ones, padded with
            -1 to a multiple of 128, from which a patched model knows them without waiting for the
            device), ``use_cache`` False, and ``shift_weights`` (1, T) fp32 if a weight is neither 0
            nor 1. No label crosses from one sample to the next.

        Raises:
            ValueError: no features, or one that contradicts itself, is padded, does not say what
                is trained, or has fractional weights that nobody asked for.
        """
        samples = [
            sample
            for index, feature in enumerate(features)
            for sample in _samples(feature, index, self.train_all)
        ]
        if not samples:
            raise ValueError("features must hold at least one feature, got none")
        lengths = [len(sample) for sample in samples]
        tail = tail_lengths(lengths, self.pad_to, self.pad_multiple)
        labels, weights = _targets(samples, sum(tail))
        batch = self._row([sample.input_ids for sample in samples], [*lengths, *tail])
        batch["shift_labels"] = labels[None]
        if self.return_labels:
            batch["labels"] = _unshifted(labels)[None]
        batch[ROWS] = supervised_rows(labels)
        if bool(((weights != 0) & (weights != 1)).any()):
            self._require_fractional(weights)
            batch["shift_weights"] = weights[None]
        return batch

    def _row(self, ids: list[np.ndarray], lengths: list[int]) -> dict[str, Any]:
        """The tokens and where each sequence begins and ends."""
        sequences = sequences_from_lengths(lengths)
        pad = np.full(sum(lengths) - sum(map(len, ids)), self.pad_id)
        return {
            "input_ids": torch.from_numpy(np.concatenate([*ids, pad]).astype(np.int64))[None],
            "position_ids": position_ids_from_lengths(lengths)[None],
            "cu_seq_lens_q": sequences.cu_seqlens,
            "cu_seq_lens_k": sequences.cu_seqlens,
            "max_length_q": sequences.max_seqlen,
            "max_length_k": sequences.max_seqlen,
            # Nothing is decoded from a pack. With a cache, HF's eager attention and SDPA do not
            # look for edges in the position ids, and samples would see their neighbours.
            "use_cache": False,
        }

    def _require_fractional(self, weights: Tensor) -> None:
        if self.fractional_weights:
            return
        odd = float(weights[(weights != 0) & (weights != 1)][0])
        raise ValueError(
            f"token_weights other than 0 and 1 (here {odd:g}) need "
            "varlen_sft.integrations.WeightedTrainerMixin: a Trainer divides the loss by the "
            "number of labels, not by the sum of weights. Write "
            "`class MyTrainer(WeightedTrainerMixin, Trainer): pass`"
        )


def _targets(samples: Sequence[Sample], pad: int) -> tuple[Tensor, Tensor]:
    """Labels (T,) int64 and weights (T,) fp32 of the rows; the last of a sample has no target."""
    labels: list[Any] = []
    weights: list[Any] = []
    for sample in samples:
        _, its_labels, its_weights = shift(sample)
        labels += [its_labels, [IGNORE_INDEX]]
        weights += [its_weights, [0.0]]
    labels.append(np.full(pad, IGNORE_INDEX))
    weights.append(np.zeros(pad))
    row, row_weights = np.concatenate(labels), np.concatenate(weights)
    return torch.from_numpy(row.astype(np.int64)), torch.from_numpy(row_weights.astype(np.float32))


def _unshifted(shift_labels: Tensor) -> Tensor:
    """The same targets at the tokens themselves; the first token of a sample is nobody's target,
    because the row before it, the last of another sample, has none."""
    return torch.cat([shift_labels.new_full((1,), IGNORE_INDEX), shift_labels[:-1]])


def _samples(feature: Mapping[str, Any] | Sample, index: int, train_all: bool) -> list[Sample]:
    """The sample of a feature, or the samples of a row that was packed before."""
    if isinstance(feature, Sample):
        return [feature]
    where = f"feature {index}"
    ids = _column(feature, "input_ids", where)
    if not len(ids) or ids.dtype.kind not in "iu":
        raise ValueError(f"{where}: input_ids must be integers, one or more, got {ids[:3]}")
    weights = _weights(feature, ids, train_all, where)
    lengths = _lengths(feature, len(ids), where)
    _require_unpadded(feature, lengths, where)
    edges = np.cumsum(lengths)[:-1]
    pieces = zip(np.split(ids, edges), np.split(weights, edges), strict=True)
    return [Sample(i.astype(np.int32), w, np.zeros(len(i), np.uint8)) for i, w in pieces]


def _weights(
    feature: Mapping[str, Any], ids: np.ndarray, train_all: bool, where: str
) -> np.ndarray:
    """(L,) fp32: how much each token counts as a target, by all that the feature says of it."""
    given = [k for k in ("labels", *_MASKS, "token_weights") if feature.get(k) is not None]
    if not given and not train_all:
        raise ValueError(
            f"{where} does not say what is trained: it needs labels, assistant_masks, "
            "completion_mask or token_weights. If it had one, Trainer removed the column "
            "(remove_unused_columns=False keeps it); Collator(train_all=True) trains every token"
        )
    weights = np.ones(len(ids), np.float32)
    for key in given:
        column = _column(feature, key, where)
        if len(column) != len(ids):
            raise ValueError(f"{where}: {key} must have {len(ids)} entries, got {len(column)}")
        weights *= _as_weights(key, column, ids, where)
    return weights


def _as_weights(key: str, column: np.ndarray, ids: np.ndarray, where: str) -> np.ndarray:
    if key == "labels":
        wrong = (column != IGNORE_INDEX) & (column != ids)
        expected = "-100 or the token itself (they are shifted here, not before)"
    elif key in _MASKS:
        wrong = (column != 0) & (column != 1)
        expected = "0 or 1"
    else:
        wrong = ~(np.isfinite(column) & (column >= 0))
        expected = "finite and >= 0"
    if wrong.any():
        at = int(wrong.argmax())
        raise ValueError(f"{where}: {key} must be {expected}, got {column[at]} at token {at}")
    return column != IGNORE_INDEX if key == "labels" else column.astype(np.float32)


def _lengths(feature: Mapping[str, Any], total: int, where: str) -> list[int]:
    if feature.get("seq_lengths") is None:
        return [total]
    lengths = _column(feature, "seq_lengths", where).tolist()
    if sum(lengths) != total or min(lengths) < 1:
        raise ValueError(
            f"{where}: seq_lengths must be at least 1 each and sum to {total}, got {lengths}"
        )
    return lengths


def _require_unpadded(feature: Mapping[str, Any], lengths: list[int], where: str) -> None:
    """What a feature says besides may repeat what the collator makes, not contradict it."""
    if feature.get("attention_mask") is not None:
        mask = _column(feature, "attention_mask", where)
        if len(mask) != sum(lengths) or not (mask == 1).all():
            raise ValueError(
                f"{where} must be unpadded: attention_mask must be {sum(lengths)} ones, got "
                f"{int((mask == 1).sum())} ones of {len(mask)}"
            )
    if feature.get("position_ids") is not None:
        positions = _column(feature, "position_ids", where)
        if not np.array_equal(positions, position_ids_from_lengths(lengths).numpy()):
            raise ValueError(
                f"{where}: position_ids must count from 0 in each sample; a row that is a pack "
                f"already needs seq_lengths, got position_ids {positions[:8]}"
            )


def _column(feature: Mapping[str, Any], key: str, where: str) -> np.ndarray:
    if feature.get(key) is None:
        raise ValueError(f"{where} must have {key}, it has {sorted(feature)}")
    column = np.asarray(feature[key])
    if column.ndim != 1:
        raise ValueError(f"{where}: {key} must have one axis, got shape {column.shape}")
    return column
