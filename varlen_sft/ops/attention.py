"""Causal attention inside each sequence of a pack, with one meaning whoever computes it."""

from __future__ import annotations

import torch
from torch import Tensor

from varlen_sft import reference
from varlen_sft.ops import attention_cpu, attention_flash, attention_sdpa
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
        impl: None, or by name. CUDA: "flash_attn_2", "torch_varlen", and on request only
            "flash_attn_3", "flash_attn_4" (bf16 and fp16; a tail that sequences do not cover is not
            written). CPU: "cpp" (bf16 on AMX tiles where there are any, else on vectors in fp32,
            fp64 for fp64). Both: "sdpa" (torch's kernel, sequence by sequence) and "reference".

    Returns:
        (T, H, D). A query that sees no key gives 0.

    Raises:
        TypeError: a dtype other than the above, or q, k, v of different ones.
        ValueError: shapes, devices or sequences that do not fit.
    """
    _check(q, k, v, sequences, k_sequences)
    if window_size is not None and window_size < 1:
        raise ValueError(f"window_size must be at least 1, got {window_size}")
    impl = resolve(
        "attention", impl, q.device, lambda name: attention_flash.refusal(name, q, softcap)
    )
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if impl in attention_flash.IMPLS:
        return attention_flash.flash_attention(
            impl, q, k, v, sequences, k_sequences=k_sequences, softmax_scale=scale,
            window_size=window_size, softcap=softcap,
        )  # fmt: skip
    if impl == "cpp":
        return attention_cpu.attend(
            q, k, v, sequences, k_sequences or sequences, scale, window_size, softcap
        )
    if impl == "sdpa" and window_size is None and not softcap:
        return attention_sdpa.attend(q, k, v, sequences, k_sequences, scale)
    # torch's kernels know neither: these go sequence by sequence through the eager formula, whose
    # largest tensor is (H, L, L) of one sequence.
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
