"""The loss head in chunks: gather supervised rows, score them, multiply back, accumulate."""

from __future__ import annotations

import torch
from torch import Tensor

from varlen_sft.ops.cross_entropy_rows import (
    ROW_MULTIPLE,
    check_values,
    score_rows,
    supervised_rows,
)
from varlen_sft.types import IGNORE_INDEX, accumulation_dtype


class Head:
    """One pass over the supervised rows of a pack, which leaves loss and gradients.

    Args:
        hidden: (T, C).
        weight: (V, C).
        bias: (V,) or None.
        needs: whether the gradients of hidden, weight and bias are wanted.
        options: softcap, logit_scale, label_smoothing, z_loss.
        impl: who scores the rows.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: tuple[bool, bool, bool],
        options: list[float],
        impl: str,
    ) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.needs, self.options, self.impl = needs, options, impl
        accumulate = accumulation_dtype(hidden.dtype)
        total, vocabulary = hidden.shape[0], weight.shape[0]
        self.dhidden = hidden.new_zeros(hidden.shape if needs[0] else 0)
        # Sums over chunks are held in fp32: bf16 loses a late chunk beside many earlier ones.
        self.dweight = hidden.new_zeros(weight.shape if needs[1] else 0, dtype=accumulate)
        self.dbias = hidden.new_zeros(vocabulary if needs[2] else 0, dtype=accumulate)
        self.sums = [hidden.new_zeros((), dtype=accumulate) for _ in range(2)]
        self.per_row = [
            hidden.new_zeros(total, dtype=dtype)
            for dtype in (accumulate, accumulate, torch.bool, accumulate)
        ]

    def run(
        self, labels: Tensor, token_weights: Tensor, rows: Tensor | None, chunk_bytes: int
    ) -> tuple[Tensor, ...]:
        """LossOutput's fields, then gradients of hidden, weight, bias (empty if not needed)."""
        check_values(labels, token_weights, self.weight.shape[0])
        if rows is None:
            rows = supervised_rows(labels, token_weights)
        if rows.device.type == "cpu":
            rows = self._check_rows(rows)
        for chunk in rows.split(self._chunk_rows(chunk_bytes)):
            self._add_chunk(chunk, labels, token_weights)
        return *self.sums, *self.per_row, self.dhidden, self.dweight, self.dbias

    def _chunk_rows(self, chunk_bytes: int) -> int:
        row_bytes = self.weight.shape[0] * self.hidden.element_size()
        return max(ROW_MULTIPLE, chunk_bytes // row_bytes // ROW_MULTIPLE * ROW_MULTIPLE)

    def _check_rows(self, rows: Tensor) -> Tensor:
        """The real rows, without the -1 that pad them."""
        rows = rows[rows != -1]
        if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= self.hidden.shape[0]):
            bad = rows[(rows < 0) | (rows >= self.hidden.shape[0])][0]
            raise ValueError(f"rows must be in [-1, {self.hidden.shape[0]}), got {int(bad)}")
        return rows

    def _add_chunk(self, rows: Tensor, labels: Tensor, token_weights: Tensor) -> None:
        index = rows.clamp(min=0)
        target = torch.where(rows >= 0, labels[index], IGNORE_INDEX)
        inputs = self.hidden[index]
        logits = torch.nn.functional.linear(inputs, self.weight, self.bias)
        scored = score_rows(
            logits, target, token_weights[index], self.options, any(self.needs), self.impl
        )
        for total, value in zip(self.sums, scored[:2], strict=True):
            total += value
        for out, value in zip(self.per_row, scored[2:], strict=True):
            # A pad (-1) points at row 0 and holds 0: adding keeps what row 0 really has.
            out.index_put_((index,), value, accumulate=True)
        self._add_gradients(logits, inputs, index)

    def _add_gradients(self, dlogits: Tensor, inputs: Tensor, index: Tensor) -> None:
        need_dhidden, need_dweight, need_dbias = self.needs
        if need_dhidden:
            self.dhidden.index_add_(0, index, dlogits @ self.weight)
        if need_dweight:
            self.dweight += dlogits.T @ inputs
        if need_dbias:
            self.dbias += dlogits.sum(0, dtype=self.dbias.dtype)
