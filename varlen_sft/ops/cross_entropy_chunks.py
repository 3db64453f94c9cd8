"""The loss head in chunks: gather supervised rows, score them, multiply back, accumulate."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from varlen_sft.ops.cross_entropy_rows import (
    ROW_MULTIPLE,
    RowScores,
    check_values,
    score_rows,
    supervised_rows,
)
from varlen_sft.types import IGNORE_INDEX, accumulation_dtype


def chunk_rows(weight: Tensor, chunk_bytes: int) -> int:
    """Rows of logits that fit into chunk_bytes, a multiple of 128 and at least that."""
    row_bytes = weight.shape[0] * weight.element_size()
    return max(ROW_MULTIPLE, chunk_bytes // row_bytes // ROW_MULTIPLE * ROW_MULTIPLE)


def fits_one_chunk(total: int, weight: Tensor, chunk_bytes: int) -> bool:
    """Whether ``total`` rows, supervised or not, are one chunk: their gradient is no sum then."""
    return total <= chunk_rows(weight, chunk_bytes)


def defers(hidden: Tensor, weight: Tensor, total: int, chunk_bytes: int, impl: str) -> bool:
    """Whether gradients are multiplied in the backward, where the factor of the loss is known.

    On a CPU a product takes the factor for nothing and rounds once with it; a gradient that was
    rounded before would be swept again and rounded again. The logits of one chunk then live until
    the head's backward, which is the next thing that runs: the peak stays what it is.
    """
    one = fits_one_chunk(total, weight, chunk_bytes)
    return one and hidden.device.type == "cpu" and impl != "triton"


@cache
def _multiplies_into_fp32(device_type: str) -> bool:
    """Whether torch has 16-bit matrix products with an fp32 result there; CPUs have none."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = "aten::mm.dtype", "aten::addmm.dtype_out"
    try:
        return all(has(name, device_type.upper()) for name in names)
    except RuntimeError:  # this torch does not know the overloads
        return False


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
        self.accumulate = accumulation_dtype(hidden.dtype)
        # Pads (-1) write to a row of their own behind the last, so that nothing is added and the
        # result has no order: adding by index would be atomic on a GPU.
        total = hidden.shape[0] + 1
        self.dhidden = hidden.new_zeros((total, hidden.shape[1]) if needs[0] else 0)
        self.dweight = hidden.new_empty(0)
        self.dbias = hidden.new_zeros(weight.shape[0] if needs[2] else 0, dtype=self.accumulate)
        self.dlogits = hidden.new_empty(0)
        self.sums = [hidden.new_zeros((), dtype=self.accumulate) for _ in range(2)]
        self.per_row = [
            hidden.new_zeros(total, dtype=dtype)
            for dtype in (self.accumulate, self.accumulate, torch.bool, self.accumulate)
        ]

    def run(
        self, labels: Tensor, token_weights: Tensor, rows: Tensor | None, chunk_bytes: int
    ) -> tuple[Tensor, ...]:
        """LossOutput's fields, then gradients of hidden, weight, bias (empty if not needed).

        The last are the gradient of the logits and the rows it is of, padded with -1: these instead
        of the others, if they are left to the backward (``defers``).
        """
        check_values(labels, token_weights, self.weight.shape[0])
        total = len(labels) if rows is None else len(rows)
        self.one_chunk = fits_one_chunk(total, self.weight, chunk_bytes)
        kept = total if defers(self.hidden, self.weight, total, chunk_bytes, self.impl) else 0
        scored = labels.new_full((kept if any(self.needs) else 0,), -1)
        rows = self._checked(supervised_rows(labels, token_weights) if rows is None else rows)
        if len(scored):
            scored[: len(rows)] = rows
            self.dlogits = self.hidden.new_empty(kept, self.weight.shape[0])
            self.dhidden = self.hidden.new_empty(0)
            self.dbias = self.dbias.new_empty(0)
        elif self.needs[1] and not self.one_chunk:
            # Sums over chunks are held in fp32: bf16 loses a late chunk beside many earlier ones.
            self.dweight = self.weight.new_zeros(self.weight.shape, dtype=self.accumulate)
        for chunk in rows.split(chunk_rows(self.weight, chunk_bytes)):
            self._add_chunk(chunk, labels, token_weights)
        per_row = (out[:-1] for out in self.per_row)
        gradients = self.dhidden[:-1], self.dweight, self.dbias
        return *self.sums, *per_row, *gradients, self.dlogits, scored

    def _checked(self, rows: Tensor) -> Tensor:
        """The rows; on the CPU only the real ones, without the -1 that pad them."""
        total = self.hidden.shape[0]
        if rows.device.type != "cpu":
            torch._assert_async(((rows >= -1) & (rows < total)).all(), "rows must be in [-1, T)")
            return rows
        rows = rows[rows != -1]
        if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= total):
            bad = rows[(rows < 0) | (rows >= total)][0]
            raise ValueError(f"rows must be in [-1, {total}), got {int(bad)}")
        return rows

    def _add_chunk(self, rows: Tensor, labels: Tensor, token_weights: Tensor) -> None:
        index = rows.clamp(min=0)
        target = torch.where(rows >= 0, labels[index], IGNORE_INDEX)
        inputs = self.hidden[index]
        if len(self.dlogits):
            logits = self.dlogits[: len(rows)]
            torch.mm(inputs, self.weight.T, out=logits)
            if self.bias is not None:
                logits += self.bias
        else:
            logits = torch.nn.functional.linear(inputs, self.weight, self.bias)
        scores = score_rows(
            logits, target, token_weights[index], self.options, any(self.needs), self.impl
        )
        for total, value in zip(self.sums, scores.sums(), strict=True):
            total += value
        place = torch.where(rows >= 0, rows, self.hidden.shape[0])
        for out, value in zip(self.per_row, scores[:4], strict=True):
            out.index_copy_(0, place, value)
        if not len(self.dlogits):
            self._add_gradients(logits, inputs, scores, place)

    def _add_gradients(
        self, dlogits: Tensor, inputs: Tensor, scores: RowScores, place: Tensor
    ) -> None:
        """From d loss_sum / d logits, which may want the factor of each row (``RowScores``)."""
        need_dhidden, need_dweight, need_dbias = self.needs
        factor = None if scores.factor is None else scores.factor[:, None]
        if need_dhidden:
            dinputs = self._product(dlogits, self.weight, wide=factor is not None)
            self.dhidden.index_copy_(0, place, self._times(dinputs, factor))
        if need_dweight:
            self._add_dweight(dlogits, self._times(inputs, factor))
        if need_dbias:
            if factor is None:
                self.dbias += dlogits.sum(0, dtype=self.accumulate)
            else:
                row = factor.T.to(dlogits.dtype)
                self.dbias += self._product(row, dlogits, wide=True)[0]

    def _times(self, x: Tensor, factor: Tensor | None) -> Tensor:
        """x * factor, computed in fp32 and rounded once to the dtype of hidden."""
        if factor is None:
            return x
        return torch.mul(x, factor, out=torch.empty_like(x, dtype=self.hidden.dtype))

    def _product(self, a: Tensor, b: Tensor, wide: bool) -> Tensor:
        """a @ b, with ``wide`` in fp32 where that costs no pass of its own."""
        if wide and a.dtype != self.accumulate and _multiplies_into_fp32(a.device.type):
            return torch.mm(a, b, out_dtype=self.accumulate)
        return a @ b

    def _add_dweight(self, dlogits: Tensor, inputs: Tensor) -> None:
        if self.one_chunk:
            self.dweight = dlogits.T @ inputs
        elif inputs.device.type == "cpu":
            self.dweight += dlogits.T @ inputs
        elif inputs.dtype == self.accumulate:
            self.dweight.addmm_(dlogits.T, inputs)
        elif _multiplies_into_fp32(inputs.device.type):
            # In the epilogue of the product: no (V, C) of its own, no sweep to add it.
            torch.ops.aten.addmm.dtype_out(
                self.dweight, dlogits.T, inputs, self.accumulate, out=self.dweight
            )
        else:
            self.dweight += dlogits.T @ inputs


