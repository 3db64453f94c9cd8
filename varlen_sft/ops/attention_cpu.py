"""The C++ attention of csrc/attention.cpp as a torch.library op with fake and autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from varlen_sft.types import Sequences, accumulation_dtype


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    k_sequences: Sequences,
    scale: float,
    window_size: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention (T, H, D), aligned bottom-right."""
    edges = sequences.cu_seqlens, k_sequences.cu_seqlens
    return torch.ops.varlen_sft.attention_cpu(
        q, k, v, *edges, scale, window_size or 0, softcap or 0.0
    )[0]


def _new_lse(q: Tensor) -> Tensor:
    return q.new_empty((q.shape[1], q.shape[0]), dtype=accumulation_dtype(q.dtype))


@torch.library.custom_op("varlen_sft::attention_cpu", mutates_args=(), device_types="cpu")
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    k_cu_seqlens: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """out (T, H, D) and log2 of the sums of exp(scores), (H, T); window 0, softcap 0: none."""
    out, lse = q.new_empty(q.shape), _new_lse(q)
    torch.ops.varlen_sft_c.attention_forward(
        out, lse, q, k, v, cu_seqlens, k_cu_seqlens, scale, window, softcap
    )
    return out, lse


@_attention.register_fake
def _(q, k, v, cu_seqlens, k_cu_seqlens, scale, window, softcap):
    return q.new_empty(q.shape), _new_lse(q)


@torch.library.custom_op("varlen_sft::attention_cpu_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    k_cu_seqlens: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    torch.ops.varlen_sft_c.attention_backward(
        dq, dk, dv, dout, q, k, v, out, lse, cu_seqlens, k_cu_seqlens, scale, window, softcap
    )
    return dq, dk, dv


@_attention_backward.register_fake
def _(dout, q, k, v, out, lse, cu_seqlens, k_cu_seqlens, scale, window, softcap):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, cu_seqlens, k_cu_seqlens, *ctx.options = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # no zeros for lse
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, k_cu_seqlens)


def _backward(ctx, dout: Tensor, _dlse):
    # An expanded gradient (of a sum, say) has stride 0 on its last axis.
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    grads = torch.ops.varlen_sft.attention_cpu_backward(dout, *ctx.saved_tensors, *ctx.options)
    return *grads, *(None,) * 5


_attention.register_autograd(_backward, setup_context=_setup_context)
