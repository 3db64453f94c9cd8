"""The ``torch.library`` ops of the cross-entropy: fakes and gradients beside each."""

from __future__ import annotations

import torch
from torch import Tensor

from varlen_sft.ops.cross_entropy_chunks import (
    Head,
    count_rows,
    deferred_gradients,
    defers,
    fits_one_chunk,
)
from varlen_sft.ops.cross_entropy_rows import RowScores, check_values, leaves_factor, score_rows
from varlen_sft.types import accumulation_dtype


def _fields(scores: RowScores) -> tuple[Tensor, ...]:
    """LossOutput's, in its order."""
    return *scores.sums(), scores.loss, scores.lse, scores.correct, scores.entropy


def _fake_fields(scores: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    def new(shape, dtype=None) -> Tensor:
        return scores.new_empty(shape, dtype=dtype or accumulation_dtype(scores.dtype))

    rows = labels.shape
    return new(()), new(()), new(rows), new(rows), new(rows, torch.bool), new(rows)


def _scaled(grad: Tensor, dloss: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * dloss rounded to dtype, in one pass and without a wait for dloss."""
    if not dloss.is_cpu:
        dloss = dloss.reshape(1)  # of 0 dimensions it would be rounded to grad's dtype first
    return torch.mul(grad, dloss, out=torch.empty_like(grad, dtype=dtype))


# ------------------------------------------- of logits, gradients in the forward


@torch.library.custom_op("varlen_sft::masked_cross_entropy", mutates_args=())
def _masked(
    logits: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    options: list[float],
    need_grad: bool,
    impl: str,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_values(labels, token_weights, logits.shape[1])
    scratch = logits.clone(memory_format=torch.contiguous_format)
    scores = score_rows(scratch, labels, token_weights, options, need_grad, impl, cu_seqlens)
    return *_fields(scores), scratch if need_grad else logits.new_empty(0)  # type: ignore[return-value]


@_masked.register_fake
def _(logits, labels, token_weights, options, need_grad, impl, cu_seqlens=None):
    return *_fake_fields(logits, labels), logits.new_empty(logits.shape if need_grad else 0)


def _masked_setup(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient
    ctx.save_for_backward(output[6])


def _masked_backward(ctx, dloss: Tensor, *_):
    (dlogits,) = ctx.saved_tensors
    return _scaled(dlogits, dloss, dlogits.dtype), *(None,) * 6


_masked.register_autograd(_masked_backward, setup_context=_masked_setup)


# ------------------------------- of logits in Triton, gradients in the backward


@torch.library.custom_op("varlen_sft::masked_cross_entropy_triton", mutates_args=())
def _triton(
    logits: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    options: list[float],
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from varlen_sft.ops.cross_entropy_triton import score_rows_triton

    check_values(labels, token_weights, logits.shape[1])
    scored = score_rows_triton(
        logits, labels, token_weights, options, cu_seqlens=cu_seqlens, keep_state=True
    )
    kept = scored.targets, scored.counted, scored.state
    return *_fields(RowScores(*scored[:5])), *kept  # type: ignore[return-value]


@_triton.register_fake
def _(logits, labels, token_weights, options, cu_seqlens):
    new = torch.empty_like(token_weights), token_weights.new_empty(len(labels), 4)
    return *_fake_fields(logits, labels), torch.empty_like(labels), *new


@torch.library.custom_op("varlen_sft::masked_cross_entropy_triton_backward", mutates_args=())
def _triton_gradient(
    logits: Tensor,
    targets: Tensor,
    counted: Tensor,
    state: Tensor,
    lse: Tensor,
    dloss: Tensor,
    options: list[float],
) -> Tensor:
    from varlen_sft.ops.cross_entropy_triton import rows_backward

    return rows_backward(logits, targets, counted, state, lse, dloss, options)


@_triton_gradient.register_fake
def _(logits, targets, counted, state, lse, dloss, options):
    return logits.new_empty(logits.shape)


def _triton_setup(ctx, inputs, output) -> None:
    ctx.options = inputs[3]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient
    lse, kept = output[3], output[6:]
    ctx.save_for_backward(inputs[0], *kept, lse)


def _triton_backward(ctx, dloss: Tensor, *_):
    return _triton_gradient(*ctx.saved_tensors, dloss, ctx.options), *(None,) * 4


_triton.register_autograd(_triton_backward, setup_context=_triton_setup)


# ----------------------------------------------------- of hidden rows, in chunks


@torch.library.custom_op("varlen_sft::linear_cross_entropy", mutates_args=())
def _linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    token_weights: Tensor,
    rows: Tensor | None,
    options: list[float],
    chunk_bytes: int,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
    impl: str,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]:  # fmt: skip
    head = Head(hidden, weight, bias, (need_dhidden, need_dweight, need_dbias), options, impl)
    return head.run(labels, token_weights, rows, chunk_bytes)  # type: ignore[return-value]


@_linear.register_fake
def _(hidden, weight, bias, labels, token_weights, rows, options, chunk_bytes, need_dhidden,
      need_dweight, need_dbias, impl):  # fmt: skip
    accumulate = accumulation_dtype(hidden.dtype)
    total = count_rows(labels, rows)
    one = fits_one_chunk(total, weight, chunk_bytes, need_dweight)
    later = defers(total, weight, chunk_bytes, need_dweight)
    kept = total if later and (need_dhidden or need_dweight or need_dbias) else 0
    factors = kept if leaves_factor(impl, hidden.dtype, options) else 0
    return (
        *_fake_fields(hidden, labels),
        hidden.new_empty(hidden.shape if need_dhidden and not kept else 0),
        hidden.new_empty(
            weight.shape if need_dweight and not kept else 0,
            dtype=hidden.dtype if one else accumulate,
        ),
        hidden.new_empty(weight.shape[:1] if need_dbias and not kept else 0, dtype=accumulate),
        hidden.new_empty((kept, weight.shape[0]) if kept else 0),
        labels.new_empty(kept),
        hidden.new_empty(factors, dtype=accumulate),
    )


@torch.library.custom_op("varlen_sft::linear_cross_entropy_backward", mutates_args=())
def _linear_gradients(
    dlogits: Tensor,
    scored: Tensor,
    factor: Tensor,
    hidden: Tensor,
    weight: Tensor,
    dloss: Tensor,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    needs = need_dhidden, need_dweight, need_dbias
    return deferred_gradients(dlogits, scored, factor, hidden, weight, dloss, needs)


@_linear_gradients.register_fake
def _(dlogits, scored, factor, hidden, weight, dloss, need_dhidden, need_dweight, need_dbias):
    return (
        hidden.new_empty(hidden.shape if need_dhidden else 0),
        hidden.new_empty(weight.shape if need_dweight else 0),
        hidden.new_empty(weight.shape[:1] if need_dbias else 0),
    )


def _linear_setup(ctx, inputs, output) -> None:
    hidden, weight = inputs[:2]
    ctx.dtype, ctx.needs = hidden.dtype, inputs[8:11]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient
    later = output[9:] if len(output[10]) else ()
    ctx.save_for_backward(*((*later, hidden, weight) if later else output[6:9]))


def _linear_backward(ctx, dloss: Tensor, *_):
    if len(ctx.saved_tensors) == 5:
        made = _linear_gradients(*ctx.saved_tensors, dloss, *ctx.needs)
    else:
        made = tuple(
            _scaled(grad, dloss, ctx.dtype) if need else None
            for grad, need in zip(ctx.saved_tensors, ctx.needs, strict=True)
        )
    gradients = (grad if need else None for grad, need in zip(made, ctx.needs, strict=True))
    return *gradients, *(None,) * 9


_linear.register_autograd(_linear_backward, setup_context=_linear_setup)
