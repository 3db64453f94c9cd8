"""Rotary position embedding by position ids, on packed and strided q and k, in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from varlen_sft import reference
from varlen_sft.ops.backends import resolve
from varlen_sft.ops.checks import (
    FLOATS,
    INTEGERS,
    last_axis_dense,
    require_dtype,
    require_last_axis_contiguous,
    require_same_device,
    require_shape,
)
from varlen_sft.ops.launch import is_plain
from varlen_sft.types import Numerics

__all__ = ["apply_rope", "apply_rope_", "rope_table"]


def rope_table(
    rope_parameters: dict[str, Any],
    head_dim: int,
    max_position: int,
    *,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position, in fp32; never cast them with the model.

    Args:
        rope_parameters: HF's ``rope_parameters`` (see ``resolve_rope_parameters``).
        head_dim: D.
        max_position: P, the number of positions.
        device: where to build them.

    Returns:
        (cos, sin), each (P, R/2) fp32 with the attention scaling folded in; (2 P, R/2) for
        "longrope", whose second half serves sequences longer than the pretrained length. "dynamic"
        gives the table of sequences that are not longer than ``max_position_embeddings``.

    Raises:
        ValueError: unknown ``rope_type``, a missing key, or ``max_position`` below 1.
    """
    if max_position < 1:
        raise ValueError(f"max_position must be at least 1, got {max_position}")
    return reference.rope_table(rope_parameters, head_dim, max_position, device=device)


