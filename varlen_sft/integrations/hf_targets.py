"""What a call of a Hugging Face model wants each row to learn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from varlen_sft.integrations.exact import require_exact
from varlen_sft.integrations.packed import ROWS, Packed, require_that
from varlen_sft.ops.checks import INTEGERS, require_dtype, require_shape
from varlen_sft.types import IGNORE_INDEX

__all__ = ["Targets"]


@dataclass(frozen=True)
class Targets:
    """The target of every row of a batch (B, L), flattened, and how much it counts."""

    labels: Tensor  # (B L,) int64, shifted, -100 where there is none
    weights: Tensor | None  # (B L,) fp32
    rows: Tensor | None  # (S,) int64, supervised rows padded with -1, if the call brought them

    @property
    def total(self) -> int:
        return self.labels.shape[0]

    @classmethod
    def from_call(cls, call: Mapping[str, Any], packed: Packed | None) -> Targets:
        """Of ``shift_labels`` or of ``labels``, which are shifted here, row by row.

        In a pack the last row of a sequence has no target: the next token is another sample's.

        Raises:
            TypeError: labels that are no integers, weights that are not fp32.
            ValueError: shapes that do not fit; ``rows`` that are not those of the labels;
                ``num_items_in_batch`` beside labels of which some are not trained, because they
                cross from one sequence to the next.
        """
        shape = _shape(call)
        rows = call.get(ROWS) if packed is None else packed.rows
        if packed is not None and packed.labels is not None:
            _require_shape("labels of a pack", packed.labels[None], shape)
            targets = cls(packed.labels.long(), packed.token_weights, rows)
        else:
            targets = cls(*_of_keywords(call, packed, shape), rows)
        if targets.rows is not None and rows is call.get(ROWS):  # beside labels, not with them
            targets._require_rows(targets.rows)
        return targets

    def supervised_rows(self) -> Tensor:
        """(S,) int64, ascending: those that the call brought, or found, which waits for the device
        once."""
        if self.rows is not None:
            return self.rows
        return self._supervised().nonzero().flatten()

    def _supervised(self) -> Tensor:
        supervised = self.labels != IGNORE_INDEX
        if self.weights is not None:
            supervised = supervised & (self.weights > 0)
        return supervised

    def _require_rows(self, rows: Tensor) -> None:
        """Whoever changes labels of a finished batch leaves its rows behind."""
        require_dtype(ROWS, rows, (torch.int64,))
        require_shape(ROWS, rows, "S", None)
        outside = (rows < -1) | (rows >= self.total)
        place = torch.where(outside | (rows < 0), self.total, rows)
        named = rows.new_zeros(self.total + 1).index_add_(0, place, torch.ones_like(rows))
        fit = (named[:-1] == self._supervised()).all() & ~outside.any()
        message = (
            "rows must be the supervised rows of the labels, each once, then -1 (who changes the "
            "labels of a finished batch has to make its rows anew, or to leave them out)"
        )
        require_that(fit, message, lambda: rows[rows != -1].tolist())


def _of_keywords(
    call: Mapping[str, Any], packed: Packed | None, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor | None]:
    """Labels and weights of each row of (B, L), flattened."""
    name = "labels" if call.get("shift_labels") is None else "shift_labels"
    given: Tensor = call[name]
    require_dtype(name, given, INTEGERS)
    _require_shape(name, given, shape)
    if name == "labels":
        given = torch.nn.functional.pad(given, (0, 1), value=IGNORE_INDEX)[:, 1:]
    flat = given.flatten().long()
    if name == "labels" and packed is not None:
        flat = _inside(flat, packed, call.get("num_items_in_batch") is not None)
    weights = call.get("shift_weights")
    if weights is None:
        return flat, None
    require_exact("shift_weights", weights)
    require_dtype("shift_weights", weights, (torch.float32,))
    _require_shape("shift_weights", weights, shape)
    return flat, weights.flatten()


def _shape(call: Mapping[str, Any]) -> tuple[int, ...]:
    ids = call.get("input_ids")
    inputs = call.get("inputs_embeds") if ids is None else ids
    if inputs is None:
        raise ValueError("input_ids or inputs_embeds must come with labels")
    return tuple(inputs.shape[:2])


def _require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape (B, L) = {shape}, got {tuple(tensor.shape)}")


def _inside(labels: Tensor, packed: Packed, counted: bool) -> Tensor:
    """Labels without those that cross an edge of the pack."""
    ends = labels.new_zeros(labels.shape[0] + 1, dtype=torch.bool)
    ends.index_fill_(0, packed.sequences.cu_seqlens.long(), True)
    crossing = ends[1:] & (labels != IGNORE_INDEX)
    if counted and bool(crossing.any()):
        raise ValueError(
            f"labels must be {IGNORE_INDEX} at the first token of every sequence of a pack, got "
            f"{int(crossing.sum())} that are not: num_items_in_batch counts them, but a token of "
            "another sample is never learnt (varlen_sft.Collator, and transformers' "
            "DataCollatorWithFlattening, leave them out)"
        )
    return labels.masked_fill(ends[1:], IGNORE_INDEX)
