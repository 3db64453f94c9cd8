"""RMSNorm and SwiGLU, whose eager chains cost more than their arithmetic on a CPU.

On other devices the eager formulas run as they are, so that torch.compile can fuse them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varlen_sft import reference
from varlen_sft.ops.backends import resolve
from varlen_sft.ops.checks import FLOATS, require_dtype, require_last_axis_contiguous, require_shape

__all__ = ["add_rms_norm", "rms_norm", "silu_mul"]


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, impl: str | None = None) -> Tensor:
    """Root-mean-square norm over the last axis, in the rounding order of HF's Llama.

    Args:
        x: (T, C) fp64, fp32, bf16 or fp16.
        weight: (C,) of the same dtype.
        eps: added to the mean square.
        impl: None, "cpp" or "reference".

    Returns:
        (T, C).

    Raises:
        TypeError, ValueError: dtypes or shapes that do not fit.
    """
    _check_norm(x, weight)
    if resolve("elementwise", impl, x.device) == "reference":
        return reference.rms_norm(x, weight, eps)
    require_last_axis_contiguous("x", x)
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
    _check_norm(x, weight)
    require_dtype("residual", residual, (x.dtype,))
    require_shape("residual", residual, "T C", *x.shape)
    if resolve("elementwise", impl, x.device) == "reference":
        return reference.add_rms_norm(x, residual, weight, eps)
    require_last_axis_contiguous("x", x)
    require_last_axis_contiguous("residual", residual)
    return torch.ops.varlen_sft.add_rms_norm_cpu(x, residual, weight, eps)[:2]


def _check_norm(x: Tensor, weight: Tensor) -> None:
    require_dtype("x", x, FLOATS)
    require_shape("x", x, "T C", None, None)
    require_dtype("weight", weight, (x.dtype,))
    require_shape("weight", weight, "C", x.shape[1])


def silu_mul(gate: Tensor, up: Tensor | None = None, *, impl: str | None = None) -> Tensor:
    """silu(gate) * up.

    Args:
        gate: (T, I); or (T, 2 I), a fused projection with the gate's columns first.
        up: (T, I) of the same dtype; None: it is the second half of ``gate``.
        impl: None, "cpp" or "reference".

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
    if up is not None:
        require_dtype("up", up, (gate.dtype,))
        require_shape("up", up, "T I", *gate.shape)
    if resolve("elementwise", impl, gate.device) == "reference":
        return reference.silu_mul(gate, up)
    require_last_axis_contiguous(name, gate)
    if up is None:
        return torch.ops.varlen_sft.silu_mul_fused_cpu(gate)
    require_last_axis_contiguous("up", up)
    return torch.ops.varlen_sft.silu_mul_cpu(gate, up)


def _wide(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=reference.accumulation_dtype(x.dtype))


def _dense(grad: Tensor) -> Tensor:
    return grad if grad.stride(-1) == 1 else grad.contiguous()


@torch.library.custom_op("varlen_sft::rms_norm_cpu", mutates_args=(), device_types="cpu")
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, rstd = x.new_empty(x.shape), _wide(x, x.shape[0])
    torch.ops.varlen_sft_c.rms_norm_forward(out, rstd, x, weight, eps, None, None)
    return out, rstd


@_rms_norm.register_fake
def _(x, weight, eps):
    return x.new_empty(x.shape), _wide(x, x.shape[0])


@torch.library.custom_op("varlen_sft::add_rms_norm_cpu", mutates_args=(), device_types="cpu")
def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    out, total, rstd = x.new_empty(x.shape), x.new_empty(x.shape), _wide(x, x.shape[0])
    torch.ops.varlen_sft_c.rms_norm_forward(out, rstd, x, weight, eps, residual, total)
    return out, total, rstd


@_add_rms_norm.register_fake
def _(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape), _wide(x, x.shape[0])


