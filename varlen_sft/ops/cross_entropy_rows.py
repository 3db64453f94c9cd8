"""From rows of logits to loss and gradient: the step between the head's matrix products."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from varlen_sft.reference import masked_cross_entropy
from varlen_sft.types import IGNORE_INDEX, LossOptions

ROW_MULTIPLE = 128
"""Row counts are padded to it and chunks are multiples of it: few shapes, full tiles."""

_BLOCK_BYTES = 8 * 2**20
"""The eager path works on so many bytes of fp32 logits at a time, to stay near the cache."""


def supervised_rows(labels: Tensor, token_weights: Tensor | None = None) -> Tensor:
    """Indices of supervised rows in ascending order, -1 after them, padded to a multiple of 128.

    Args:
        labels: (T,) int64.
        token_weights: (T,), or None for all ones.

    Returns:
        (S,) int64. On a device S is T rounded up, so that nothing waits for the count.
    """
    supervised = labels != IGNORE_INDEX
    if token_weights is not None:
        supervised = supervised & (token_weights > 0)
    total = labels.shape[0]
    if labels.device.type == "cpu":
        rows = supervised.nonzero().flatten()
    else:
        order = torch.argsort(~supervised, stable=True)
        rows = torch.where(torch.arange(total, device=labels.device) < supervised.sum(), order, -1)
    return torch.nn.functional.pad(rows, (0, -rows.shape[0] % ROW_MULTIPLE), value=-1)


def readable(rows: Tensor) -> Tensor:
    """``rows`` to read by: a pad (-1) reads the last row of all that are meant, 0 if none is.

    Its gradient is 0, and 0 * NaN is NaN: a row that nobody scores may hold anything.
    """
    if rows.shape[0] == 0:
        return rows
    return torch.where(rows >= 0, rows, rows.amax().clamp(min=0))


class RowScores(NamedTuple):
    """What is known of each of n rows, in fp32 (fp64 for fp64); 0 where one is not supervised."""

    loss: Tensor
    lse: Tensor
    correct: Tensor  # bool
    entropy: Tensor
    weight: Tensor  # of the row's target
    factor: Tensor | None = None
    """d loss_sum / d logits is this, by row, times what was left in logits; None: 1."""

    def sums(self) -> tuple[Tensor, Tensor]:
        """loss_sum and weight_sum, added in an order that depends on n alone."""
        return (self.loss * self.weight).sum(), self.weight.sum()


def sweeps_twice(dtype: torch.dtype, options: list[float]) -> bool:
    """Whether Triton's kernel needs a row's sum before its first gradient; see that module."""
    return dtype == torch.float16 or options[2] != 0


def leaves_factor(impl: str, dtype: torch.dtype, options: list[float]) -> bool:
    """Whether ``score_rows`` with write_grad leaves a factor per row beside the logits."""
    return impl == "triton" and not sweeps_twice(dtype, options)


def score_rows(
    logits: Tensor,  # (n, V), overwritten by its gradient when write_grad
    labels: Tensor,  # (n,) int64
    weights: Tensor,  # (n,) fp32 or fp64
    options: list[float],  # softcap, logit_scale, label_smoothing, z_loss
    write_grad: bool,
    impl: str,
    cu_seqlens: Tensor | None = None,  # (B + 1,) int32, "cpp" only: labels, weights are unshifted
) -> RowScores:
    """Loss and metrics of each row, of labels and weights that ``check_values`` has let pass."""
    if impl == "triton":
        from varlen_sft.ops.cross_entropy_triton import score_rows_triton

        scored = score_rows_triton(logits, labels, weights, options, write_grad=write_grad)
        return RowScores(*scored[:5], scored.factor)
    loss, lse, entropy, counted = (torch.zeros_like(weights) for _ in range(4))
    correct = torch.zeros_like(labels, dtype=torch.bool)
    if impl == "cpp":
        torch.ops.varlen_sft_c.ce_rows(
            logits, labels, weights, cu_seqlens, loss, lse, correct, entropy, counted, *options,
            write_grad,
        )  # fmt: skip
    else:
        _eager_rows(logits, labels, weights, (loss, lse, correct, entropy), options, write_grad)
        supervised = (labels != IGNORE_INDEX) & (weights > 0)
        counted = torch.where(supervised, weights, 0)
    return RowScores(loss, lse, correct, entropy, counted)


def _eager_rows(logits, labels, weights, outputs, options: list[float], write_grad: bool) -> None:
    softcap, logit_scale, label_smoothing, z_loss = options
    named = LossOptions(softcap, logit_scale, label_smoothing, z_loss)
    block = max(1, _BLOCK_BYTES // (4 * logits.shape[1]))
    for start in range(0, logits.shape[0], block):
        part = slice(start, start + block)
        x, y, w = logits[part], labels[part], weights[part]
        scored = masked_cross_entropy(x, y, token_weights=w, options=named)
        for out, value in zip(outputs, scored[2:], strict=True):
            out[part] = value
        if write_grad:
            x.copy_(_gradient(x, y, w, scored.lse, named))


def _gradient(x: Tensor, labels: Tensor, weights: Tensor, lse: Tensor, o: LossOptions) -> Tensor:
    """weight * d loss / d logits, by hand: inside a torch.library op autograd records nothing.

    With p = softmax(x): d lse = p, d x[label] = onehot, d mean(x) = 1 / V, and the chain through
    x = softcap * tanh(scale * logits / softcap) is scale * (1 - tanh^2).
    """
    supervised = ((labels != IGNORE_INDEX) & (weights > 0))[:, None]
    x = x.to(lse.dtype).masked_fill(~supervised, 0) * o.logit_scale
    chain = torch.full((), o.logit_scale, dtype=x.dtype, device=x.device)
    if o.softcap:
        tanh = torch.tanh(x / o.softcap)
        x, chain = o.softcap * tanh, chain * (1 - tanh.square())
    lse = lse[:, None]
    grad = torch.exp(x - lse) * (1 + 2 * o.z_loss * lse) - o.label_smoothing / x.shape[1]
    target = labels.clamp(min=0)[:, None]
    grad.scatter_add_(1, target, torch.full_like(lse, o.label_smoothing - 1))
    return (grad * chain * weights[:, None]).masked_fill(~supervised, 0)


def check_values(labels: Tensor, weights: Tensor, vocabulary: int) -> None:
    """On the CPU a ValueError that names the row; on a device an assertion there, no wait."""
    bad_label = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= vocabulary))
    bad_weight = ~((weights >= 0) & (weights < math.inf))
    if labels.device.type != "cpu":
        torch._assert_async(~bad_label.any(), "labels must be -100 or in [0, V)")
        torch._assert_async(~bad_weight.any(), "token_weights must be finite and >= 0")
        return
    if bad_label.any():
        row = int(bad_label.nonzero()[0])
        raise ValueError(
            f"labels must be {IGNORE_INDEX} or in [0, {vocabulary}), "
            f"got {int(labels[row])} at row {row}"
        )
    if bad_weight.any():
        row = int(bad_weight.nonzero()[0])
        raise ValueError(
            f"token_weights must be finite and >= 0, got {float(weights[row])} at row {row}"
        )
