"""Cross-entropy of packed sequences, on supervised rows only, gradients made in the forward."""

from __future__ import annotations

import torch
from torch import Tensor

from varlen_sft.ops import cross_entropy_ops  # noqa: F401  registers torch.ops.varlen_sft.*
from varlen_sft.ops.backends import resolve
from varlen_sft.ops.checks import FLOATS, require_dtype, require_same_device, require_shape
from varlen_sft.ops.cross_entropy_rows import supervised_rows
from varlen_sft.reference import shifted_targets
from varlen_sft.types import LossOptions, LossOutput, Sequences, accumulation_dtype

__all__ = [
    "LossOptions",
    "LossOutput",
    "linear_cross_entropy",
    "masked_cross_entropy",
    "supervised_rows",
]


def linear_cross_entropy(
    hidden: Tensor,  # (T, C)
    linear_weight: Tensor,  # (V, C)
    labels: Tensor,  # (T,) int64
    *,
    token_weights: Tensor | None = None,  # (T,) fp32
    rows: Tensor | None = None,  # (S,) int64
    linear_bias: Tensor | None = None,  # (V,)
    options: LossOptions | None = None,
    impl: str | None = None,
) -> LossOutput:
    """Weighted cross-entropy of ``hidden @ linear_weight.T``; logits exist in chunks only.

    Rows that are not supervised (label -100 or weight 0) never meet the vocabulary. Where all rows
    are one chunk, the gradient of its logits is kept for the backward; of several, the gradients of
    hidden and weight are made while their logits are there, and the backward only scales them.

    Args:
        hidden, linear_weight, linear_bias: one dtype: fp64, fp32, bf16 or fp16.
        labels: the target of each row (already shifted), -100 where there is none.
        token_weights: finite and >= 0; ones by default.
        rows: the supervised rows, each once, padded with -1 (``supervised_rows``, ``PackedBatch``).
            Found from labels and weights when None.
        options: softcap, logit scale, label smoothing, z-loss, bytes of logits at a time.
        impl: None, "cpp" or "reference": who turns logits into loss and gradient.

    Returns:
        LossOutput; its loss_sum is fp32 (fp64 for fp64). Without a supervised row it is exactly 0.

    Raises:
        TypeError: a dtype other than the above.
        ValueError: shapes or devices that do not fit; on the CPU also a label outside [0, V), a
            weight that is negative or not finite, or a row outside [-1, T).
    """
    _check_linear(hidden, linear_weight, labels, linear_bias, rows)
    token_weights = _check_targets(labels, token_weights, hidden, hidden.shape[0])
    options = options or LossOptions()
    grad = torch.is_grad_enabled()
    outputs = torch.ops.varlen_sft.linear_cross_entropy(
        hidden, linear_weight, linear_bias, labels, token_weights, rows,
        _floats(options), options.chunk_bytes,
        grad and hidden.requires_grad,
        grad and linear_weight.requires_grad,
        grad and linear_bias is not None and linear_bias.requires_grad,
        _picked(impl, "hidden", hidden),
    )  # fmt: skip
    return LossOutput(*outputs[:6])


def masked_cross_entropy(
    logits: Tensor,  # (T, V)
    labels: Tensor,  # (T,) int64
    *,
    token_weights: Tensor | None = None,
    sequences: Sequences | None = None,
    options: LossOptions | None = None,
    impl: str | None = None,
) -> LossOutput:
    """Weighted cross-entropy of logits that already exist.

    Args:
        logits: fp64, fp32, bf16 or fp16. They are not changed.
        labels, token_weights: aligned with the rows that predict them; or, with ``sequences``,
            unshifted: row i then learns label i+1 if both belong to one sequence, else nothing, so
            that no sequence learns the first token of the next.
        options, impl: as in ``linear_cross_entropy``.

    Raises:
        TypeError, ValueError: as ``linear_cross_entropy``.
    """
    require_dtype("logits", logits, FLOATS)
    require_shape("logits", logits, "T V", None, None)
    token_weights = _check_targets(labels, token_weights, logits, logits.shape[0])
    picked = _picked(impl, "logits", logits)
    cu_seqlens = None
    if sequences is not None:
        require_same_device(logits=logits, cu_seqlens=sequences.cu_seqlens)
        if picked == "reference":
            labels, token_weights = shifted_targets(labels, token_weights, sequences)
        else:
            cu_seqlens = sequences.cu_seqlens
    numbers = _floats(options or LossOptions())
    if picked == "triton":
        op = torch.ops.varlen_sft.masked_cross_entropy_triton
        outputs = op(_rows_contiguous(logits), labels, token_weights, numbers, cu_seqlens)
    else:
        need_grad = torch.is_grad_enabled() and logits.requires_grad
        op = torch.ops.varlen_sft.masked_cross_entropy
        outputs = op(logits, labels, token_weights, numbers, need_grad, picked, cu_seqlens)
    return LossOutput(*outputs[:6])


def _picked(impl: str | None, name: str, scores: Tensor) -> str:
    """Who computes; fp64 is the reference's, which alone has it on a GPU."""
    picked = resolve("cross_entropy", impl, scores.device)
    if picked == "triton" and scores.dtype == torch.float64:
        if impl is not None:
            require_dtype(f'{name} for impl="triton"', scores, FLOATS[1:])
        return "reference"
    return picked


def _rows_contiguous(logits: Tensor) -> Tensor:
    """Rows may lie anywhere; only logits that are not neighbours within a row are copied."""
    return logits if logits.shape[1] <= 1 or logits.stride(1) == 1 else logits.contiguous()


def _floats(options: LossOptions) -> list[float]:
    return [options.softcap, options.logit_scale, options.label_smoothing, options.z_loss]


def _check_linear(hidden, linear_weight, labels, linear_bias, rows) -> None:
    require_dtype("hidden", hidden, FLOATS)
    require_shape("hidden", hidden, "T C", None, None)
    require_dtype("linear_weight", linear_weight, (hidden.dtype,))
    require_shape("linear_weight", linear_weight, "V C", None, hidden.shape[1])
    if linear_bias is not None:
        require_dtype("linear_bias", linear_bias, (hidden.dtype,))
        require_shape("linear_bias", linear_bias, "V", linear_weight.shape[0])
    if rows is not None:
        require_dtype("rows", rows, (torch.int64,))
        require_shape("rows", rows, "S", None)
    require_same_device(
        hidden=hidden, linear_weight=linear_weight, linear_bias=linear_bias, rows=rows
    )


def _check_targets(labels, token_weights, scores: Tensor, total: int) -> Tensor:
    """Weights in the dtype of the sums; labels and weights checked for dtype, shape and device."""
    require_dtype("labels", labels, (torch.int64,))
    require_shape("labels", labels, "T", total)
    compute = accumulation_dtype(scores.dtype)
    if token_weights is None:
        token_weights = torch.ones_like(labels, dtype=compute)
    require_dtype("token_weights", token_weights, FLOATS)
    require_shape("token_weights", token_weights, "T", total)
    require_same_device(labels=labels, token_weights=token_weights, scores=scores)
    return token_weights.detach().to(compute)