@torch.library.custom_op("varlen_sft::rms_norm_cpu_backward", mutates_args=(), device_types="cpu")
def _rms_norm_backward(
    dout: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dsum: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dx, to which dsum is added where it is given, and dweight."""
    dx, dweight = x.new_empty(x.shape), _wide(x, x.shape[1])
    torch.ops.varlen_sft_c.rms_norm_backward(dx, dweight, dout, x, weight, rstd, dsum)
    return dx, dweight.to(weight.dtype, copy=True)


@_rms_norm_backward.register_fake
def _(dout, x, weight, rstd, dsum):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _norm_setup(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, output[1])


def _norm_backward(ctx, dout: Tensor, _):
    x, weight, rstd = ctx.saved_tensors
    dx, dweight = torch.ops.varlen_sft.rms_norm_cpu_backward(_dense(dout), x, weight, rstd, None)
    return dx, dweight, None


_rms_norm.register_autograd(_norm_backward, setup_context=_norm_setup)


def _add_norm_setup(ctx, inputs, output) -> None:
    _, total, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)  # no zeros for a sum that nobody reads
    ctx.save_for_backward(total, inputs[2], rstd)


def _add_norm_backward(ctx, dout: Tensor | None, dtotal: Tensor | None, _):
    if dout is None:
        return dtotal, dtotal, None, None
    dx, dweight = torch.ops.varlen_sft.rms_norm_cpu_backward(
        _dense(dout), *ctx.saved_tensors, None if dtotal is None else _dense(dtotal)
    )
    return dx, dx, dweight, None


_add_rms_norm.register_autograd(_add_norm_backward, setup_context=_add_norm_setup)


@torch.library.custom_op("varlen_sft::silu_mul_cpu", mutates_args=(), device_types="cpu")
def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    out = gate.new_empty(gate.shape)
    torch.ops.varlen_sft_c.silu_mul_forward(out, gate, up)
    return out


@_silu_mul.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@torch.library.custom_op("varlen_sft::silu_mul_cpu_backward", mutates_args=(), device_types="cpu")
def _silu_mul_backward(dout: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    torch.ops.varlen_sft_c.silu_mul_backward(dgate, dup, dout, gate, up)
    return dgate, dup


@_silu_mul_backward.register_fake
def _(dout, gate, up):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


# Fused: one gradient for both halves, so that none has to be put together.
@torch.library.custom_op("varlen_sft::silu_mul_fused_cpu", mutates_args=(), device_types="cpu")
def _silu_mul_fused(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    out = gate_up.new_empty(gate.shape)
    torch.ops.varlen_sft_c.silu_mul_forward(out, gate, up)
    return out


@_silu_mul_fused.register_fake
def _(gate_up):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@torch.library.custom_op(
    "varlen_sft::silu_mul_fused_cpu_backward", mutates_args=(), device_types="cpu"
)
def _silu_mul_fused_backward(dout: Tensor, gate_up: Tensor) -> Tensor:
    dgate_up = gate_up.new_empty(gate_up.shape)
    halves = dgate_up.chunk(2, dim=-1), gate_up.chunk(2, dim=-1)
    torch.ops.varlen_sft_c.silu_mul_backward(*halves[0], dout, *halves[1])
    return dgate_up


@_silu_mul_fused_backward.register_fake
def _(dout, gate_up):
    return gate_up.new_empty(gate_up.shape)


def _silu_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _silu_backward(ctx, dout: Tensor):
    return torch.ops.varlen_sft.silu_mul_cpu_backward(_dense(dout), *ctx.saved_tensors)


def _silu_fused_backward(ctx, dout: Tensor):
    return torch.ops.varlen_sft.silu_mul_fused_cpu_backward(_dense(dout), *ctx.saved_tensors)


_silu_mul.register_autograd(_silu_backward, setup_context=_silu_setup)
_silu_mul_fused.register_autograd(_silu_fused_backward, setup_context=_silu_setup)
