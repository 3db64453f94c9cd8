"""Triton kernels of RMSNorm and SwiGLU; ``elementwise_triton`` explains and launches them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(base, row, stride, col, live, VEC: tl.constexpr):
    """Rows of a (T, C) tensor; 0 where nothing lives."""
    at = base + tl.multiple_of(row * stride, VEC)[:, None] + col
    return tl.load(at, mask=live, other=0.0)


# Strides come with one hint, VEC, in place of Triton's own specialisation: a new layout or a single
# token compiles nothing anew.
@triton.jit(do_not_specialize=["num_rows", "x_stride", "residual_stride"])
def rms_norm_kernel(
    out, total, rstd,  # (T, C), (T, C) and (T,) fp32
    x, residual, weight,  # (T, C), (T, C) and (C,); residual and total None: no addition
    num_rows: tl.int64, x_stride: tl.int64, residual_stride: tl.int64, eps,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    VEC: tl.constexpr,  # divides every stride
):  # fmt: skip
    dtype: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    col = tl.arange(0, BLOCK_C)[None, :]
    live = (row < num_rows)[:, None] & (col < C)
    at = row[:, None] * C + col
    scale = tl.load(weight + col, mask=col < C, other=0.0).to(tl.float32)
    value = _tile(x, row, x_stride, col, live, VEC).to(tl.float32)
    if residual is not None:
        value += _tile(residual, row, residual_stride, col, live, VEC).to(tl.float32)
        value = value.to(dtype)
        tl.store(total + at, value, mask=live)
        value = value.to(tl.float32)
    root = tl.rsqrt(tl.sum(value * value, axis=1) / C + eps)
    tl.store(rstd + row, root, mask=row < num_rows)
    normed = (value * root[:, None]).to(dtype).to(tl.float32)
    tl.store(out + at, (scale * normed).to(dtype), mask=live)


@triton.jit(do_not_specialize=["num_rows", "dout_stride", "x_stride", "dtotal_stride"])
def rms_norm_backward_kernel(
    dx, partial,  # (T, C); (programs, C) fp32, None: nobody asks for dweight
    dout, x, weight, rstd, dtotal,  # dtotal: what else flows into x, (T, C), or None
    num_rows: tl.int64, dout_stride: tl.int64, x_stride: tl.int64, dtotal_stride: tl.int64,
    C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (g - unit * mean(g * unit)) + dtotal, g = dout * weight, unit = x * rstd."""
    dtype: tl.constexpr = dx.dtype.element_ty
    col = tl.arange(0, BLOCK_C)[None, :]
    scale = tl.load(weight + col, mask=col < C, other=0.0)
    sums = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    step = tl.num_programs(0).to(tl.int64) * BLOCK_T
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = (row < num_rows)[:, None] & (col < C)
    ahead = _tile(dout, row, dout_stride, col, live, VEC)
    x_ahead = _tile(x, row, x_stride, col, live, VEC)
    root_ahead = tl.load(rstd + row, mask=row < num_rows, other=0.0)
    if dtotal is not None:
        more_ahead = _tile(dtotal, row, dtotal_stride, col, live, VEC)
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK_T, num_rows, step):
        grad, root = ahead.to(tl.float32), root_ahead[:, None]
        unit = x_ahead.to(tl.float32) * root
        row = first + step + tl.arange(0, BLOCK_T)  # on its way while this one is worked on
        live = (row < num_rows)[:, None] & (col < C)
        ahead = _tile(dout, row, dout_stride, col, live, VEC)
        x_ahead = _tile(x, row, x_stride, col, live, VEC)
        root_ahead = tl.load(rstd + row, mask=row < num_rows, other=0.0)
        sums += grad * unit
        weighted = grad * scale.to(tl.float32)
        pull = tl.sum(weighted * unit, axis=1) / C
        grad = (weighted - unit * pull[:, None]) * root
        if dtotal is not None:
            grad += more_ahead.to(tl.float32)
            more_ahead = _tile(dtotal, row, dtotal_stride, col, live, VEC)
        row = first + tl.arange(0, BLOCK_T)
        live = (row < num_rows)[:, None] & (col < C)
        tl.store(dx + row[:, None] * C + col, grad.to(dtype), mask=live)
    if partial is not None:
        at = tl.program_id(0) * C + tl.arange(0, BLOCK_C)
        tl.store(partial + at, tl.sum(sums, axis=0), mask=tl.arange(0, BLOCK_C) < C)


@triton.jit(do_not_specialize=["num_partials"])
def rms_norm_dweight_kernel(
    dweight, partial,  # (C,) and (programs, C) fp32
    num_partials, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    col = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, num_partials, BLOCK_P):
        row = first + tl.arange(0, BLOCK_P)[:, None]
        live = (row < num_partials) & (col[None, :] < C)
        sums += tl.load(partial + row * C + col[None, :], mask=live, other=0.0)
    tl.store(dweight + col, tl.sum(sums, axis=0).to(dweight.dtype.element_ty), mask=col < C)


@triton.jit
def _part(base, row, stride, col, COLS: tl.constexpr, VEC: tl.constexpr):
    return tl.load(base + tl.multiple_of(row * stride, VEC) + col, mask=col < COLS).to(tl.float32)


@triton.jit(do_not_specialize=["gate_stride", "up_stride"])
def silu_mul_kernel(
    out,  # (T, I)
    gate, up,  # (T, I) each; up None: the second half of gate, (T, 2 I)
    gate_stride: tl.int64, up_stride: tl.int64,
    COLS: tl.constexpr,  # I
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,  # columns of a program, programs of a row
    VEC: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) // BLOCKS
    col = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    g = _part(gate, row, gate_stride, col, COLS, VEC)
    u = _part(gate + COLS if up is None else up, row, up_stride, col, COLS, VEC)
    silu = (g / (1 + tl.exp(-g))).to(dtype).to(tl.float32)
    tl.store(out + row * COLS + col, (silu * u).to(dtype), mask=col < COLS)


@triton.jit(do_not_specialize=["dout_stride", "gate_stride", "up_stride"])
def silu_mul_backward_kernel(
    dgate, dup,  # (T, I) each; dup None: both in dgate, (T, 2 I)
    dout, gate, up,  # (T, I); gate and up as above
    dout_stride: tl.int64, gate_stride: tl.int64, up_stride: tl.int64,
    COLS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """dgate = dout * up * s * (1 + gate * (1 - s)), s = sigmoid(gate); dup = dout * silu(gate)."""
    dtype: tl.constexpr = dgate.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) // BLOCKS
    col = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    d = _part(dout, row, dout_stride, col, COLS, VEC)
    g = _part(gate, row, gate_stride, col, COLS, VEC)
    u = _part(gate + COLS if up is None else up, row, up_stride, col, COLS, VEC)
    s = 1 / (1 + tl.exp(-g))
    silu = (g * s).to(dtype).to(tl.float32)
    at = row * (2 * COLS if up is None else COLS) + col
    tl.store(dgate + at, (d * u * (s * (1 + g * (1 - s)))).to(dtype), mask=col < COLS)
    tl.store((dgate + COLS if up is None else dup) + at, (d * silu).to(dtype), mask=col < COLS)
