"""Pieces of the cross-entropy kernels: what a row learns, its scores, sums that keep digits."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LN2_HIGH = tl.constexpr(22713 / 32768)  # 15 bits of ln 2: exact times a whole number below 512
LN2_LOW = tl.constexpr(0.6931471805599453 - 22713 / 32768)
IGNORE = tl.constexpr(-100)


@triton.jit
def _tanh(u):
    """Polynomial near 0 (minimax fit, 7e-8 relative), where 1 - 2 / (e^2u + 1) would cancel."""
    z = u * u
    p = ((-6.2795e-3 * z + 2.107567e-2) * z - 5.385336e-2) * z + 1.3332597e-1
    near = u + u * z * (p * z - 3.3333318e-1)
    far = 1 - 2 / (tl.exp2(tl.abs(u) * (2 * LOG2E)) + 1)
    return tl.where(tl.abs(u) < 0.55, near, tl.where(u < 0, -far, far))


@triton.jit
def scores(logits, softcap, logit_scale, SOFTCAP: tl.constexpr, SCALE: tl.constexpr):
    """What the loss sees of raw logits, in fp32, and its slope without logit_scale."""
    x = logits.to(tl.float32)
    slope = tl.full(x.shape, 1.0, tl.float32)
    if SCALE:
        x = x * logit_scale
    if SOFTCAP:
        t = _tanh(x / softcap)
        x = softcap * t
        slope = 1 - t * t
    return x, slope


@triton.jit
def _is_edge(cu_seqlens_ptr, n_edges, position):
    """Whether a sequence ends before ``position``: binary search in ascending cu_seqlens."""
    low = position * 0
    high = low + n_edges
    while low < high:
        middle = (low + high) // 2
        below = tl.load(cu_seqlens_ptr + middle) < position
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return tl.load(cu_seqlens_ptr + low, mask=low < n_edges, other=-1) == position


@triton.jit
def target(labels_ptr, weights_ptr, cu_seqlens_ptr, row, n_rows, n_edges):
    """(label, weight) that the row learns; weight 0 where it learns nothing."""
    position = row
    if cu_seqlens_ptr is not None:
        position = row + 1
    inside = position < n_rows
    label = tl.load(labels_ptr + position, mask=inside, other=IGNORE)
    weight = tl.load(weights_ptr + position, mask=inside, other=0.0)
    supervised = (label != IGNORE) & (weight > 0)
    if cu_seqlens_ptr is not None:
        if supervised:
            supervised = _is_edge(cu_seqlens_ptr, n_edges, position) == 0
    return label.to(tl.int32), tl.where(supervised, weight, 0.0)


@triton.jit
def raised(reference, remainder, rise):
    """The sum of both plus rise * ln 2 (Knuth's sum): e shrinks by 2^rise, no more, no less."""
    high = rise * LN2_HIGH
    sum = reference + high
    back = sum - reference
    return sum, remainder + ((reference - (sum - back)) + (high - back)) + rise * LN2_LOW


@triton.jit
def log1p(u):
    """log(1 + u) for u >= 0 without the rounding of 1 + u (Kahan)."""
    sum = 1 + u
    return tl.where(sum == 1, u, tl.log(sum) * (u / tl.where(sum == 1, 1.0, sum - 1)))


@triton.jit
def fold(x, ALIGN: tl.constexpr):
    """Sums of ALIGN neighbours, all of one thread, which so keeps fewer running sums."""
    return tl.sum(tl.reshape(x, [x.shape[0] // ALIGN, ALIGN]), axis=1)