def deferred_gradients(
    dlogits: Tensor,
    scored: Tensor,
    hidden: Tensor,
    weight: Tensor,
    dloss: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dloss * the gradients of hidden, weight and bias (empty if not needed), each rounded once.

    Args:
        dlogits: (n, V), d loss_sum / d logits in its first rows.
        scored: (n,) int64, the rows of hidden that they belong to, then -1.
        hidden: (T, C).
        weight: (V, C).
        dloss: () on the CPU.
    """
    rows = scored[scored >= 0]
    dlogits, factor = dlogits[: len(rows)], dloss.item()
    dhidden = torch.zeros_like(hidden) if needs[0] else hidden.new_empty(0)
    if needs[0]:
        dhidden.index_copy_(0, rows, _scaled_product(dlogits, weight, factor))
    dweight = _scaled_product(dlogits.T, hidden[rows], factor) if needs[1] else hidden.new_empty(0)
    dbias = hidden.new_empty(0)
    if needs[2]:
        wide = dlogits.sum(0, dtype=accumulation_dtype(hidden.dtype)) * dloss
        dbias = wide.to(hidden.dtype)
    return dhidden, dweight, dbias


def _scaled_product(a: Tensor, b: Tensor, factor: float) -> Tensor:
    out = a.new_empty(a.shape[0], b.shape[1])
    return torch.addmm(out, a, b, beta=0, alpha=factor, out=out)
