"""RMSNorm and SwiGLU on the CPU as ``torch.library`` ops around the C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from varlen_sft import reference
from varlen_sft.ops.checks import last_axis_dense


def _wide(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=reference.accumulation_dtype(x.dtype))


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
    dx, dweight = torch.ops.varlen_sft.rms_norm_cpu_backward(
        last_axis_dense(dout), x, weight, rstd, None
    )
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
        last_axis_dense(dout),
        *ctx.saved_tensors,
        None if dtotal is None else last_axis_dense(dtotal),
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
    return torch.ops.varlen_sft.silu_mul_cpu_backward(last_axis_dense(dout), *ctx.saved_tensors)


def _silu_fused_backward(ctx, dout: Tensor):
    return torch.ops.varlen_sft.silu_mul_fused_cpu_backward(
        last_axis_dense(dout), *ctx.saved_tensors
    )


_silu_mul.register_autograd(_silu_backward, setup_context=_silu_setup)
_silu_mul_fused.register_autograd(_silu_fused_backward, setup_context=_silu_setup)