def apply_rope(
    q: Tensor,  # (T, H, D)
    k: Tensor,  # (T, K, D)
    cos: Tensor,  # (P, R/2) fp32
    sin: Tensor,  # (P, R/2) fp32
    position_ids: Tensor,  # (T,) int32 or int64
    *,
    interleaved: bool = False,
    numerics: Numerics = "fp32",
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate the first R dimensions of every head of q and k; the rest passes through.

    Args:
        q, k: fp64, fp32, bf16 or fp16; any strides with a contiguous last axis (views of a fused
            qkv, HF's transposed view). They are not changed.
        cos, sin: from ``rope_table``.
        position_ids: any integers in [0, P), in any order.
        interleaved: pairs (2i, 2i+1) as in GPT-J, instead of halves as in GPT-NeoX and Llama.
        numerics: "fp32" computes in fp32 and rounds once; "hf" rounds where Hugging Face's eager
            Llama does, bit for bit, forward and backward.
        impl: None, "triton" (not fp64), "cpp" or "reference".

    Returns:
        Rotated q (T, H, D) and k (T, K, D), contiguous.

    Raises:
        TypeError: a dtype other than the above, or fp64 with impl="triton".
        ValueError: shapes or devices that do not fit, or a position id outside [0, P) (on the CPU).
    """
    _check(q, k, cos, sin, position_ids, numerics)
    impl = _pick(impl, q)
    run = _Rotate.apply if impl == "triton" and is_plain(q) else torch.ops.varlen_sft.rope
    return run(q, k, cos, sin, position_ids, interleaved, numerics == "hf", False, impl)


def apply_rope_(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    *,
    interleaved: bool = False,
    numerics: Numerics = "fp32",
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``apply_rope`` in place, for inference: overwrites q and k and returns them.

    Raises:
        RuntimeError: autograd records q or k, whose values its graph may still need.
        TypeError, ValueError: as ``apply_rope``.
    """
    _check(q, k, cos, sin, position_ids, numerics)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        raise RuntimeError(
            "apply_rope_ must not overwrite tensors that autograd records: use apply_rope"
        )
    _run(q, k, q, k, cos, sin, position_ids, interleaved, numerics == "hf", False,
         _pick(impl, q))  # fmt: skip
    return q, k


def _pick(impl: str | None, q: Tensor) -> str:
    picked = resolve("rope", impl, q.device)
    # The Triton kernel computes in fp32: on a GPU, unless asked, fp64 goes to the reference.
    unfit = impl is None and picked == "triton" and q.dtype == torch.float64
    return "reference" if unfit else picked


def _check(q, k, cos, sin, position_ids, numerics: str) -> None:
    require_dtype("q", q, FLOATS)
    require_dtype("k", k, (q.dtype,))
    for name, table in (("cos", cos), ("sin", sin)):
        require_dtype(name, table, (torch.float32,))
        require_shape(name, table, "P R/2", None, None)
    require_dtype("position_ids", position_ids, INTEGERS)
    require_shape("q", q, "T H D", None, None, None)
    require_shape("k", k, "T K D", q.shape[0], None, q.shape[2])
    require_shape("sin", sin, "P R/2", *cos.shape)
    require_shape("position_ids", position_ids, "T", q.shape[0])
    if 2 * cos.shape[1] > q.shape[2]:
        raise ValueError(
            f"cos must have at most D/2 = {q.shape[2] // 2} columns, got {cos.shape[1]}"
        )
    if numerics not in get_args(Numerics):
        raise ValueError(f"numerics must be 'fp32' or 'hf', got {numerics!r}")
    require_same_device(q=q, k=k, cos=cos, sin=sin, position_ids=position_ids)
    require_last_axis_contiguous("q", q)
    require_last_axis_contiguous("k", k)


def _run(
    q_out,
    k_out,
    q,
    k,
    cos,
    sin,
    position_ids,
    interleaved: bool,
    hf: bool,
    inverse: bool,
    impl: str,
) -> None:
    """Rotate q and k into q_out and k_out, which may be q and k themselves."""
    if impl == "cpp":
        _check_positions(position_ids, cos.shape[0])
        torch.ops.varlen_sft_c.rope(
            q_out, k_out, q, k, cos, sin, position_ids, interleaved, hf, inverse
        )
        return
    if impl == "triton":
        from varlen_sft.ops import rope_triton

        if q.device.type == "cpu":  # interpreted; on a GPU the kernel itself looks at every id
            _check_positions(position_ids, cos.shape[0])
        rope_triton.rope(q_out, k_out, q, k, cos, sin, position_ids, interleaved, hf, inverse)
        return
    ids, valid = position_ids, None
    if q.device.type == "cpu":
        _check_positions(position_ids, cos.shape[0])
    else:
        valid = (ids >= 0) & (ids < cos.shape[0])
        torch._assert_async(valid.all(), "position_ids must be in [0, P)")
        ids = ids.clamp(0, cos.shape[0] - 1)
    numerics: Numerics = "hf" if hf else "fp32"
    rotated = reference.apply_rope(
        q, k, cos, -sin if inverse else sin, ids, interleaved=interleaved, numerics=numerics
    )
    for out, value in zip((q_out, k_out), rotated, strict=True):
        out.copy_(value if valid is None else value.masked_fill(~valid[:, None, None], torch.nan))


def _check_positions(position_ids: Tensor, positions: int) -> None:
    if position_ids.numel() == 0:
        return
    low, high = (int(x) for x in position_ids.aminmax())
    if low < 0 or high >= positions:
        bad = low if low < 0 else high
        row = int((position_ids == bad).nonzero()[0])
        raise ValueError(f"position_ids must be in [0, {positions}), got {bad} at row {row}")


@torch.library.custom_op("varlen_sft::rope", mutates_args=())
def _rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    interleaved: bool,
    hf: bool,
    inverse: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    _run(q_out, k_out, q, k, cos, sin, position_ids, interleaved, hf, inverse, impl)
    return q_out, k_out


@_rope.register_fake
def _(q, k, cos, sin, position_ids, interleaved, hf, inverse, impl):
    return q.new_empty(q.shape), k.new_empty(k.shape)


class _Rotate(torch.autograd.Function):
    """The op below for tensors that nobody but autograd watches (``is_plain``)."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, position_ids, interleaved, hf, inverse, impl):
        _setup_context(ctx, (q, k, cos, sin, position_ids, interleaved, hf, inverse, impl), None)
        q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
        _run(q_out, k_out, q, k, cos, sin, position_ids, interleaved, hf, inverse, impl)
        return q_out, k_out

    @staticmethod
    def backward(ctx, dq, dk):
        return _turned_back(_Rotate.apply, ctx, dq, dk)


def _setup_context(ctx, inputs, output) -> None:
    _, _, cos, sin, position_ids, ctx.interleaved, ctx.hf, ctx.inverse, ctx.impl = inputs
    ctx.save_for_backward(cos, sin, position_ids)


def _backward(ctx, dq: Tensor, dk: Tensor):
    return _turned_back(torch.ops.varlen_sft.rope, ctx, dq, dk)


def _turned_back(run: Callable[..., Any], ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Any, ...]:
    # The transpose of a rotation is the rotation by the negated angle: one kernel serves both ways.
    modes = ctx.interleaved, ctx.hf, not ctx.inverse, ctx.impl
    return *run(last_axis_dense(dq), last_axis_dense(dk), *ctx.saved_tensors, *modes), *(None,) * 7


_rope.register_autograd(_backward, setup_context=_setup_context)
