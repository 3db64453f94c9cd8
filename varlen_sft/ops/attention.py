"""Causal attention inside each sequence of a pack, with one meaning whoever computes it."""

from __future__ import annotations

import torch
from torch import Tensor

from varlen_sft import reference
from varlen_sft.ops.backends import resolve
from varlen_sft.ops.checks import (
    FLOATS,
    require_dtype,
    require_last_axis_contiguous,
    require_same_device,
    require_shape,
)
from varlen_sft.types import Sequences

__all__ = ["varlen_attention"]

_UPCAST_BACKWARD_BELOW = 256
"""torch's CPU backward in bf16 is slower than in fp32, casts included, below this length
(measured: 4.9x at 16 tokens, 3.2x at 64, 2.1x at 128, equal at 256). Its forward is faster at
every length."""


def varlen_attention(
    q: Tensor,  # (T, H, D)
    k: Tensor,  # (T_k, K, D)
    v: Tensor,  # (T_k, K, D)
    sequences: Sequences,
    *,
    k_sequences: Sequences | None = None,
    softmax_scale: float | None = None,
    window_size: int | None = None,
    softcap: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Causal attention of every sequence with itself alone; no T x T mask exists.

    Args:
        q, k, v: fp64, fp32, bf16 or fp16, H a multiple of K (grouped queries). Any strides with a
            contiguous last axis.
        sequences: where q's sequences begin and end; together they cover T.
        k_sequences: those of k and v, if they differ; as many as q's. Causality is then aligned
            bottom-right: the last query of a sequence sees its last key.
        softmax_scale: D ** -0.5 by default.
        window_size: a query sees this many keys at most, its own counted.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
        impl: None, "sdpa" (torch's kernel, sequence by sequence) or "reference".

    Returns:
        (T, H, D). A query that sees no key gives 0.

    Raises:
        TypeError: a dtype other than the above, or q, k, v of different ones.
        ValueError: shapes, devices or sequences that do not fit.
    """
    _check(q, k, v, sequences, k_sequences)
    if window_size is not None and window_size < 1:
        raise ValueError(f"window_size must be at least 1, got {window_size}")
    impl = resolve("attention", impl, q.device)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    special = window_size is not None or bool(softcap) or k_sequences is not None
    if impl == "sdpa" and not special:
        if q.device.type == "cpu":
            return torch.ops.varlen_sft.sdpa_cpu(q, k, v, sequences.cu_seqlens, scale)[0]
        return _sdpa_per_sequence(q, k, v, sequences, scale)
    # torch's kernels align causality top-left and know no softcap: these go sequence by sequence
    # through the eager formula, whose largest tensor is (H, L, L) of one sequence.
    return reference.varlen_attention(
        q, k, v, sequences, k_sequences=k_sequences, softmax_scale=scale,
        window_size=window_size, softcap=softcap,
    )  # fmt: skip


def _check(q, k, v, sequences: Sequences, k_sequences: Sequences | None) -> None:
    require_dtype("q", q, FLOATS)
    require_dtype("k", k, (q.dtype,))
    require_dtype("v", v, (q.dtype,))
    require_shape("q", q, "T H D", None, None, None)
    k_total = q.shape[0] if k_sequences is None else None
    require_shape("k", k, "T_k K D", k_total, None, q.shape[2])
    require_shape("v", v, "T_k K D", *k.shape)
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q must have a multiple of K={k.shape[1]} heads, got H={q.shape[1]}")
    require_same_device(q=q, k=k, v=v, cu_seqlens=sequences.cu_seqlens)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require_last_axis_contiguous(name, tensor)
    if torch.compiler.is_compiling() or q.device.type != "cpu":
        return  # reading cu_seqlens would wait for the device
    _check_cover("sequences", sequences, q)
    if k_sequences is not None:
        _check_cover("k_sequences", k_sequences, k)
        if len(k_sequences.cu_seqlens) != len(sequences.cu_seqlens):
            raise ValueError(
                f"k_sequences must hold as many sequences as q's, {len(sequences.cu_seqlens) - 1}, "
                f"got {len(k_sequences.cu_seqlens) - 1}"
            )


def _check_cover(name: str, sequences: Sequences, x: Tensor) -> None:
    end = int(sequences.cu_seqlens[-1])
    if end != x.shape[0]:
        raise ValueError(
            f"{name} must cover all {x.shape[0]} tokens, got cu_seqlens ending at {end}"
        )


def _sdpa_per_sequence(q, k, v, sequences: Sequences, scale: float) -> Tensor:
    lengths = sequences.lengths()
    out = []
    for piece in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        qi, ki, vi = (x.transpose(0, 1)[None] for x in piece)
        o = torch.nn.functional.scaled_dot_product_attention(
            qi, ki, vi, is_causal=True, scale=scale, enable_gqa=True
        )
        out.append(o[0].transpose(0, 1))
    return torch.cat(out) if out else torch.zeros_like(q)


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
    return q.new_empty(q.shape[:2], dtype=reference.accumulation_dtype(q.dtype))


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
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)


def _backward(ctx, dout: Tensor, _dlse):
    *saved, cu_seqlens = ctx.saved_tensors
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    grads = torch.ops.varlen_sft.sdpa_cpu_backward(dout, *saved, cu_seqlens, ctx.scale)
    return *grads, None, None


_sdpa_cpu.register_autograd(_backward, setup_context=_setup_context)
