"""torch's scaled_dot_product_attention, called once for every sequence of a pack."""

from __future__ import annotations

import torch
from torch import Tensor

from varlen_sft.reference import attention_mask
from varlen_sft.types import Sequences, accumulation_dtype

_UPCAST_BACKWARD_BELOW = 256
"""torch's CPU backward in bf16 is slower than in fp32, casts included, below this length
(measured: 4.9x at 16 tokens, 3.2x at 64, 2.1x at 128, equal at 256). Its forward is faster at
every length."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    k_sequences: Sequences | None,
    scale: float,
) -> Tensor:
    """Causal attention (T, H, D), aligned bottom-right. Waits for the device."""
    if q.device.type == "cpu" and k_sequences is None:
        return torch.ops.varlen_sft.sdpa_cpu(q, k, v, sequences.cu_seqlens, scale)[0]
    return _sdpa_per_sequence(q, k, v, sequences, k_sequences or sequences, scale)


def _sdpa_per_sequence(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, k_sequences: Sequences, scale: float
) -> Tensor:
    lengths, k_lengths = sequences.lengths(), k_sequences.lengths()
    pieces = zip(q.split(lengths), k.split(k_lengths), v.split(k_lengths), strict=True)
    out = [_sdpa(*piece, scale) for piece in pieces]
    return torch.cat(out) if out else torch.zeros_like(q)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One sequence. torch aligns causality top-left: unequal lengths take a mask (L, L_k)."""
    blind = max(0, len(q) - len(k))  # see no key: torch's kernels differ in what they give those
    seeing = q[blind:]
    mask = None
    if len(seeing) != len(k):
        mask = attention_mask(len(seeing), len(k), None, q.device)
    qi, ki, vi = (x.transpose(0, 1)[None] for x in (seeing, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        qi, ki, vi, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )[0].transpose(0, 1)
    return torch.cat([out.new_zeros(blind, *q.shape[1:]), out]) if blind else out


# ------------------------------------------------------- CPU, sequence by sequence


def _spans(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    ends = cu_seqlens.tolist()
    return [(a, b) for a, b in zip(ends, ends[1:], strict=False) if b > a]


def _heads_first(x: Tensor, start: int, end: int) -> Tensor:
    return x[start:end].transpose(0, 1)[None]  # (1, H, L, D), a view


@torch.library.custom_op("varlen_sft::sdpa_cpu", mutates_args=(), device_types="cpu")
def _sdpa_cpu(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = q.new_empty(q.shape), _new_lse(q)
    for start, end in _spans(cu_seqlens):
        piece = (_heads_first(x, start, end) for x in (q, k, v))
        o, row_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *piece, 0.0, True, scale=scale
        )
        out[start:end] = o[0].transpose(0, 1)
        lse[start:end] = row_lse[0].transpose(0, 1)
    return out, lse


def _new_lse(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:2], dtype=accumulation_dtype(q.dtype))


@_sdpa_cpu.register_fake
def _(q, k, v, cu_seqlens, scale):
    return q.new_empty(q.shape), _new_lse(q)


@torch.library.custom_op("varlen_sft::sdpa_cpu_backward", mutates_args=(), device_types="cpu")
def _sdpa_cpu_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = tuple(x.new_empty(x.shape) for x in (q, k, v))
    for start, end in _spans(cu_seqlens):
        do, qi, ki, vi, oi = (_heads_first(x, start, end) for x in (dout, q, k, v, out))
        if q.dtype in (torch.bfloat16, torch.float16) and end - start < _UPCAST_BACKWARD_BELOW:
            do, qi, ki, vi, oi = (x.float() for x in (do, qi, ki, vi, oi))
        row_lse = lse[start:end].transpose(0, 1).contiguous()[None]
        pieces = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, qi, ki, vi, oi, row_lse, 0.0, True, scale=scale
        )
        for grad, piece in zip(grads, pieces, strict=True):
            grad[start:end] = piece[0].transpose(0, 1)
    return grads  # type: ignore[return-value]


@_sdpa_cpu_backward.register_fake
def _(dout, q, k, v, out, lse, cu_seqlens, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # no zeros for lse
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)


def _backward(ctx, dout: Tensor, _dlse):
    *saved, cu_seqlens = ctx.saved_tensors
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    grads = torch.ops.varlen_sft.sdpa_cpu_backward(dout, *saved, cu_seqlens, ctx.scale)
    return *grads, None, None


_sdpa_cpu.register_autograd(_backward, setup_context=_setup_context)
