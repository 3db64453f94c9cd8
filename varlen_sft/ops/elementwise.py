"""RMSNorm and SwiGLU, whose eager chains cost more than their arithmetic: in time on a CPU, in
passes over memory and in launches, each of which waits for the host, on a GPU.

Under torch.compile the eager formulas run on a GPU as they are, so that it can fuse them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from varlen_sft import reference
from varlen_sft.ops import elementwise_cpp  # noqa: F401  (registers its ops)
from varlen_sft.ops.backends import resolve
from varlen_sft.ops.checks import (
    FLOATS,
    last_axis_dense,
    require_dtype,
    require_last_axis_contiguous,
    require_same_device,
    require_shape,
)
from varlen_sft.ops.launch import is_plain

__all__ = ["FUSED_ON", "add_rms_norm", "rms_norm", "silu_mul"]

FUSED_ON = tuple(
    kind
    for kind in ("cpu", "cuda")
    if resolve("elementwise", None, torch.device(kind)) != "reference"
)
"""Kinds of devices on which these ops are one pass over memory each."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, impl: str | None = None) -> Tensor:
    """Root-mean-square norm over the last axis, in the rounding order of HF's Llama.

    Args:
        x: (T, C) fp64, fp32, bf16 or fp16.
        weight: (C,) of the same dtype.
        eps: added to the mean square.
        impl: None, "triton" (not fp64, nor rows above 16 kB), "cpp" or "reference".

    Returns:
        (T, C).

    Raises:
        TypeError, ValueError: dtypes or shapes that do not fit.
    """
    if not _fit_norm(x, weight):
        _check_norm(x, weight)
    picked = _pick(impl, x, norm=True)
    if picked == "reference":
        return reference.rms_norm(x, weight, eps)
    require_last_axis_contiguous("x", x)
    require_last_axis_contiguous("weight", weight)
    if picked == "triton":
        return _RMSNorm.apply(x, weight, eps)
    return torch.ops.varlen_sft.rms_norm_cpu(x, weight, eps)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """``rms_norm`` of x + residual, and that sum, in one pass over memory each way.

    Args:
        x, residual: (T, C) fp64, fp32, bf16 or fp16. The sum is rounded to that dtype, then normed.
        weight, eps, impl: as in ``rms_norm``.

    Returns:
        The norm and the sum, (T, C) both.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not fit.
    """
    if not (_fit_norm(x, weight) and _alike(residual, x)):
        _check_norm(x, weight)
        require_dtype("residual", residual, (x.dtype,))
        require_shape("residual", residual, "T C", *x.shape)
        require_same_device(x=x, residual=residual)
    picked = _pick(impl, x, norm=True)
    if picked == "reference":
        return reference.add_rms_norm(x, residual, weight, eps)
    require_last_axis_contiguous("x", x)
    require_last_axis_contiguous("residual", residual)
    require_last_axis_contiguous("weight", weight)
    if picked == "triton":
        return _AddRMSNorm.apply(x, residual, weight, eps)
    return torch.ops.varlen_sft.add_rms_norm_cpu(x, residual, weight, eps)[:2]


def _fit_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether nothing is wrong, found out in the time in which one of the checks is called."""
    return (
        isinstance(x, Tensor)
        and isinstance(weight, Tensor)
        and x.dtype in FLOATS
        and x.dim() == 2
        and x.dtype == weight.dtype
        and x.shape[1:] == weight.shape
        and x.device == weight.device
    )


def _alike(x: Tensor, y: Tensor) -> bool:
    return (
        isinstance(x, Tensor) and x.dtype == y.dtype and x.shape == y.shape and x.device == y.device
    )


def _check_norm(x: Tensor, weight: Tensor) -> None:
    require_dtype("x", x, FLOATS)
    require_shape("x", x, "T C", None, None)
    require_dtype("weight", weight, (x.dtype,))
    require_shape("weight", weight, "C", x.shape[1])
    require_same_device(x=x, weight=weight)


def silu_mul(gate: Tensor, up: Tensor | None = None, *, impl: str | None = None) -> Tensor:
    """silu(gate) * up.

    Args:
        gate: (T, I); or (T, 2 I), a fused projection with the gate's columns first.
        up: (T, I) of the same dtype; None: it is the second half of ``gate``.
        impl: None, "triton" (not fp64), "cpp" or "reference".

    Returns:
        (T, I).

    Raises:
        TypeError, ValueError: a dtype or shape that does not fit.
    """
    name = "gate_up" if up is None else "gate"
    require_dtype(name, gate, FLOATS)
    require_shape(name, gate, "T 2*I" if up is None else "T I", None, None)
    if up is None and gate.shape[1] % 2:
        raise ValueError(f"gate_up must have an even number of columns, got {gate.shape[1]}")
    if up is not None and not _alike(up, gate):
        require_dtype("up", up, (gate.dtype,))
        require_shape("up", up, "T I", *gate.shape)
        require_same_device(gate=gate, up=up)
    picked = _pick(impl, gate)
    if picked == "reference":
        return reference.silu_mul(gate, up)
    require_last_axis_contiguous(name, gate)
    if up is not None:
        require_last_axis_contiguous("up", up)
    if picked == "triton":
        return _SiluMul.apply(gate, up)
    if up is None:
        return torch.ops.varlen_sft.silu_mul_fused_cpu(gate)
    return torch.ops.varlen_sft.silu_mul_cpu(gate, up)


# ------------------------------------------------------------------------ triton


@cache
def _kernels() -> Any:
    from varlen_sft.ops import elementwise_triton

    return elementwise_triton


def _pick(impl: str | None, x: Tensor, norm: bool = False) -> str:
    picked = resolve("elementwise", impl, x.device)
    if impl is None and picked == "triton":
        if not is_plain(x):  # a compiler fuses the formulas itself, and modes look into them
            return "reference"
        kernels = _kernels()
        if not (kernels.fits_norm if norm else kernels.fits)(x):
            return "reference"
    return picked


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        out, _, rstd = _kernels().rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        needs_weight = ctx.needs_input_grad[1]
        dx, dweight = _kernels().rms_norm_backward(
            last_axis_dense(dout), *ctx.saved_tensors, None, needs_weight
        )
        return dx, dweight, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        out, total, rstd = _kernels().rms_norm(x, weight, eps, residual)
        ctx.set_materialize_grads(False)  # no zeros for a sum that nobody reads
        ctx.save_for_backward(total, weight, rstd)
        return out, total

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dtotal):
        if dout is None:
            return dtotal, dtotal, None, None
        dx, dweight = _kernels().rms_norm_backward(
            last_axis_dense(dout),
            *ctx.saved_tensors,
            None if dtotal is None else last_axis_dense(dtotal),
            ctx.needs_input_grad[2],
        )
        return dx, dx, dweight, None


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _kernels().silu_mul(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        return _kernels().silu_mul_backward(last_axis_dense(dout), *ctx.saved_tensors)
