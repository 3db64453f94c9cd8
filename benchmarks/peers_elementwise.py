"""Norms and SwiGLU as the benchmarks compare them, forward and backward, each as its users call it.

T tokens, C hidden size, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peers_ops import Step, there_and_back
from torch import Tensor

from varlen_sft import reference
from varlen_sft.ops.elementwise import add_rms_norm, silu_mul
from varlen_sft.tools import step_bench

EPS = 1e-5
Op = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class RowsLoad:
    """(T, C) or (T, I) in a dtype."""

    dtype: str
    tokens: int
    columns: int
    device: str = "cuda"

    @property
    def least_bytes(self) -> int:
        """Of both passes. A norm reads x and residual, writes the sum and its norm, then reads that
        sum and two gradients and writes one; a SwiGLU reads 2 and writes 1, reads 3 and writes 2.
        """
        return 8 * self.tokens * self.columns * step_bench.DTYPES[self.dtype].itemsize

    def draw(self, *shapes: tuple[int, ...], seed: int = 0) -> tuple[Tensor, ...]:
        draw = torch.Generator(self.device).manual_seed(seed)
        made = (torch.randn(shape, generator=draw, device=self.device) for shape in shapes)
        return tuple(x.to(step_bench.DTYPES[self.dtype]) for x in made)

    def inputs(self) -> tuple[Tensor, ...]:
        """Two tensors of rows."""
        return self.draw(*[(self.tokens, self.columns)] * 2)

    def step(self, op: Op, dtype: torch.dtype | None = None) -> Step:
        """Both passes on inputs of its own, with gradients of all outputs; in fp64 if asked for."""
        leaves = tuple(x.to(dtype or x.dtype).requires_grad_() for x in self.inputs())
        shapes = [y.shape for y in op(*leaves)]
        grads = tuple(x.to(leaves[0].dtype) for x in self.draw(*shapes, seed=1))
        return there_and_back(op, leaves, grads)


class NormLoad(RowsLoad):
    """x, residual and a weight."""

    name = "RMSNorm + residual"

    def inputs(self) -> tuple[Tensor, ...]:
        rows = (self.tokens, self.columns)
        return self.draw(rows, rows, (self.columns,))

    def ours(self) -> Op:
        return lambda x, residual, weight: add_rms_norm(x, residual, weight, EPS)

    def eager(self) -> Op:
        """HF's formula."""
        return lambda x, residual, weight: reference.add_rms_norm(x, residual, weight, EPS)

    def liger(self) -> Op:
        from liger_kernel.transformers.functional import liger_fused_add_rms_norm

        # Not in place: that would write over the incoming gradients, which the next round needs.
        return lambda x, r, w: liger_fused_add_rms_norm(x, r, w, EPS, in_place=False)


class SwigluLoad(RowsLoad):
    """gate and up."""

    name = "SwiGLU"

    def ours(self) -> Op:
        return lambda gate, up: (silu_mul(gate, up),)

    def eager(self) -> Op:
        return lambda gate, up: (reference.silu_mul(gate, up),)

    def liger(self) -> Op:
        """It leaves its gradients in the places of gate and up, which are its own here."""
        from liger_kernel.transformers.functional import liger_swiglu

        return lambda gate, up: (liger_swiglu(gate, up),)
