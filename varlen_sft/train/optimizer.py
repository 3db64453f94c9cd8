"""AdamW on fp32 weights, whatever dtype the model computes in."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["MasterAdamW", "cosine_with_warmup"]


class MasterAdamW:
    """Fused AdamW that keeps fp32 copies of low-precision weights.

    A bf16 weight has 8 bits: an update below 1/256 of it would vanish, and late in a run most are.
    The copies collect them, and the model gets their rounding after each step.

    Args:
        model: its parameters that require gradients are trained.
        weight_decay: applied to matrices; vectors (norms, biases) are not decayed.
        betas, eps: of AdamW (Loshchilov and Hutter 1711.05101).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.masters = [
            p if p.dtype in (torch.float32, torch.float64) else p.detach().float()
            for p in self.parameters
        ]
        matrices = [m for m in self.masters if m.dim() > 1]
        vectors = [m for m in self.masters if m.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=0.0,
            betas=betas,
            eps=eps,
            fused=True,
        )

    def step(self, lr: float, max_grad_norm: float) -> Tensor:
        """Clip, update, round back into the model, and drop the gradients.

        Args:
            lr: learning rate of this step.
            max_grad_norm: gradients are scaled down to this global L2 norm if theirs is larger.

        Returns:
            The norm before clipping, () on the model's device.
        """
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if parameter.grad is not None and master is not parameter:
                master.grad = parameter.grad.float()
                parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_grad_norm)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        self._round_back()
        return norm

    @torch.no_grad()
    def _round_back(self) -> None:
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)


def cosine_with_warmup(progress: float, *, warmup: float = 0.1, floor: float = 0.1) -> float:
    """Factor of the peak learning rate: linear up, then half a cosine down.

    Args:
        progress: share of the run that is done, in [0, 1].
        warmup: share of the run that is spent rising.
        floor: factor at the end.
    """
    if progress < warmup:
        return max(progress, 0.01 * warmup) / warmup
    phase = min((progress - warmup) / (1 - warmup), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * phase))
