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
    leaves_factor,
    readable,
    score_rows,
    supervised_rows,
)
from varlen_sft.types import IGNORE_INDEX, accumulation_dtype

UNWRITTEN = -2
"""Where there is room for more rows than were found."""


def count_rows(labels: Tensor, rows: Tensor | None) -> int:
    """How many rows are scored, pads counted; those that are still to be found may be all (T,)."""
    return -(-len(labels) // ROW_MULTIPLE) * ROW_MULTIPLE if rows is None else len(rows)


def chunk_rows(weight: Tensor, chunk_bytes: int, need_dweight: bool) -> int:
    """Rows of logits at a time, a multiple of 128 and at least that.

    As many as fit into chunk_bytes. A gradient of the weight (V, C) that is summed over chunks is
    rounded to its dtype at the end: C rows of logits take no more memory than what is made there.
    """
    row_bytes = weight.shape[0] * weight.element_size()
    rows = max(chunk_bytes // row_bytes, weight.shape[1] if need_dweight else 0)
    return max(ROW_MULTIPLE, rows // ROW_MULTIPLE * ROW_MULTIPLE)


def fits_one_chunk(total: int, weight: Tensor, chunk_bytes: int, need_dweight: bool) -> bool:
    """Whether ``total`` rows, supervised or not, are one chunk: their gradient is no sum then.

    What a sum over chunks would take beside the gradient, fp32 where it is bf16, logits may take
    instead: the peak is the same, and nothing is added up or rounded in passes of its own.
    """
    rows = chunk_rows(weight, chunk_bytes, need_dweight)
    if need_dweight:
        wide, narrow = accumulation_dtype(weight.dtype).itemsize, weight.element_size()
        rows += weight.shape[1] * (wide - narrow) // narrow
    return total <= rows


def defers(total: int, weight: Tensor, chunk_bytes: int, need_dweight: bool) -> bool:
    """Whether gradients are multiplied in the backward, where the factor of the loss is known.

    A product, or a small matrix beside it, takes the factor for nothing and rounds once with it; a
    gradient that was rounded before would be swept again and rounded again. The logits of one chunk
    then live until the head's backward, which is the next thing that runs: the peak stays what it
    is. fp16 has no exponents for such a factor on a device, where no product takes it.
    """
    held = weight.dtype != torch.float16 or weight.device.type == "cpu"
    return held and fits_one_chunk(total, weight, chunk_bytes, need_dweight)


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
        self.sums = [hidden.new_zeros((), dtype=self.accumulate) for _ in range(2)]
        self.per_row = [
            hidden.new_zeros(total, dtype=dtype)
            for dtype in (self.accumulate, self.accumulate, torch.bool, self.accumulate)
        ]
        self.dhidden, self.dweight, self.dlogits = (hidden.new_empty(0) for _ in range(3))
        self.dbias, self.factor = (hidden.new_empty(0, dtype=self.accumulate) for _ in range(2))

    def run(
        self, labels: Tensor, token_weights: Tensor, rows: Tensor | None, chunk_bytes: int
    ) -> tuple[Tensor, ...]:
        """LossOutput's fields, then gradients of hidden, weight, bias (empty if not needed).

        The last are the gradient of the logits, the rows it is of (-1: of none, and 0; UNWRITTEN:
        whatever was there), and the factor of each (``RowScores``; empty: 1): these instead of the
        others, if they are left to the backward (``defers``).
        """
        check_values(labels, token_weights, self.weight.shape[0])
        total = count_rows(labels, rows)
        self.one_chunk = fits_one_chunk(total, self.weight, chunk_bytes, self.needs[1])
        later = any(self.needs) and defers(total, self.weight, chunk_bytes, self.needs[1])
        scored = labels.new_full((total if later else 0,), UNWRITTEN)
        rows = self._checked(supervised_rows(labels, token_weights) if rows is None else rows)
        self._allocate(len(scored))
        if later:
            scored[: len(rows)] = rows
        many = chunk_rows(self.weight, chunk_bytes, self.needs[1])
        size = max(len(rows), 1) if self.one_chunk else many
        for chunk, index in zip(rows.split(size), readable(rows).split(size), strict=True):
            self._add_chunk(chunk, index, labels, token_weights)
        per_row = (out[:-1] for out in self.per_row)
        gradients = self.dhidden[:-1], self.dweight, self.dbias
        return *self.sums, *per_row, *gradients, self.dlogits, scored, self.factor

    def _allocate(self, kept: int) -> None:
        """What chunks write to: the gradients, or the ``kept`` rows of those of the logits."""
        need_dhidden, need_dweight, need_dbias = self.needs
        vocab = self.weight.shape[0]
        if kept:
            self.dlogits = self.hidden.new_empty(kept, vocab)
            factors = kept if leaves_factor(self.impl, self.hidden.dtype, self.options) else 0
            self.factor = self.hidden.new_zeros(factors, dtype=self.accumulate)
            return
        if need_dhidden:
            self.dhidden = self.hidden.new_zeros(len(self.hidden) + 1, self.hidden.shape[1])
        if need_dbias:
            self.dbias = self.hidden.new_zeros(vocab, dtype=self.accumulate)
        if need_dweight and not self.one_chunk:
            # Sums over chunks are held in fp32: bf16 loses a late chunk beside many earlier ones.
            self.dweight = self.weight.new_zeros(self.weight.shape, dtype=self.accumulate)

    def _checked(self, rows: Tensor) -> Tensor:
        """The rows, with the -1 that pad them: also on a CPU, where products are compiled for every
        new shape, matrices of a few more rows cost less than that."""
        total = self.hidden.shape[0]
        good = (rows >= -1) & (rows < total)
        if rows.device.type != "cpu":
            torch._assert_async(good.all(), "rows must be in [-1, T)")
        elif not good.all():
            raise ValueError(f"rows must be in [-1, {total}), got {int(rows[~good][0])}")
        return rows

    def _add_chunk(
        self, rows: Tensor, index: Tensor, labels: Tensor, token_weights: Tensor
    ) -> None:
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
        elif scores.factor is not None:
            self.factor[: len(rows)] = scores.factor

    def _add_gradients(
        self, dlogits: Tensor, inputs: Tensor, scores: RowScores, place: Tensor
    ) -> None:
        """From d loss_sum / d logits, which may want the factor of each row (``RowScores``)."""
        need_dhidden, need_dweight, need_dbias = self.needs
        factor = None if scores.factor is None else scores.factor[:, None]
        if need_dhidden:
            dinputs = _product(dlogits, self.weight, wide=factor is not None)
            self.dhidden.index_copy_(0, place, _times(dinputs, factor, self.hidden.dtype))
        if need_dweight:
            self._add_dweight(dlogits, _times(inputs, factor, self.hidden.dtype))
        if need_dbias:
            if factor is None:
                self.dbias += dlogits.sum(0, dtype=self.accumulate)
            else:
                row = factor.T.to(dlogits.dtype)
                self.dbias += _product(row, dlogits, wide=True)[0]

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


def _times(x: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x * factor, computed in fp32 and rounded once to the dtype."""
    if factor is None:
        return x
    return torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype))


def _product(a: Tensor, b: Tensor, wide: bool) -> Tensor:
    """a @ b, with ``wide`` in fp32 where that costs no pass of its own."""
    accumulate = accumulation_dtype(a.dtype)
    if wide and a.dtype != accumulate and _multiplies_into_fp32(a.device.type):
        return torch.mm(a, b, out_dtype=accumulate)
    return a @ b


# ------------------------------------------------------------- in the backward


def deferred_gradients(
    dlogits: Tensor,
    scored: Tensor,
    factor: Tensor,
    hidden: Tensor,
    weight: Tensor,
    dloss: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dloss * the gradients of hidden, weight and bias (empty if not needed), each rounded once.

    Args:
        dlogits: (n, V), in its first rows d loss_sum / d logits up to ``factor``.
        scored: (n,) int64, the rows of hidden that they belong to, -1 for rows of zeros; UNWRITTEN
            at the end for those that were never written.
        factor: (n,) fp32, or empty for ones.
        hidden: (T, C).
        weight: (V, C).
        dloss: ().
    """
    if dloss.is_cpu:
        written = int((scored != UNWRITTEN).sum())
        dlogits, scored, factor = dlogits[:written], scored[:written], factor[:written]
    inputs = hidden[readable(scored)]
    if dloss.is_cpu and not len(factor):
        dinputs, dweight, dbias = _by_alpha(dlogits, inputs, weight, dloss, needs)
    else:
        factor = (dloss * factor if len(factor) else dloss.expand(len(scored)))[:, None]
        dinputs, dweight, dbias = _by_rows(dlogits, inputs, weight, factor, needs)
    if not needs[0]:
        return dinputs, dweight, dbias
    dhidden = hidden.new_zeros(len(hidden) + 1, hidden.shape[1])  # pads write to the last
    place = torch.where(scored >= 0, scored, len(hidden))
    return dhidden.index_copy_(0, place, dinputs)[:-1], dweight, dbias


def _by_alpha(dlogits, inputs, weight, dloss, needs) -> tuple[Tensor, Tensor, Tensor]:
    """The products take the factor of the loss, which the CPU knows."""
    alpha = dloss.item()
    dinputs, dweight, dbias = (inputs.new_empty(0) for _ in range(3))
    if needs[0]:
        dinputs = _scaled_product(dlogits, weight, alpha)
    if needs[1]:
        dweight = _scaled_product(dlogits.T, inputs, alpha)
    if needs[2]:
        wide = dlogits.sum(0, dtype=accumulation_dtype(inputs.dtype)) * dloss
        dbias = wide.to(inputs.dtype)
    return dinputs, dweight, dbias


def _by_rows(dlogits, inputs, weight, factor, needs) -> tuple[Tensor, Tensor, Tensor]:
    """The small matrices beside the products take the factors: nothing waits for the device."""
    dtype = inputs.dtype
    dinputs, dweight, dbias = (inputs.new_empty(0) for _ in range(3))
    if needs[0]:
        dinputs = _times(_product(dlogits, weight, wide=True), factor, dtype)
    if needs[1]:
        dweight = dlogits.T @ _times(inputs, factor, dtype)
    if needs[2]:
        dbias = _product(factor.T.to(dtype), dlogits, wide=True)[0].to(dtype)
    return dinputs, dweight, dbias


def _scaled_product(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    out = a.new_empty(a.shape[0], b.shape[1])
    return torch.addmm(out, a, b, beta=0, alpha=alpha, out=out)
