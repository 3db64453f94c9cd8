"""Triton kernels of the cross-entropy; ``cross_entropy_triton`` explains and launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from varlen_sft.ops.cross_entropy_triton_parts import (
    LN2,
    LOG2E,
    fold,
    log1p,
    raised,
    scores,
    target,
)

NEG_INF = tl.constexpr(float("-inf"))
HEADROOM = tl.constexpr(60.0)  # 2^60 times 2^18 tokens stays far below bf16's and fp32's 2^128


@triton.jit
def _shrink(base, end, factor, BLOCK: tl.constexpr):
    """Multiply what was written so far."""
    tl.debug_barrier()  # whoever wrote it
    for begin in range(0, end, BLOCK):
        place = base + begin + tl.arange(0, BLOCK)
        tl.store(place, (tl.load(place).to(tl.float32) * factor).to(base.dtype.element_ty))
        tl.debug_barrier()  # or the compiler unrolls what hardly ever runs, and spills


@triton.jit
def _sweep(
    base, vocab, label, x_label, softcap, logit_scale,
    SOFTCAP: tl.constexpr, SCALE: tl.constexpr, SMOOTHING: tl.constexpr, WRITE: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums over a row of e = exp(d), d = x - reference - remainder; WRITE leaves e in x's place.

    Returns reference, remainder, sums of e and of e * d over all tokens but the label, sum of x,
    and whether the label's x is not the first of the largest.
    """
    lanes = tl.arange(0, BLOCK)
    logits = tl.load(base + lanes, mask=lanes < vocab, other=0.0)
    x, slope = scores(logits, softcap, logit_scale, SOFTCAP, SCALE)
    reference = tl.maximum(tl.max(tl.where(lanes < vocab, x, NEG_INF)), x_label)
    reference = tl.where(reference > NEG_INF, reference, 0.0)  # -inf - -inf would be NaN
    remainder = 0.0
    others = tl.zeros([BLOCK // ALIGN], tl.float32)
    dot = tl.zeros([BLOCK // ALIGN], tl.float32)
    total = tl.zeros([BLOCK // ALIGN], tl.float32)
    beaten = tl.zeros([BLOCK // ALIGN], tl.int32)
    for begin in range(0, vocab, BLOCK):
        columns = begin + lanes
        # The next block is on its way while this one is worked on.
        ahead = tl.load(base + BLOCK + columns, mask=columns + BLOCK < vocab, other=0.0)
        x, slope = scores(logits, softcap, logit_scale, SOFTCAP, SCALE)
        x = tl.where(columns < vocab, x, NEG_INF)
        d = (x - reference) - remainder
        top = tl.max(d) * LOG2E
        if top > HEADROOM:
            rise = tl.ceil(top)
            reference, remainder = raised(reference, remainder, rise)
            d = (x - reference) - remainder
            dot = (dot - others * (rise * LN2)) * tl.exp2(-rise)
            others *= tl.exp2(-rise)
            if WRITE:
                _shrink(base, begin, tl.exp2(-rise), BLOCK)
        e = tl.exp2(d * LOG2E)
        rest = tl.where(columns == label, 0.0, e)
        others += fold(rest, ALIGN)
        dot += fold(rest * tl.maximum(d, -1e30), ALIGN)  # 0 * -inf would be NaN
        if SMOOTHING:
            total += fold(tl.where(columns < vocab, x, 0.0), ALIGN)
        beats = (x > x_label) | ((x == x_label) & (columns < label))
        beaten += fold(beats.to(tl.int32), ALIGN)
        if WRITE:
            e = e * slope if SOFTCAP else e
            tl.store(base + columns, e.to(base.dtype.element_ty), mask=columns < vocab)
        logits = ahead
    lost = tl.max(beaten) > 0
    return reference, remainder, tl.sum(others), tl.sum(dot), tl.sum(total), lost


@triton.jit
def _write_gradient(
    source, out, begin, vocab, label, scale, reference, remainder, inverse, others,
    lse_slope, shift, softcap, logit_scale, SOFTCAP: tl.constexpr, SCALE: tl.constexpr,
    SMOOTHING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scale * d loss / d x of a block, from its logits and the sums of its row.

    inverse is 1 / sum, others the share of all tokens but the label, 1 - p without cancellation.
    """
    columns = begin + tl.arange(0, BLOCK)
    logits = tl.load(source + columns, mask=columns < vocab, other=0.0)
    x, slope = scores(logits, softcap, logit_scale, SOFTCAP, SCALE)
    p = tl.exp2(((x - reference) - remainder) * LOG2E) * inverse
    gradient = p * lse_slope - shift / vocab
    at_label = p * (lse_slope - 1) - others + (shift - shift / vocab)
    gradient = tl.where(columns == label, at_label, gradient) * slope * scale
    tl.store(out + columns, gradient.to(out.dtype.element_ty), mask=columns < vocab)


@triton.jit
def _clear_row(
    row, base, vocab, loss_ptr, lse_ptr, entropy_ptr, correct_ptr, state_ptr, factor_ptr,
    WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tl.store(loss_ptr + row, 0.0)
    tl.store(lse_ptr + row, 0.0)
    tl.store(entropy_ptr + row, 0.0)
    tl.store(correct_ptr + row, False)
    if state_ptr is not None:
        tl.store(state_ptr + 4 * row.to(tl.int64) + tl.arange(0, 4), tl.zeros([4], tl.float32))
    if factor_ptr is not None:
        tl.store(factor_ptr + row, 0.0)
    if WRITE:
        for begin in range(0, vocab, BLOCK):
            columns = begin + tl.arange(0, BLOCK)
            zero = tl.zeros([BLOCK], base.dtype.element_ty)
            tl.store(base + columns, zero, mask=columns < vocab)


@triton.jit(do_not_specialize=["stride_units", "vocab_units", "n_rows", "n_edges"])
def ce_rows_kernel(
    logits_ptr, labels_ptr, weights_ptr, cu_seqlens_ptr,  # cu_seqlens: None, or labels unshifted
    loss_ptr, lse_ptr, entropy_ptr, correct_ptr, counted_ptr,
    targets_ptr, state_ptr,  # for ce_backward_kernel, or None
    factor_ptr,  # None: no gradient, or all of it by TWO_SWEEPS
    stride_units, vocab_units, n_rows, n_edges, softcap, logit_scale, label_smoothing, z_loss,
    SOFTCAP: tl.constexpr, SCALE: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    TWO_SWEEPS: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row; see the module."""
    row = tl.program_id(0)
    # In units of ALIGN elements, so that the compiler sees how wide an access may be.
    base = logits_ptr + row.to(tl.int64) * stride_units * ALIGN
    vocab = vocab_units * ALIGN
    WRITE: tl.constexpr = factor_ptr is not None
    label, weight = target(labels_ptr, weights_ptr, cu_seqlens_ptr, row, n_rows, n_edges)
    tl.store(counted_ptr + row, weight)
    if targets_ptr is not None:
        tl.store(targets_ptr + row, label)
    if weight == 0:
        _clear_row(
            row, base, vocab, loss_ptr, lse_ptr, entropy_ptr, correct_ptr, state_ptr, factor_ptr,
            WRITE or TWO_SWEEPS, BLOCK,
        )  # fmt: skip
        return

    known = (label >= 0) & (label < vocab)  # asserted before; here it only bounds the address
    at_label = tl.load(base + label, mask=known, other=float("nan"))
    x_label, slope = scores(at_label, softcap, logit_scale, SOFTCAP, SCALE)
    reference, remainder, others, dot, total, lost = _sweep(
        base, vocab, label, x_label, softcap, logit_scale, SOFTCAP, SCALE, SMOOTHING, WRITE,
        ALIGN, BLOCK,
    )  # fmt: skip
    d_label = (x_label - reference) - remainder
    e_label = tl.exp2(d_label * LOG2E)
    sum = others + e_label
    log_sum = tl.log(sum)
    lse = reference + (remainder + log_sum)
    loss = tl.where(e_label > others, log1p(others / e_label), log_sum - d_label)
    if SMOOTHING:
        loss += label_smoothing * (lse - total / vocab - loss)
    lse_slope = 1.0
    if Z_LOSS:
        loss += z_loss * lse * lse
        lse_slope = 1 + 2 * z_loss * lse
    tl.store(loss_ptr + row, loss)
    tl.store(lse_ptr + row, lse)
    dot += e_label * tl.maximum(d_label, -1e30)
    tl.store(entropy_ptr + row, log_sum - dot / sum)
    tl.store(correct_ptr + row, (lost == 0) & (sum == sum))
    if state_ptr is not None:
        state = state_ptr + 4 * row.to(tl.int64)
        tl.store(state, reference)
        tl.store(state + 1, remainder)
        tl.store(state + 2, 1 / sum)
        tl.store(state + 3, others / sum)

    scale = weight * logit_scale
    if WRITE:
        # A factor of 0 could not be made good at the label; 1e-6 of a slope is below any rounding.
        lse_slope = tl.where(tl.abs(lse_slope) < 1e-6, 1e-6, lse_slope) if Z_LOSS else 1.0
        at_label = ((lse_slope - 1) * e_label - others) / lse_slope * slope
        tl.debug_barrier()  # the label's entry was written by another thread
        tl.store(base + label, at_label.to(base.dtype.element_ty), mask=known)
        tl.store(factor_ptr + row, scale * lse_slope / sum)
    if TWO_SWEEPS:
        for block in range(0, tl.cdiv(vocab, BLOCK)):  # backwards: the end of the row is in cache
            begin = (tl.cdiv(vocab, BLOCK) - 1 - block) * BLOCK
            _write_gradient(
                base, base, begin, vocab, label, scale, reference, remainder, 1 / sum, others / sum,
                lse_slope, label_smoothing, softcap, logit_scale, SOFTCAP, SCALE, SMOOTHING, BLOCK,
            )  # fmt: skip


@triton.jit(do_not_specialize=["stride_units", "vocab_units"])
def ce_backward_kernel(
    logits_ptr, dlogits_ptr, targets_ptr, counted_ptr, state_ptr, lse_ptr, dloss_ptr,
    stride_units, vocab_units, softcap, logit_scale, label_smoothing, z_loss,
    SOFTCAP: tl.constexpr, SCALE: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dloss * d loss_sum / d logits into contiguous dlogits: a program per block of a row."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * BLOCK
    vocab = vocab_units * ALIGN
    out = dlogits_ptr + row * vocab_units * ALIGN
    weight = tl.load(counted_ptr + row)
    if weight == 0:
        columns = begin + tl.arange(0, BLOCK)
        zero = tl.zeros([BLOCK], out.dtype.element_ty)
        tl.store(out + columns, zero, mask=columns < vocab)
        return
    lse_slope = 1 + 2 * z_loss * tl.load(lse_ptr + row) if Z_LOSS else 1.0
    state = state_ptr + 4 * row
    _write_gradient(
        logits_ptr + row * stride_units * ALIGN, out, begin, vocab, tl.load(targets_ptr + row),
        weight * logit_scale * tl.load(dloss_ptr), tl.load(state), tl.load(state + 1),
        tl.load(state + 2), tl.load(state + 3), lse_slope, label_smoothing, softcap, logit_scale,
        SOFTCAP, SCALE, SMOOTHING, BLOCK,
    )  # fmt: skip
